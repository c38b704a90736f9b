# SPDX-License-Identifier: Apache-2.0
"""A reconfigured engine attends as one that was started with the settings."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import parse_settings, reconfigure
from benchmarks.cases import Case, make_inputs
from minference_vllm.attention import prefill
from minference_vllm.config import MInferenceConfig
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape

SHAPE = ScratchShape(2, 1, 64, torch.bfloat16, 1024, 512)
DEVICE = torch.device("cpu")
BLOCK = {"name": "block", "max_density": 1.0, "long_from": 0}
BEFORE = {"method": {**BLOCK, "share": 0.3, "rows_per_half": 16}, "log_every": 0}


def started(settings: dict[str, Any]) -> tuple[Runtime, Any]:
    """A runtime and a layer of it."""
    runtime = Runtime(MInferenceConfig.model_validate(settings), DEVICE, False)
    return runtime, SimpleNamespace(dense_reason=None, shape=SHAPE, layer_state=runtime.layer_state(SHAPE, 0, 1))


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> tuple[Runtime, Any]:
    runtime, layer = started(BEFORE)
    dense = SimpleNamespace(dense_reason="sliding_window")
    monkeypatch.setattr(reconfigure, "runtime", lambda: runtime)
    monkeypatch.setattr(reconfigure, "our_layers", lambda _: [dense, layer])
    return runtime, layer


def attend(runtime: Runtime, layer: Any) -> tuple[torch.Tensor, int]:
    """The output of the last half of a prompt, and how many pairs were kept."""
    inputs = make_inputs(Case(1024, 1, 1, 2, 1, 64), DEVICE, 0)
    out = torch.empty_like(inputs.q[512:])
    layer.layer_state.attend.kept_pairs.zero_()
    prefill(inputs.chunk(512, out), runtime.method, layer.layer_state)
    return out, int(layer.layer_state.attend.kept_pairs)


@pytest.mark.parametrize(
    "method", [{**BLOCK, "share": 0.7}, {"name": "vertical_slash", "vertical_size": 200, "slash_size": 200}]
)
def test_it_attends_as_if_started_so(method: dict[str, Any], running: tuple[Runtime, Any]) -> None:
    settings = {**BEFORE, "method": method, "recall_floor": 0.2, "row_recall_floor": 0.0}
    _, before = attend(*running)
    reconfigure.reconfigure(None, settings)
    out, kept = attend(*running)
    expected, as_many = attend(*started(settings))
    assert torch.equal(out, expected)
    assert kept == as_many != before
    assert running[1].layer_state.guard.floors == (0.2, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"), [({"min_chunk": 7}, "min_chunk"), ({"method": "auto"}, "the method auto")], ids=str
)
def test_what_only_a_start_can_change_is_refused(
    changes: dict[str, Any], said: str, running: tuple[Runtime, Any]
) -> None:
    with pytest.raises(ValueError, match=f"only a start changes .*{said}"):
        reconfigure.reconfigure(None, {**BEFORE, **changes})
    assert running[0].method.settings.share == 0.3


def test_settings_are_an_object_or_a_method() -> None:
    assert parse_settings('{"recall_floor": 0.5}') == {"recall_floor": 0.5}
    assert parse_settings('block:{"share": 0.9}') == {"method": {"name": "block", "share": 0.9}}
