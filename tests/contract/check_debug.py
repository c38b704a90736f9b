# SPDX-License-Identifier: Apache-2.0
"""The setting `debug`: an exception after which a step would run dense in service is raised, and indexes and outputs
are checked. Run by test_vllm_033.py, with that release on the path.
"""

from typing import Any

import pytest
import torch

from minference_vllm import ops
from minference_vllm import step as step_module
from minference_vllm.compat import steps
from minference_vllm.impl import MInferenceImpl
from minference_vllm.runtime import Runtime
from tests.contract.check_faults import fail, start_with
from tests.contract.check_layer import attend, make_step
from tests.contract.fakes import LONG, MIXED, NAME, make_builder, make_common, make_impl, make_runtime

pytestmark = pytest.mark.usefixtures("no_gpu")


def debugged_layer() -> tuple[Runtime, Any, MInferenceImpl]:
    runtime = make_runtime(debug=True)
    impl = make_impl(runtime)
    return runtime, make_builder({NAME.format(0): impl}), impl


def test_debug_raises_what_service_would_run_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, builder, impl = debugged_layer()
    common = make_common(LONG)
    query, cache = make_step(common)
    attend(impl, query, cache, builder.build(0, common))
    places = [
        (runtime, "chooser"), (MInferenceImpl, "scales"), (runtime.account._density, "copy"), (steps, "step_traits"),
    ]  # fmt: skip
    for place in places:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a wrapper that raises"):
            patch.setattr(*place, fail)
            attend(impl, query, cache, builder.build(0, common))
    metadata = builder.build(0, make_common(*MIXED))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a wrapper that raises"):
        patch.setattr(step_module, "run_metadata", fail)
        builder.update_block_table(metadata, metadata.block_table, metadata.slot_mapping)
    with pytest.raises(RuntimeError, match="no kernel image"):
        start_with(RuntimeError("no kernel image"), make_runtime(debug=True))


def test_debug_finds_an_index_that_lists_no_key_before_keys_are_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, builder, impl = debugged_layer()
    common, works = make_common(LONG), runtime.chooser
    read: list[Any] = []
    monkeypatch.setattr(ops, "attend", lambda *arguments: read.append(arguments))

    def break_index(*arguments: Any) -> Any:
        index = works(*arguments)
        index.columns[1, 5] = 3
        return index

    runtime.chooser = break_index
    with pytest.raises(RuntimeError, match=r"layer 0.*head 1: columns are no ascending keys below 200"):
        attend(impl, *make_step(common), builder.build(0, common))
    assert read == []


def test_debug_finds_an_output_that_is_no_number() -> None:
    _, builder, impl = debugged_layer()
    common = make_common(LONG)
    query, cache = make_step(common)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        attend(impl, query, cache.fill_(torch.nan), builder.build(0, common))
