# SPDX-License-Identifier: Apache-2.0
"""benchmarks.attention without a GPU: its smoke run, its sets, its chunks, what it makes of the peers' indexes."""

import itertools
import json
import sys
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch

from benchmarks import attention, cases, chunks, minference_sdist, peers, results, timing
from benchmarks.cases import CASES, TINY, Case, Sets, configure, make_inputs
from benchmarks.minference_sdist import MInference
from benchmarks.peers import BLOCK, PeerIndex, PeerMissing
from minference_vllm import ops
from minference_vllm.index import HALVES, TILE, BandIndex
from minference_vllm.methods import VerticalSlash
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_before
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import ProbeBuffers
from minference_vllm.tuning.masses import KeySets
from minference_vllm.tuning.timing import make_state

RUN = {
    "gpu": "a card", "driver": "1", "commit": "abc", "vllm": "0", "torch": "0", "date": "2026-11-23T00:00:00+00:00",
}  # fmt: skip
CPU = torch.device("cpu")
PEERS = ("mi_index", "mi_triton", "fa2_sparse", "fa3_paged", "fa3_contiguous", "fa3_paged128")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """What the smoke run writes."""
    path = tmp_path_factory.mktemp("result") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "describe_run", lambda *_: RUN)
        patch.setattr(timing, "WARM_UPS", 1)
        patch.setattr(timing, "RUNS_IF_FASTER", ((float("inf"), 1),))
        patch.setattr(sys, "argv", ["attention", "--tiny", "--out", str(path)])
        attention.main()
    return json.loads(path.read_text())


# the smoke run


def test_rows_have_every_field_in_order(result):
    assert [tuple(row) for row in result["rows"]] == [attention.FIELDS] * len(TINY)
    issue = "tokens vertical slash kept ours_ms ours_tflops choose_ms chunks_ms mi_triton_ms fa2_sparse_ms fa3_paged_ms"
    assert {*issue.split(), "fa3_contiguous_ms"} <= set(attention.SHOWN)


def test_rows_hold_what_was_measured(result):
    for case, row in zip(TINY, result["rows"], strict=True):
        assert Case(*(row[name] for name in Case._fields)) == case
        assert row["kernel"] == "reference"
        assert row["scratch_mib"] > 0.1
        assert 0.1 < row["kept"] < 1 and row["relative_error"] < 1e-2 and row["chunk"] == 512
        ours = "ours_ms choose_ms probe_ms select_ms index_ms chunks_ms chunk_choose_ms chunk_attend_ms"
        assert all(row[name] > 0 for name in ours.split())
        pairs = row["kept"] * 4 * 1024 * 1025 / 2
        assert row["ours_tflops"] == pytest.approx(4 * 64 * pairs / row["ours_ms"] / 1e9, rel=1e-3)


def test_a_missing_peer_is_null_and_its_reason_on_record(result):
    for case, row in zip(TINY, result["rows"], strict=True):
        assert {row[name] for name in row if name.startswith(("mi_", "fa2_", "fa3_"))} == {None}
        for peer in PEERS:
            missing = result["settings"]["missing"][peer]
            assert missing[str(case) if not peer.startswith("fa3") else case.prompt] == "the smoke test runs no peers"


def test_a_wrong_output_of_ours_stops_the_benchmark(monkeypatch):
    case = TINY[0]
    monkeypatch.setattr(chunks, "our_error", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="our output"):
        attention.measure_ours(case, make_inputs(case, CPU, 0), Sets.draw(case, 30, CPU, 1), "reference")


# chunks


class Served(NamedTuple):
    """What a chunk attended to and gave."""

    context_len: int
    index: BandIndex
    out: torch.Tensor


def serve(case: Case, monkeypatch, shift: int = 0) -> tuple[float, list[Served]]:
    """chunks_ms where the n-th timed call takes 10**n ms, and what those calls did.

    Args:
        shift: added to the context that the attending kernel is told.
    """
    calls, timed = [], []

    def shifted(chunk, method, layer, chooser):
        index = chooser(method, chunk, layer)
        told = replace(chunk, context_len=max(chunk.context_len + shift, 0))
        ops.attend(told, index, layer.attend, method.kernel)
        copied = BandIndex(*(getattr(index, part.name).clone() for part in fields(index)))
        calls.append(Served(chunk.context_len, copied, chunk.out.clone()))
        return index

    def median(call, device):
        call()
        timed.append(calls[-1])
        return 10.0 ** (len(timed) - 1)

    monkeypatch.setattr(chunks, "prefill", shifted)
    monkeypatch.setattr(chunks, "median", median)
    found = chunks.time_chunks(case, make_inputs(case, CPU, 0), "reference", 7)
    return found["chunks_ms"], timed


@pytest.mark.parametrize("chunk", [512, 256, 384])
def test_the_chunks_make_up_the_prompt(monkeypatch, chunk):
    monkeypatch.setattr(cases, "CHUNK", chunk)
    case = Case(1024, 1024, 1024, 4, 2, 64)  # a budget that keeps everything
    ms, served = serve(case, monkeypatch)
    num_chunks = -(-1024 // chunk)
    assert ms == sum(10**n for n in range(num_chunks))
    assert [one.context_len for one in served] == list(range(0, 1024, chunk))
    inputs = make_inputs(case, CPU, 0)
    k, v = (cache.repeat_interleave(2, 0) for cache in gather(inputs.kv, 1024))
    expected = torch.nn.functional.scaled_dot_product_attention(inputs.q.transpose(0, 1), k, v, is_causal=True)
    assert peers.difference(torch.cat([one.out for one in served]), expected.transpose(0, 1)) < 1e-2


@pytest.mark.parametrize("case", TINY)
def test_each_chunk_attends_to_the_sets_drawn_for_its_end(monkeypatch, case):
    _, served = serve(case, monkeypatch)
    method = VerticalSlash(configure(case, "reference").method, Kernel.REFERENCE)
    for chunk, end in zip(served, (512, 1024), strict=True):
        state = make_state(method, case.scratch(case.chunk), CPU)
        KeySets(7).overwrite(state.buffers.probe, end, method.settings)
        assert torch.equal(chunk.index.columns, Sets.chosen(state.buffers.probe.vertical[:, :end]))
        expected = method.index_masses(end, state.budgets, state.buffers)
        for head, half in itertools.product(range(case.num_qo_heads), range(HALVES)):
            kept, drawn = (kept_before(index, head, end // TILE - 1, half) for index in (chunk.index, expected))
            assert torch.equal(kept, drawn)


@pytest.mark.parametrize("case", [*TINY, *CASES], ids=str)
def test_the_sets_of_the_shortest_chunk_meet_the_budgets(case):
    settings = configure(case, "reference").method
    probe = ProbeBuffers.allocate(2, 64, case.chunk, CPU)
    KeySets(7).overwrite(probe, case.chunk, settings)
    assert Sets.chosen(probe.vertical).shape == (2, case.vertical)
    slash = Sets.chosen(probe.slash)
    assert slash.shape == (2, case.slash)
    # What the selection adds by force is drawn anyway.
    assert (slash[:, : settings.local_tokens] == torch.arange(settings.local_tokens)).all()


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 15, 16, 17, 30, 31, 64, 1000])
def test_of_many_chunks_some_stand_for_all(num_chunks):
    timed = chunks.timed_chunks(num_chunks)
    assert timed[0] == 0 and timed[-1] == num_chunks - 1 and timed == sorted(set(timed))
    assert len(timed) == num_chunks if num_chunks <= chunks.MOST_TIMED else 8 < len(timed) <= chunks.MOST_TIMED
    # The first costs less than the line through the others says.
    times = [1.0] + [5.0 + 0.25 * number for number in range(1, num_chunks)]
    assert chunks.total_ms(num_chunks, timed, [times[number] for number in timed]) == pytest.approx(sum(times))


def test_a_chunk_with_a_wrong_context_stops_the_benchmark(monkeypatch):
    with pytest.raises(SystemExit, match="our output of rows 512 to 1023"):
        serve(TINY[0], monkeypatch, shift=-128)


def test_chunks_that_fail_are_null_and_the_reason_on_record(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(attention, "time_chunks", fail)
    bench = attention.Bench(MInference(None), tiny=True)
    found = bench.chunks(TINY[0], make_inputs(TINY[0], CPU, 0), "reference", 0)
    assert attention.make_row(TINY[0], found)["chunks_ms"] is None
    assert bench.missing == {"chunks": {str(TINY[0]): "OutOfMemoryError: no memory"}}


# sets


@pytest.mark.parametrize("case", [*TINY, Case(32768, 1000, 6096, 2, 1)])
def test_sets_meet_the_budgets_and_the_forced_entries_lie_within_them(case):
    settings, sets = configure(case, "reference").method, Sets.draw(case, 30, CPU, 1)
    vertical, slash = Sets.chosen(sets.vertical), Sets.chosen(sets.slash)
    assert vertical.shape == (case.num_qo_heads, case.vertical) and slash.shape == (case.num_qo_heads, case.slash)
    assert (vertical.diff() > 0).all() and (slash.diff() > 0).all() and slash.dtype == torch.int32
    forced = torch.arange(max(settings.sink_tokens, settings.local_tokens), dtype=torch.int32)
    assert (vertical[:, : settings.sink_tokens] == forced[: settings.sink_tokens]).all()
    assert (slash[:, : settings.local_tokens] == forced[: settings.local_tokens]).all()


# peers


def peer_index(num_tiles: int, blocks: list[list[int]], columns: list[list[int]]) -> PeerIndex:
    """One head's index, from the kept blocks and columns of each tile."""
    count = [torch.tensor([[[len(tile) for tile in kept]]], dtype=torch.int32) for kept in (blocks, columns)]
    padded = [
        torch.tensor([[[tile + [0] * (num_tiles - len(tile)) for tile in kept]]], dtype=torch.int32)
        for kept in (blocks, columns)
    ]
    return PeerIndex(count[0], padded[0], count[1], padded[1])


def test_pairs_of_64_x_64_tiles_are_counted_without_the_future():
    index = peer_index(3, [[0], [20, 84], [100, 164]], [[], [3], [0, 7, 9]])
    for tile in range(3):
        assert len(index.keys(0, tile * BLOCK)) == len(set(index.keys(0, tile * BLOCK).tolist()))
    rows = torch.arange(3 * BLOCK)
    expected = sum(int((index.keys(0, int(row) // BLOCK * BLOCK) <= row).sum()) for row in rows)
    assert index.kept_pairs() == expected


def test_other_pages_hold_the_same_keys():
    inputs = make_inputs(TINY[0], CPU, 0)
    for before, after in zip(gather(inputs.kv, 1024), gather(peers.repaged(inputs.kv, 1024, 128), 1024), strict=True):
        assert torch.equal(before, after)


def test_the_check_of_a_peer_sees_its_keys_and_no_future():
    inputs = make_inputs(Case(256, 1, 1, 4, 2, 64), CPU, 0)
    k, v = (cache.repeat_interleave(2, 0) for cache in gather(inputs.kv, 256))
    q = inputs.q.transpose(0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    beyond = torch.arange(320)
    assert peers.relative_error(out, inputs, peers.every_key(inputs)) < 1e-2
    assert peers.relative_error(out, inputs, lambda head, first: beyond) < 1e-2
    assert peers.relative_error(out, inputs, lambda head, first: beyond[beyond != 5]) > 1e-2
    out[255, 3] = torch.nan
    assert not peers.relative_error(out, inputs, peers.every_key(inputs)) <= 1e-2


def test_the_reason_of_a_peer_that_fails_is_kept():
    bench = attention.Bench(MInference(None), tiny=False)
    assert bench.attempt("a", "case", lambda: torch.zeros(2).view(3)) is None
    assert bench.missing["a"]["case"].startswith("RuntimeError: shape")
    sets = Sets.draw(TINY[0], 30, CPU, 1)
    found = bench.sparse(TINY[0], make_inputs(TINY[0], CPU, 0), sets, torch.empty(0))
    assert found == {} and bench.missing["mi_index"] == {str(TINY[0]): "--minference-sdist was not given"}
    assert set(bench.missing) == {"a", "mi_index", "mi_triton", "fa2_sparse"}


def test_the_index_of_the_sdist_is_refused_where_it_overflows():
    with pytest.raises(PeerMissing, match="32 bits"):
        MInference(None).index(torch.empty(32, 1), torch.empty(32, 6096), 1048576)


def test_only_the_kernel_and_its_launcher_are_compiled():
    source = (
        "#include <pybind11/stl.h>\n#include <torch/extension.h>\n#include <cuda.h>\n"
        "void convert_vertical_slash_indexes_64x64(\n    int a) {}\n\nstd::vector<at::Tensor> f(int a) {}\n"
    )
    kept = minference_sdist.without_binding(source)
    launcher = 'extern "C" void convert_vertical_slash_indexes_64x64( int a) {}'
    assert " ".join(kept.split()) == f"#include <cuda.h> {launcher}"
    with pytest.raises(PeerMissing, match="not that of"):
        minference_sdist.without_binding("another file")
