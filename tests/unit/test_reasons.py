# SPDX-License-Identifier: Apache-2.0
"""Why prefill runs dense: each reason is given by something, and what a step says is understood."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm import plan
from minference_vllm.compat.steps import step_traits
from minference_vllm.reason import Reason


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_given_somewhere(reason: Reason) -> None:
    sources = {path.name: path.read_text() for path in Path(plan.__file__).parent.glob("*.py")}
    assert any(f"Reason.{reason.name}" in source for source in sources.values())


@pytest.mark.parametrize(
    ("common", "metadata", "reason"),
    [
        pytest.param({}, {}, None, id="a plain step"),
        pytest.param({"causal": False}, {}, Reason.NOT_CAUSAL, id="not causal"),
        pytest.param({"causal": object()}, {}, Reason.NOT_CAUSAL, id="causal by request"),
        pytest.param({"logits_indices_padded": object()}, {}, Reason.FAST_PREFILL, id="fast prefill"),
        pytest.param({}, {"mm_prefix_query_range_tensor": object()}, Reason.MM_PREFIX, id="image"),
        pytest.param({}, {"rswa_prefix_lens": object()}, Reason.RSWA, id="reference window"),
    ],
)
def test_what_forbids_a_step_is_named(common: dict[str, Any], metadata: dict[str, Any], reason: Reason | None) -> None:
    plain = {"causal": True, "logits_indices_padded": None}
    traits = step_traits(SimpleNamespace(**{**plain, **common}), SimpleNamespace(**metadata))
    assert traits.dense_reason is reason
