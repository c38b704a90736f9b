# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are made up: of the shape of a real model, or of a toy model for smoke tests."""

import json
from pathlib import Path

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}


def write_model(directory: str, shape: dict[str, int], layers: int, max_len: int) -> None:
    """Write a model without weights or tokenizer: only its config.json."""
    model = dict(
        **shape, architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=layers, hidden_act="silu",
        max_position_embeddings=max_len, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Path(directory, "config.json").write_text(json.dumps(model))
