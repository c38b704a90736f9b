# SPDX-License-Identifier: Apache-2.0
"""Prompts longer than a model was trained for, by YaRN (arXiv 2309.00071), as Qwen2.5's makers describe for theirs."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=int,
        help="tokens that the model is to read: its positions are stretched by YaRN, at any length",
    )


def stretched(model: str, tokens: int | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` with which a model reads so many tokens; none if `tokens` is None.

    Raises:
        SystemExit: the model reads as many without.
    """
    if tokens is None:
        return {}
    config = json.loads(Path(model, "config.json").read_text())
    trained = config["max_position_embeddings"]
    if tokens <= trained:
        raise SystemExit(f"--context {tokens}: the model reads {trained} tokens without; give more, or leave it out")
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    yarn = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": tokens / trained,
        "original_max_position_embeddings": trained,
    }
    return {"hf_overrides": {"max_position_embeddings": tokens, "rope_parameters": yarn}}
