# SPDX-License-Identifier: Apache-2.0
"""A model in two pipeline stages: what /metrics says of layers that run in different processes."""

import json
import re
from pathlib import Path

import pytest
import torch

from demo.server import SMALL_MODEL, minference_option, running
from tests.serving.client import complete, prefilled, tokenize
from tests.serving.conftest import MIN_CHUNK, OPTIONS
from tests.serving.forked import start_serving
from tests.serving.prompts import GARDEN
from tests.serving.server import MODEL, ON_GPU, needs_model

pytestmark = [
    pytest.mark.serving,
    needs_model,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="each stage takes a GPU, and there is one"),
]

NUM_TOKENS = 512
# Without a GPU, vLLM allocates the buffers for what a stage receives only when it warms up a compiled model. With this
# backend it compiles nothing.
COMPILED = ["--no-enforce-eager", '--compilation-config={"mode": 1, "backend": "eager"}']
TWO_STAGES = ["--pipeline-parallel-size=2", *([] if ON_GPU else COMPILED)]


def test_the_second_stage_shows_its_layers_and_counts_for_a_first_that_is_all_dense(logs: Path) -> None:
    geometry = json.loads((MODEL / "config.json").read_text())
    num_layers, num_heads = geometry["num_hidden_layers"], geometry["num_attention_heads"]
    settings = {"min_seq_len": NUM_TOKENS, "min_chunk": MIN_CHUNK, "dense_layers": num_layers // 2}
    options = [*SMALL_MODEL, *OPTIONS, *TWO_STAGES, *minference_option(**settings)]
    with running(str(MODEL), logs / "stages.log", *options, start=start_serving) as server:
        complete(server, tokenize(server, GARDEN.prompt)[:NUM_TOKENS], "salt", 1)
        assert prefilled(server).sparse == NUM_TOKENS
        assert server.metric("minference_prefill_tokens_total", path="dense", reason="dense_layer") == 0
        shown = set(map(int, re.findall(r'minference_recall_mean\{[^}]*layer="(\d+)"', server.get("/metrics"))))
        assert shown == set(range(num_layers // 2, num_layers))
        pairs = num_heads * NUM_TOKENS * (NUM_TOKENS + 1) // 2
        assert server.metric("minference_causal_pairs_total") == len(shown) * pairs
