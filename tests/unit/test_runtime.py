# SPDX-License-Identifier: Apache-2.0
"""What the layers of a worker process share: settings, scratch, counts, and what is said at start."""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from minference_vllm import runtime
from minference_vllm.budget import Budget
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.metrics import stopwatch
from minference_vllm.metrics.snapshot import Snapshot, Times
from minference_vllm.ops import Kernel
from minference_vllm.record import StepRecord
from minference_vllm.scratch import ScratchShape, num_bytes

CPU = torch.device("cpu")
SHAPE = ScratchShape(2, 1, 64, torch.bfloat16, max_seq_len=512, max_chunk=256)
ROWS = 200


def make_runtime(publish: bool = False, **settings: object) -> runtime.Runtime:
    worker = runtime.Runtime(MInferenceConfig.model_validate({"log_every": 0.0, **settings}), CPU, publish)
    worker.counters.start = lambda: None  # type: ignore[method-assign] # no thread a test
    return worker


def run_one_chunk(worker: runtime.Runtime) -> None:
    keys = torch.zeros(32, 1, 16, 64, dtype=torch.bfloat16)
    kv = PagedKV(keys, keys, torch.arange(32, dtype=torch.int32)[None], 0)
    q = torch.zeros(ROWS, SHAPE.num_qo_heads, 64, dtype=torch.bfloat16)
    assert worker.run(partial(Chunk, q, torch.empty_like(q), kv, 0, 1.0), worker.layer_state(SHAPE, 0, 2))


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_the_resolved_settings_are_logged_once_an_engine(publish: bool, log_lines: list[tuple[str, str]]) -> None:
    make_runtime(publish, method={"name": "vertical_slash", "slash_size": 777})
    logged = [line for line in log_lines if "slash_size=777" in line[1] and "min_seq_len=16384" in line[1]]
    assert logged == log_lines[-1:] * publish
    assert logging.getLogger("vllm.minference") is runtime.logger


def test_nothing_is_claimed_on_the_device_before_the_scratch() -> None:
    # Layers are built in a memory pool that vLLM's sleep mode drops with the weights.
    worker = make_runtime(publish=True)
    assert not any(isinstance(value, torch.Tensor) for value in vars(worker).values())
    assert not any(isinstance(value, torch.Tensor) for value in vars(worker.account).values())
    assert worker.account._density is None
    with torch.inference_mode():  # as in vLLM's profiling run
        state = worker.layer_state(SHAPE, 0, 2)
    state.attend.kept_pairs.add_(7)
    state.budgets.fill_(3)
    worker.account.causal_pairs = 9
    worker.account.collect()
    told = worker.account.read()
    assert (told.kept_pairs, told.causal_pairs) == (7, 9)


def test_what_is_claimed_and_run_is_told_to_the_metrics() -> None:
    worker = make_runtime(publish=True)
    assert worker.account.read() == Snapshot(engines=Counter({("block", "reference"): 1}))
    state = worker.layer_state(SHAPE, 0, 2)
    worker.layer_state(SHAPE, 1, 2)
    claimed = num_bytes(state.buffers) + num_bytes(state.attend) + num_bytes(state.guard.buffers)
    assert worker.account.read().scratch_bytes == claimed > 0


def test_layers_of_one_shape_share_scratch_and_have_budgets_of_their_own() -> None:
    worker = make_runtime()
    first, second = (worker.layer_state(SHAPE, position, 2) for position in (0, 1))
    assert first.buffers is second.buffers
    assert first.attend is second.attend
    assert first.budgets is not second.budgets
    assert worker.layer_state(SHAPE, 0, 2) is first


def test_where_other_kernels_serve_a_shape_is_said_once(log_lines: list[tuple[str, str]]) -> None:
    worker = make_runtime(kernel="auto")
    worker.method.kernel = Kernel.CUDA
    in_fp8 = replace(SHAPE, has_fp8_kv=True, has_fp8_q=True)
    for position in (0, 1):
        worker.layer_state(SHAPE, position, 4)
        worker.layer_state(in_fp8, position + 2, 4)
    ((level, line),) = [logged for logged in log_lines if "instead of" in logged[1]]
    assert level == "INFO"
    assert line.startswith("MInference: kernel triton instead of cuda for the probe of ScratchShape(")


@pytest.mark.parametrize("has_fp8_q", [True, False])
def test_a_dry_run_of_a_cache_in_fp8_works(has_fp8_q: bool) -> None:
    make_runtime(debug=True).dry_run(replace(SHAPE, has_fp8_kv=True, has_fp8_q=has_fp8_q), page_size=16)


def test_a_dry_run_of_a_cache_in_fp8_works_under_a_models_default_dtype() -> None:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM has it while it builds a model
    try:
        make_runtime(debug=True).dry_run(replace(SHAPE, has_fp8_kv=True, has_fp8_q=True), page_size=16)
    finally:
        torch.set_default_dtype(usual)


def test_a_dry_run_is_not_counted() -> None:
    worker = make_runtime()
    kept = worker.layer_state(SHAPE, 0, 2).attend.kept_pairs
    kept += 12
    worker.dry_run(SHAPE, page_size=16)
    assert kept.item() == 12
    assert worker.account.causal_pairs == 0


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_what_ran_sparse_is_published_once_the_step_has_run(publish: bool) -> None:
    worker = make_runtime(publish)
    record = StepRecord("a group", [0, ROWS], [ROWS], [True])
    worker.finish_step(record)  # before any scratch
    assert worker.counters.snapshot().density is None
    run_one_chunk(worker)
    assert worker.counters.snapshot().density is None
    worker.finish_step(record)
    counted = worker.counters.snapshot()
    assert counted.causal_pairs == (2 * ROWS * (ROWS + 1) // 2 if publish else 0)
    assert (0 < counted.kept_pairs <= counted.causal_pairs) == publish


def test_a_step_whose_last_layer_runs_in_each_loop_of_the_model_is_counted_once() -> None:
    worker = make_runtime(publish=True)
    for _ in range(2):
        record = StepRecord("a group", [0, ROWS], [ROWS], [True])
        for _ in range(3):
            worker.finish_step(record)
    assert worker.counters.snapshot().tokens.total() == 2 * ROWS


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_one_layer_of_many_is_timed(publish: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "PERIOD", 3)
    worker = make_runtime(publish)
    for _ in range(7):
        run_one_chunk(worker)
    assert worker.counters.snapshot().times == Times()  # the step has not ended
    worker.finish_step(StepRecord("a group", [0, ROWS], [ROWS], [True]))
    times = worker.counters.snapshot().times
    assert times.laps == (2 if publish else 0)
    assert (times.choose > 0 and times.attend > 0) == publish


# Limits that keep the gate shut


BUDGET = Budget(tokens=4096, rows=2048)
MAX_PROMPT = 32_767
ON_ROWS = ("nothing will run sparse: minference.min_chunk is 5000", "above the 4096 rows", "--max-num-batched-tokens")
ON_LENGTH = ("nothing will run sparse: minference.min_seq_len is 32768", "32767 tokens", "--max-model-len")
ON_SHARING = (
    "hardly run sparse beside other requests: minference.min_chunk is 4096",
    "2048 rows",
    "--long-prefill-token-threshold",
)
ON_DECODING = ("hardly run sparse beside other requests: minference.min_chunk is 1024", "a step of 1024", *ON_ROWS[2:])
ON_PROMPTS = ("nothing will run sparse: minference.min_chunk is 40000", "above the 32767 tokens", "--max-model-len")


@pytest.mark.parametrize(
    ("settings", "budget", "said_of"),
    [
        ({"min_chunk": 5000}, BUDGET, ON_ROWS),
        ({"min_seq_len": 32_768}, BUDGET, ON_LENGTH),
        ({"min_chunk": 4096}, BUDGET, ON_SHARING),
        ({"min_chunk": 1024}, Budget(1024, 1024), (*ON_DECODING, "above the 960 rows")),
        ({"min_chunk": 4000}, Budget(4096, 4096, slots=64), ("min_chunk is 4000", "above the 3968 rows", *ON_ROWS[2:])),
        (
            {"min_chunk": 4000},
            Budget(4096, 4096, scheduled=3000),
            ("nothing will", "above the 3000 rows", "--max-num-scheduled-tokens"),
        ),
        ({"min_chunk": 40_000}, Budget(65_536, 65_536), ON_PROMPTS),
        ({"min_chunk": 5000, "min_seq_len": 32_768}, BUDGET, ON_ROWS + ON_LENGTH[1:]),
    ],
    ids=[
        "a step's rows",
        "a prompt's tokens",
        "rows beside others",
        "rows beside decoding requests",
        "drafts",
        "scheduled",
        "a prompt shorter than a chunk",
        "two",
    ],
)
def test_limits_that_keep_the_gate_shut_are_warned_of_once(
    settings: dict[str, int], budget: Budget, said_of: tuple[str, ...], log_lines: list[tuple[str, str]]
) -> None:
    worker = make_runtime(publish=True, **settings)
    for _ in range(2):  # KV cache groups
        worker.start(MAX_PROMPT, budget, has_sparse_layers=True)
    [warning] = [line for level, line in log_lines if level == "WARNING"]
    assert all(part in warning for part in said_of)
    options = {
        "--max-num-batched-tokens",
        "--max-num-scheduled-tokens",
        "--max-model-len",
        "--long-prefill-token-threshold",
    }
    assert {option for option in options if option in warning} == options.intersection(said_of)


@pytest.mark.parametrize(
    ("publish", "has_sparse_layers", "settings"),
    [
        (True, True, {"min_chunk": 2048, "min_seq_len": 32_767}),
        (True, False, {"min_chunk": 5000}),
        (False, True, {"min_chunk": 5000}),
    ],
    ids=["it can open", "no sparse layers", "another rank"],
)
def test_no_other_start_is_warned_of(
    publish: bool, has_sparse_layers: bool, settings: dict[str, int], log_lines: list[tuple[str, str]]
) -> None:
    worker = make_runtime(publish, **settings)
    worker.start(MAX_PROMPT, BUDGET, has_sparse_layers)
    assert [line for level, line in log_lines if level == "WARNING"] == []
    assert worker.has_sparse_layers is has_sparse_layers
