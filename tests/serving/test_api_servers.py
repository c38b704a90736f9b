# SPDX-License-Identifier: Apache-2.0
"""Two API servers in front of two engines (data parallel): /metrics of either counts the prompts of both engines."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from demo.server import Server, minference_option, running
from tests.serving.client import prefilled, prefilled_so_far
from tests.serving.forked import start_serving
from tests.serving.server import ON_GPU
from tests.serving.tiny_kinds import make_llama
from tests.serving.tiny_models import token_ids

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="each engine takes a GPU, and there is one"),
]

LENGTHS = (600, 700, 800, 900)
GATE = {"min_seq_len": 256, "min_chunk": 64, "method": {"name": "block", "share": 1.0}}
OPTIONS = (
    "--dtype=bfloat16", "--enforce-eager", "--max-model-len=2048", "--max-num-seqs=4", "--max-num-batched-tokens=1024",
    "--data-parallel-size=2", "--api-server-count=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    make_llama(logs / "llama")
    options = [*OPTIONS, *minference_option(**GATE)]
    with running(str(logs / "llama"), logs / "several.log", *options, start=start_serving) as server:
        yield server


def complete(server: Server, length: int) -> str:
    """The reply to a prompt. Each uses its own connection, which the operating system gives to one of the servers."""
    model = str(server.log.with_name("llama"))
    reply = server.client().completions.create(
        model=model, prompt=token_ids(length), max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
    )
    return reply.choices[0].text


def test_prompts_of_all_engines_are_counted_once_by_whichever_api_server_is_asked(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda length: complete(server, length), LENGTHS))
    assert len(texts) == len(LENGTHS)
    assert all(server.metric("vllm:prompt_tokens_total", engine=engine) > 0 for engine in "01")
    # Another prompt may cut a prompt's first chunk so short that it runs dense; the rest still passes the gate.
    counted = prefilled(server)
    assert counted.sparse > 0.7 * sum(LENGTHS)
    assert counted.tokens == sum(LENGTHS)
    for _ in range(6):  # the servers take turns
        assert prefilled_so_far(server) == counted
