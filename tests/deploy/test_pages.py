# SPDX-License-Identifier: Apache-2.0
"""What the pages about deployment promise: log lines, metrics and manifests that there are, sizes that are claimed."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from minference_vllm import layers, runtime
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import make_method
from minference_vllm.metrics.families import FAMILIES
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.ops import Kernel, kernel
from minference_vllm.reason import Reason
from minference_vllm.scratch import AttendBuffers, RecallBuffers, ScratchShape, num_bytes
from tests.deploy.manifests import KUBERNETES, OVERLAYS, ROOT, build

QUICKSTART = (ROOT / "docs/quickstart.md").read_text()
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()
PAGES = pytest.mark.parametrize("page", [QUICKSTART, DEPLOYMENT], ids=["quickstart", "deployment"])


def log_line(start: str) -> str:
    """The one line of the quickstart's log that starts so."""
    (line,) = re.findall(rf"^    (MInference: {start}.*)$", QUICKSTART, re.MULTILINE)
    return line


def test_the_line_about_kernels(monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]) -> None:
    line = log_line("kernel")
    monkeypatch.setattr(kernel, "_cuda_obstacle", lambda device: "")
    monkeypatch.setattr(kernel, "describe", lambda device: line.partition("this is ")[2])
    assert kernel.choose_kernel("auto", torch.device("cuda")) is Kernel.CUDA
    assert log_lines == [("INFO", line)]


def test_the_line_about_layers(log_lines: list[tuple[str, str]]) -> None:
    line = log_line("28 of 28")
    layers._report([SimpleNamespace(dense_reason=None)] * 28, {})
    assert log_lines == [("INFO", line)]


def test_the_line_about_scratch(log_lines: list[tuple[str, str]]) -> None:
    line = log_line("51 MiB")
    served = {name: int(value) for name, value in re.findall(r"--(max-[\w-]+) (\d+)", QUICKSTART)}
    shape = ScratchShape(28, 4, 128, torch.bfloat16, served["max-model-len"], served["max-num-batched-tokens"])
    config = MInferenceConfig.model_validate({"method": {"name": "block", "score_dtype": "fp8"}})
    runtime.Runtime(config, torch.device("meta"), publish=False)._claim(shape)
    assert line.endswith("…")
    assert log_lines[-1][1].startswith(line.removesuffix("…"))


def test_the_line_about_prompts() -> None:
    line = log_line("19,700")
    tokens, seconds, density = re.findall(r"[\d.,]*\d", line.replace("0 dense", ""))
    kept = round(float(density) * 10)
    snapshot = Snapshot(Counter({("sparse", "gate_open"): int(tokens.replace(",", ""))}), Counter(), kept, 1000)
    assert snapshot.summary(float(seconds)) == line


@PAGES
def test_metrics_exist(page: str) -> None:
    known = {family.name if family.gauge else f"{family.name}_total" for family in FAMILIES}
    named = set(re.findall(r"\bminference_(?!vllm)\w+", page))
    assert named
    assert named <= known


@PAGES
def test_reasons_exist(page: str) -> None:
    named = set(re.findall(r'reason="(\w+)"|`((?:gate|below|short|sparse)_\w+)`', page))
    assert named
    assert {quoted or alone for quoted, alone in named} <= {reason.value for reason in Reason}


def test_manifests_that_are_explained_exist() -> None:
    named = re.findall(r"`((?:base|components)/[\w./-]+)`", DEPLOYMENT)
    explained = {f"base/{path.name}" for path in (KUBERNETES / "base").iterdir()} - {"base/kustomization.yaml"}
    assert set(named) >= explained
    assert [path for path in named if not (KUBERNETES / path).exists()] == []


def test_objects_that_kubectl_is_asked_for_exist() -> None:
    asked = {(kind.capitalize(), name) for kind, name in re.findall(r"(deployment|service)/([\w-]+) ", DEPLOYMENT)}
    made = {(manifest["kind"], manifest["metadata"]["name"]) for overlay in OVERLAYS for manifest in build(overlay)}
    assert asked
    assert asked <= made


def test_the_table_of_scratch_is_what_is_claimed() -> None:
    table = DEPLOYMENT[DEPLOYMENT.index("| query / KV heads") :].split("\n\n")[0].splitlines()
    lengths = [int(re.sub(r"\D", "", cell)) for cell in table[0].strip("| ").split(" | ")[2:]]
    rows = [row.strip("| ").split(" | ") for row in table[2:]]
    assert len(rows) == 4
    for heads, method, *sizes in rows:
        num_qo_heads, num_kv_heads = map(int, re.findall(r"\d+", heads)[:2])
        assert list(map(int, sizes)) == [
            scratch_mib(method.strip("`"), num_qo_heads, num_kv_heads, length) for length in lengths
        ]


def scratch_mib(method: str, num_qo_heads: int, num_kv_heads: int, max_seq_len: int) -> int:
    """What Runtime claims for chunks of 16,384 tokens and heads of 128, on GPUs whose scores are in FP8."""
    shape = ScratchShape(num_qo_heads, num_kv_heads, 128, torch.bfloat16, max_seq_len, 16384)
    settings = {"name": method} | ({"score_dtype": "fp8"} if method == "block" else {})
    config, device = MInferenceConfig.model_validate({"method": settings}), torch.device("meta")
    buffers = make_method(config.method, Kernel.CUDA).scratch(shape, device)
    attend = AttendBuffers.allocate(num_qo_heads, shape.max_chunk, device)
    recall = RecallBuffers.allocate(num_qo_heads, device)
    return round(sum(map(num_bytes, (buffers, attend, recall))) / 2**20)
