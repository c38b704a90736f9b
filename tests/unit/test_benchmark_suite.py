# SPDX-License-Identifier: Apache-2.0
"""benchmarks.attention_suite covers what it says, and finds what is wrong. One test runs vLLM's layer on the CPU."""

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import SparseWork, attention_suite, exact, results, verdict
from benchmarks.batches import (
    BATCHES,
    KV_SCALES,
    MAX_LEN,
    MAX_ROWS,
    SHAPES,
    TINY_BATCHES,
    TINY_SHAPES,
    Batch,
    Request,
    Shape,
    decodes,
    make_inputs,
)
from benchmarks.verdict import Verdict
from minference_vllm.chunk import PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.reference.dense import dense
from tests.conftest import import_or_skip

CPU = torch.device("cpu")
SHAPE = TINY_SHAPES[0]
BATCH = Batch("mixed", (*decodes(32), Request(40, 110), Request(33)))
CHUNKS = 73  # rows of prompts
WORK = SparseWork(CHUNKS, kept_pairs=9, causal_pairs=9, measured_heads=4, redone_heads=0, recalls=4.0)


# What is covered


def test_every_value_of_a_shape_meets_every_value_of_the_others() -> None:
    # The kernels differ by head_dim and by numbers: bf16, fp16, FP8.
    kinds = [(of.group_size, of.head_dim, (of.dtype, of.cache), of.layout, of.page_size) for of in SHAPES]
    values = [sorted(set(of_kind)) for of_kind in zip(*kinds, strict=True)]
    assert values[:2] == [[1, 2, 4, 8], [64, 128, 256]]
    # FlashAttention-3 does not take fp16 over a cache in FP8.
    assert values[2:] == [
        [("bfloat16", "auto"), ("bfloat16", "fp8_e4m3"), ("float16", "auto")], ["HND", "NHD"], [16, 32]
    ]  # fmt: skip
    for a, b in itertools.combinations(range(len(values)), 2):
        assert {(kind[a], kind[b]) for kind in kinds} == set(itertools.product(values[a], values[b]))
    assert len(SHAPES) == len(set(SHAPES)) == 12


def test_batches_fit_the_server_and_hold_each_kind_of_step() -> None:
    for batch in BATCHES:
        assert batch.starts[-1] <= MAX_ROWS
        assert max(request.seq_len for request in batch.requests) <= MAX_LEN
        assert min(request.context_len for request in batch.requests) >= 0
    assert len({batch.name for batch in BATCHES}) == len(BATCHES)
    config = MInferenceConfig()
    chunks = {batch.name: sum(batch.passes(config.min_seq_len, config.min_chunk)) for batch in BATCHES}
    # The bound of outputs that leave keys out is known of the chunk that ran last.
    assert set(chunks.values()) == {0, 1}
    assert chunks["long chunk among others"] == 1
    assert sum(BATCHES[-2].passes(1, 1)) == 3
    assert not any(BATCHES[0].passes(1, 1))


def test_settings_differ_in_what_runs_sparse() -> None:
    for tiny in (False, True):
        for name, settings in attention_suite.make_settings(tiny).items():
            config = MInferenceConfig.model_validate(settings)
            opens = any(any(batch.passes(config.min_seq_len, config.min_chunk)) for batch in TINY_BATCHES)
            assert opens is (tiny or name != attention_suite.DEFAULT)


# What goes in


@pytest.mark.parametrize("shape", TINY_SHAPES)
def test_requests_have_pages_of_their_own_in_no_order(shape: Shape) -> None:
    inputs = make_inputs(shape, BATCH, CPU, 0)
    pages = [-(-request.seq_len // shape.page_size) for request in BATCH.requests]
    used = [int(page) for row, count in zip(inputs.block_table, pages, strict=True) for page in row[:count]]
    assert len(set(used)) == len(used) == sum(pages)
    assert 0 not in used and max(used) < inputs.num_pages
    assert len(used) < inputs.num_pages - 1
    assert used != sorted(used)
    slots = [inputs.slots(number, 0, of.seq_len, shape.page_size) for number, of in enumerate(BATCH.requests)]
    assert len(torch.cat(slots).unique()) == sum(of.seq_len for of in BATCH.requests)
    assert int(slots[1][shape.page_size + 3]) == int(inputs.block_table[1, 1]) * shape.page_size + 3


@pytest.mark.parametrize(
    ("shape", "has_fp8_queries"), [(TINY_SHAPES[0], False), (TINY_SHAPES[1], False), (TINY_SHAPES[1], True)]
)
def test_exact_attention_is_the_references(shape: Shape, has_fp8_queries: bool) -> None:
    inputs = make_inputs(shape, BATCH, CPU, 0)
    found = exact.attention(shape, BATCH, inputs, has_fp8_queries)
    for number, (request, rows) in enumerate(BATCH.spans()):
        k, v, q = inputs.k[number].float(), inputs.v[number].float(), inputs.q[rows].float()
        if shape.is_fp8:
            k, v = exact.as_stored(k, "_k_scale"), exact.as_stored(v, "_v_scale")
            assert not torch.equal(k, inputs.k[number].float())
        q = exact.as_stored(q, "_q_scale") if has_fp8_queries else q
        kv = PagedKV(*(of.transpose(0, 1)[None] for of in (k, v)), torch.zeros(1, 1, dtype=torch.int32), 0)
        expected = torch.empty_like(q)
        dense(q, kv, request.context_len, shape.head_dim**-0.5, expected)
        torch.testing.assert_close(found.out[rows], expected, rtol=1e-4, atol=1e-5)


def test_the_scales_of_fp8_are_told_apart_and_exact() -> None:
    assert len(set(KV_SCALES.values())) == 3
    assert 1.0 not in KV_SCALES.values()
    for name, scale in KV_SCALES.items():
        stored = exact.as_stored(torch.tensor([[[1.5 * scale, -448 * scale, 500 * scale]]]), name)
        assert stored.tolist() == [[[1.5 * scale, -448 * scale, 448 * scale]]]


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_leaving_keys_out_moves_an_output_no_further_than_its_bound(kept: int) -> None:
    batch = Batch("one", (Request(8, 92),))
    inputs = make_inputs(SHAPE, batch, CPU, 0)
    whole = exact.attention(SHAPE, batch, inputs, False)
    fewer = Batch("fewer", (Request(8, kept),))
    k, v = (torch.cat([of[0][:kept], of[0][92:]]) for of in (inputs.k, inputs.v))
    some = inputs._replace(k=[k], v=[v])
    part = exact.attention(SHAPE, fewer, some, False)
    moved = (part.out - whole.out).abs()
    assert moved.max() > verdict.TOLERANCE
    assert (moved <= whole.moved(part.lse, slice(0, 8)) + 1e-5).all()


# What is found


@pytest.fixture(scope="module")
def right() -> Verdict:
    """An output that is right under settings that keep everything."""
    inputs = make_inputs(SHAPE, BATCH, CPU, 0)
    found = exact.attention(SHAPE, BATCH, inputs, False)
    config = MInferenceConfig(min_seq_len=1, min_chunk=1)
    lse = found.lse[-33:].T.clone()
    return Verdict(BATCH, config, True, found.out.bfloat16(), found, found.out.bfloat16(), False, WORK, lse)


def change(out: torch.Tensor, row: int, value: float) -> torch.Tensor:
    out = out.clone()
    out[row, 1, 5] = value
    return out


def test_a_right_output_is_right(right: Verdict) -> None:
    row = right.row()
    assert (row["ok"], row["fault"], row["density"], row["recall"]) == (True, None, 1.0, 1.0)
    assert 0 < row["max_abs"] == row["dense_max_abs"] < verdict.TOLERANCE
    assert row["max_from_dense"] == 0


@pytest.mark.parametrize("at", [0, 5, 60])
@pytest.mark.parametrize("value", [9.0, torch.nan])
def test_one_wrong_number_is_found(right: Verdict, at: int, value: float) -> None:
    row = replace(right, out=change(right.out, at, value)).row()
    assert not row["ok"]
    assert row["fault"] == f"1 of {right.out.numel()} numbers are off, the first in row {at} of head 1"
    assert (row["max_abs"] is None) is (value != value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sparse_tokens": 40}, "40 rows ran sparse, not 73"),
        ({"sparse_tokens": 0}, "0 rows ran sparse, not 73"),
        ({"kept_pairs": 8}, "density is 0.888889"),
        ({"kept_pairs": 0}, "no pair was kept"),
    ],
)
def test_work_that_was_not_done_is_found(right: Verdict, changes: dict[str, int], fault: str) -> None:
    row = replace(right, work=WORK._replace(**changes)).row()
    assert not row["ok"]
    assert fault in row["fault"]


@pytest.mark.parametrize("lse", [-1.0, 1.0, torch.nan])
def test_a_wrong_log_sum_exp_is_found(right: Verdict, lse: float) -> None:
    row = replace(right, lse=right.lse + lse).row()
    assert not row["ok"]
    assert "recall" in row["fault"]


def test_sparse_rows_may_move_by_what_they_left_out_and_dense_rows_may_not(right: Verdict) -> None:
    default = replace(right, config=MInferenceConfig(min_seq_len=33, min_chunk=33), keeps_all=False)
    assert default.chunks == [slice(1, 41), slice(41, 74)]
    missed = replace(default, lse=right.lse + torch.tensor(0.8).log())
    for at, ok in ((50, True), (0, False)):
        out = change(right.out, at, float(right.out[at, 1, 5]) + 0.1)
        assert replace(missed, out=out).row()["ok"] is ok
        assert not replace(default, out=out).row()["ok"]
    assert "recall is 0.6" in replace(default, lse=right.lse + torch.tensor(0.6).log()).row()["fault"]


def test_dense_rows_over_fp8_are_held_against_vllms_own(right: Verdict) -> None:
    off = right.out.clone()
    off[:1] += 0.2
    assert not replace(right, out=off).row()["ok"]
    assert replace(right, out=off, dense=off, trusts_dense=True).row()["ok"]
    off[5] += 0.2  # of a chunk that ran sparse
    assert not replace(right, out=off, dense=off, trusts_dense=True).row()["ok"]


@pytest.mark.parametrize(
    ("by", "over_fp8", "over_others"), [(0.005, True, True), (0.015, True, False), (0.025, False, False)]
)
def test_sparse_rows_over_fp8_may_be_twice_as_far_off(
    right: Verdict, by: float, over_fp8: bool, over_others: bool
) -> None:
    off = right.out.clone()
    off[5] += by * (1 + off[5].abs())  # of a chunk that ran sparse
    assert replace(right, out=off, dense=right.out, trusts_dense=True).row()["ok"] is over_fp8
    assert replace(right, out=off).row()["ok"] is over_others


# The run


class Engine:
    """Stands for a worker's process."""

    def __init__(self, module: str, kind: str, spec: dict[str, object]) -> None:
        self.seed = spec["seed"]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, number: int) -> list[dict[str, object]]:
        return [
            {"batch": batch, **SHAPES[number].row, "setting": "default", "ok": batch or number != 1, "fault": None}
            for batch in (0, 1)
        ]


def test_all_rows_are_written_before_a_wrong_one_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_suite, "EngineProcess", Engine)
    monkeypatch.setattr(results, "describe_run", lambda *_: {"gpu": "a card"})
    out = tmp_path / "suite.json"
    monkeypatch.setattr(sys, "argv", ["attention_suite", "--out", str(out), "--workers", "3"])
    with pytest.raises(SystemExit, match="1 rows are wrong"):
        attention_suite.main()
    [head_dims, oks] = zip(*((row["head_dim"], row["ok"]) for row in json.loads(out.read_text())["rows"]), strict=True)
    assert list(head_dims) == [shape.head_dim for shape in SHAPES for _ in (0, 1)]
    assert list(oks).count(False) == 1


def test_the_settings_of_a_result_name_batches_and_limits() -> None:
    described = attention_suite.describe(argparse.Namespace(tiny=False, dense_backend="FLASH_ATTN"))
    assert described["batches"]["small prefill"] == ["8 of 32", "8 of 40"]
    assert described["sparse"]["default"] == MInferenceConfig(log_every=0.0).model_dump()


def test_vllms_layer_on_a_cpu_passes_and_a_planted_fault_does_not() -> None:
    import_or_skip("vllm")
    code = (
        "import torch\n"
        "from benchmarks import attention_suite as suite\n"
        "from benchmarks.batches import TINY_BATCHES, TINY_SHAPES\n"
        "from benchmarks.one_layer import OneLayer, init_worker\n"
        "cpu = torch.device('cpu')\n"
        "init_worker(cpu)\n"
        "run = lambda shape: suite.run_shape(shape, TINY_BATCHES, True, None, cpu, 0)\n"
        "plain, in_fp8 = TINY_SHAPES\n"
        "rows = run(plain)\n"
        "try:\n"
        "    rows += run(in_fp8)\n"
        "    assert len(rows) == 24, rows\n"
        "except NotImplementedError as error:\n"  # vLLM has no such cache on this CPU
        "    assert 'FP8 KV cache on CPU requires' in str(error) and len(rows) == 12, rows\n"
        "assert all(row['ok'] for row in rows), rows\n"
        "assert any(0 < (row['density'] or 0) < 1 for row in rows), rows\n"
        "fill = OneLayer._fill_cache\n"
        "OneLayer._fill_cache = lambda *of: fill(*of).nan_to_num_(1.0).mul_(-1)\n"
        "rows = run(plain)\n"
        "assert not any(row['ok'] for row in rows), rows\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
