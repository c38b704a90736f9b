# SPDX-License-Identifier: Apache-2.0
"""What the setting `debug` checks of each chunk; each check waits for the device."""

import torch

from minference_vllm.attention import Chooser, LayerState
from minference_vllm.chunk import Chunk
from minference_vllm.index import BANDS_PER_TILE, EVERY_GROUP, GROUPS_PER_TILE, TILE, BandIndex, SparseIndex, TileIndex
from minference_vllm.methods import Method
from minference_vllm.scratch import RecallBuffers


def checking(chooser: Chooser) -> Chooser:
    """The same chooser, with its index checked before keys are read: on a GPU a bad entry may crash the process."""

    def choose_checked(method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        index = chooser(method, chunk, layer)
        check_index(chunk, index, layer)
        return index

    return choose_checked


def check_index(chunk: Chunk, index: SparseIndex, layer: LayerState) -> None:
    """Check what a chunk is to attend to.

    Raises:
        RuntimeError: an entry points to where no key is, or entries are not in ascending order.
    """
    faults = _faults_of_bands(chunk, index) if isinstance(index, BandIndex) else _faults_of_groups(chunk, index)
    _refuse(faults, chunk, layer)


def check_output(chunk: Chunk, layer: LayerState) -> None:
    """Check the output, and the list of the heads that the guard made attend again.

    Raises:
        RuntimeError: the output is not finite, or the guard lists a head that does not exist, or one twice.
    """
    faults = [] if layer.guard is None else _faults_of_heads(chunk, layer.guard.buffers)
    if not chunk.out.isfinite().all():
        faults.append(f"the output holds NaN or infinity ({int((~chunk.out.isfinite()).sum())} elements)")
    if not layer.attend.lse[:, : chunk.num_rows].isfinite().all():
        faults.append("the log-sum-exp of a row is not finite")
    _refuse(faults, chunk, layer)


def _refuse(faults: list[str], chunk: Chunk, layer: LayerState) -> None:
    if faults:
        raise RuntimeError(
            f"MInference, debug: layer {layer.number}, {chunk.num_rows} rows after {chunk.context_len} keys: "
            f"{'; '.join(faults)}"
        )


def _faults_of_bands(chunk: Chunk, index: BandIndex) -> list[str]:
    faults = []
    last_tile = (chunk.seq_len - 1) // TILE
    for head in range(chunk.num_qo_heads):
        for kind in range(3):
            count = int(index.bands_indptr[head, kind, last_tile])
            if not _ascends(index.bands[head, kind, :count], 1, last_tile * BANDS_PER_TILE + 1):
                faults.append(f"head {head}: bands of kind {kind} are no ascending offsets before tile {last_tile}")
        count = int(index.columns_indptr[head, last_tile])
        if not _ascends(index.columns[head, :count], 0, chunk.seq_len):
            faults.append(f"head {head}: columns are no ascending keys below {chunk.seq_len}")
    return faults


def _faults_of_groups(chunk: Chunk, index: TileIndex) -> list[str]:
    faults = []
    for head in range(chunk.num_qo_heads):
        for tile, counts in enumerate(index.counts[head, : chunk.num_tiles].tolist()):
            if counts[0] == EVERY_GROUP:
                continue
            lists = index.groups[head, tile, : sum(counts)].split(counts)
            end = (chunk.first_tile + tile) * GROUPS_PER_TILE
            if not all(_ascends(groups, 0, end) for groups in lists):
                faults.append(f"head {head}, tile {tile} of the chunk: groups are not ascending below {end}")
    return faults


def _faults_of_heads(chunk: Chunk, recall: RecallBuffers) -> list[str]:
    """Faults in the list of the heads that the guard made attend to all keys."""
    heads = recall.heads[: int(recall.num_heads)].tolist()
    if len(set(heads)) == len(heads) and all(0 <= head < chunk.num_qo_heads for head in heads):
        return []
    return [f"the guard lists {int(recall.num_heads)} heads, {heads}, of {chunk.num_qo_heads}"]


def _ascends(entries: torch.Tensor, first: int, end: int) -> bool:
    """Whether entries rise strictly and lie in [first, end)."""
    if not len(entries):
        return True
    return bool(entries[0] >= first and entries[-1] < end and (entries.diff() > 0).all())
