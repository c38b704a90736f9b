# SPDX-License-Identifier: Apache-2.0
"""Lists that benchmarks.record records are those that were chosen, and carried over they look where they looked."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import block, block_cases, record, results
from benchmarks.cases import Case as Shape
from benchmarks.cases import make_inputs
from benchmarks.lists import FIRST_GROUPS, Lists, kept_share
from minference_vllm.attention import prefill
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUPS_PER_TILE, TILE, TileIndex
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_by_tile
from minference_vllm.scratch import ScratchShape
from minference_vllm.tuning.timing import make_state

CPU = torch.device("cpu")
HEADS, TOKENS, CHUNK, ROWS, LAYERS = (4, 2, 64), 1024, 384, 512, (1, 3)
RUN = {"gpu": "a card", "commit": "abc", "command": "python -m it", "date": "2026-01-01"}
ABOUT = {"model": "m"}
SETTINGS = BlockSettings(share=0.3, sink_tokens=16, local_tokens=16)
SCALE = 0.5
"""Such that rows look at few keys: else a tile would keep all groups. For the same reason all rows of a tile are alike,
so that they look at the same ones."""


def chosen(rows_per_list: int = 128) -> tuple[Lists, dict[int, TileIndex]]:
    """What is recorded of a prompt in chunks, and each layer's choice for its last chunk."""
    method = Block(SETTINGS.model_copy(update={"rows_per_list": rows_per_list}), Kernel.REFERENCE)
    recorder, last = record.Recorder(LAYERS), {}
    for position in range(5):
        inputs = make_inputs(Shape(TOKENS, 1, 1, *HEADS), CPU, position)
        shape = ScratchShape(*HEADS, torch.bfloat16, TOKENS, CHUNK)
        state = replace(make_state(method, shape, CPU, measures=False), position=position)
        alike = inputs.q[::TILE].repeat_interleave(TILE, 0)
        for start in range(0, TOKENS, CHUNK):
            q = alike[start : start + CHUNK]
            chunk = Chunk(q, torch.empty_like(q), inputs.kv, start, SCALE, may_end_prompt=len(q) < CHUNK)
            index = prefill(chunk, method, state, recorder)
        assert isinstance(index, TileIndex)
        last[position] = TileIndex(index.groups.clone(), index.counts.clone())
    return recorder.lists(ROWS, ABOUT), last


@pytest.mark.parametrize("rows_per_list", [64, 128])
def test_what_is_recorded_is_what_was_chosen(rows_per_list: int, tmp_path: Path) -> None:
    recorded, last = chosen(rows_per_list)
    recorded.save(tmp_path / "new" / "lists.npz")
    lists = Lists.load(tmp_path / "new" / "lists.npz")
    assert (lists.first_tile, lists.num_tiles) == (TOKENS // TILE - ROWS // TILE, ROWS // TILE)
    assert lists.about == {**ABOUT, "layers": list(LAYERS), "num_kv_heads": 2, "head_dim": 64}
    tiles = TOKENS % CHUNK // TILE
    for number, position in enumerate(LAYERS):
        ours, theirs = lists.of_layer(number), last[position]
        assert torch.equal(ours.counts[:, -tiles:], theirs.counts)
        for head in range(HEADS[0]):
            for tile in range(TOKENS // TILE - tiles, TOKENS // TILE):
                for half in range(2):
                    of_chunk = kept_by_tile(theirs, head, tile, half, TOKENS // TILE - tiles)
                    assert torch.equal(kept_by_tile(ours, head, tile, half, lists.first_tile), of_chunk)
    assert (lists.counts[:, :, -1, 0] == EVERY_GROUP).all()
    assert (lists.counts[:, :, :-1, 0] != EVERY_GROUP).float().mean() > 0.5
    assert (lists.counts[..., 1:] > 0).any() == (rows_per_list == 64)


def test_rows_that_ran_dense_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not all of the last 128 rows ran sparse"):
        record.Recorder([0, 1]).lists(128, {})
    (tmp_path / "x").write_text("lists")
    with pytest.raises(SystemExit, match="x holds no lists"):
        Lists.load(tmp_path / "x")


@pytest.mark.parametrize(("layers", "count", "positions"), [(24, 4, [3, 9, 15, 21]), (3, 4, [0, 1, 2]), (1, 1, [0])])
def test_layers_are_spread(layers: int, count: int, positions: list[int]) -> None:
    assert record.spread(layers, count) == positions


def made_up() -> Lists:
    """One layer, one KV head, two heads, two tiles after 16, and a third that keeps all."""
    first_tile, of = 16, [[0, 2, 60, 125], [1, 7, 127]]
    groups, counts = torch.zeros(1, 2, 3, 4, dtype=torch.int32), torch.zeros(1, 2, 3, 3, dtype=torch.int32)
    for tile in range(2):
        for head, listed in enumerate(of):
            moved = [group + (GROUPS_PER_TILE * tile if group >= FIRST_GROUPS else 0) for group in listed]
            groups[0, head, tile, : len(moved)] = torch.tensor(moved)
            counts[0, head, tile, 0] = len(moved)
    counts[0, :, 2, 0] = EVERY_GROUP
    return Lists(groups, counts, first_tile, {"num_kv_heads": 1, "head_dim": 64, "layers": [0]})


@pytest.mark.parametrize("repeats", [False, True])
def test_carried_lists_keep_distances_and_the_first_groups(repeats: bool) -> None:
    index, before = made_up().carried(64, 5, (4, 2), repeats), 64 * GROUPS_PER_TILE
    assert index.counts[:, :, 0].tolist() == [index.counts[head % 2, :, 0].tolist() for head in range(4)]
    assert index.counts[:, -1, 0].tolist() == [EVERY_GROUP] * 4
    for tile, moved in enumerate(range(0, 4 * GROUPS_PER_TILE, GROUPS_PER_TILE)):
        for head, first, near in ((0, [0, 2], [68, 3]), (1, [1], [121, 1])):
            kept = index.groups[head, tile, : index.counts[head, tile, 0]].tolist()
            last = before + moved
            length = (16 + tile % 2) * GROUPS_PER_TILE - FIRST_GROUPS
            expected = {last - distance for distance in near}
            if repeats:
                expected = {at - length * times for at in expected for times in range(20)}
            assert kept == sorted({*first} | {at for at in expected if at >= FIRST_GROUPS})
    share = kept_share(index, 64)
    assert share == pytest.approx(0.2 + 0.8 * (3.5 / 128 if repeats else 3.5 / 512), rel=0.2)


def test_halves_stay_apart() -> None:
    lists = chosen(64)[0]
    index = lists.carried(12, 4, (8, 4), repeats=True)
    # The KV heads of both layers, one after the other; three tiles choose.
    assert torch.equal(index.counts[2, :3, 0] == EVERY_GROUP, lists.counts[0, 2, :3, 0] == EVERY_GROUP)
    for head, tile, half in ((0, 12, 0), (3, 13, 1), (5, 14, 1)):
        kept = kept_by_tile(index, head, tile, half, 12)
        assert len(kept) == len(kept.unique()) and (kept < tile * TILE).all()


def test_the_benchmark_attends_to_recorded_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen()[0].save(tmp_path / "lists.npz")
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["block", "--tiny", "--lists", "lists.npz", "--out", "out.json"])
    block.main()
    written: dict[str, Any] = json.loads(Path("out.json").read_text())
    rows = written["rows"]
    names = ["captured, layer 1", "captured, layer 3", block_cases.SHIFTED, block_cases.REPEATED]
    assert [row["lists"] for row in rows] == names
    assert [row["tokens"] for row in rows] == [TOKENS, TOKENS, 2048, 2048]
    assert rows[2]["density"] < rows[3]["density"] <= 1
    assert written["settings"]["recorded"]["layers"] == list(LAYERS)
