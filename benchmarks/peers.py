# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels that benchmarks.attention measures beside ours, and what all peers share: inputs, index, a check.

The sparse peers, this FlashAttention-2 kernel and MInference's (minference_sdist.py), keep tiles of 64 x 64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.cases import Inputs
from minference_vllm.chunk import PagedKV
from minference_vllm.reference.pages import gather

BLOCK = 64
"""Rows, and keys, of a tile of the sparse peers."""

SAMPLED_TILES = 4

Attention = Callable[[], torch.Tensor]
"""One call of a kernel: [tokens, num_qo_heads, head_dim]."""


class PeerMissing(RuntimeError):
    """A peer cannot run here; the message says why."""


class PeerIndex(NamedTuple):
    """What a sparse peer keeps of one prompt, by rows of BLOCK.

    Attributes:
        block_count: [1, num_qo_heads, num_tiles] int32.
        block_offset: [1, num_qo_heads, num_tiles, num_slashes] int32, first key of each kept block.
        column_count: [1, num_qo_heads, num_tiles] int32.
        column_index: [1, num_qo_heads, num_tiles, num_verticals] int32, kept keys that lie in no block.
    """

    block_count: torch.Tensor
    block_offset: torch.Tensor
    column_count: torch.Tensor
    column_index: torch.Tensor

    def keys(self, head: int, first: int) -> torch.Tensor:
        """[num_kept] int64: keys kept for the tile that starts at row `first`; the kernel masks future ones."""
        tile = first // BLOCK
        blocks = self.block_offset[0, head, tile, : self.block_count[0, head, tile]].long()
        columns = self.column_index[0, head, tile, : self.column_count[0, head, tile]].long()
        return torch.cat([(blocks[:, None] + torch.arange(BLOCK, device=blocks.device)).flatten(), columns])

    def kept_pairs(self) -> int:
        """Row-key pairs that are attended to, without future keys."""
        num_heads, num_tiles = self.block_count.shape[1:]
        device = self.block_count.device
        distance = torch.arange(-BLOCK, BLOCK, device=device)
        # [2 * BLOCK]: pairs of a tile and a block that starts `distance` keys, or more, before it.
        pairs = (distance[:, None] + torch.arange(1, BLOCK + 1, device=device)).clamp(0, BLOCK).sum(1)
        first = torch.arange(num_tiles, device=device)[:, None] * BLOCK
        total = self.column_count.sum() * BLOCK
        most = int(self.block_count.max())
        for head in range(num_heads):  # one at a time, because the offsets of all heads take gigabytes
            offset = self.block_offset[0, head, :, :most]
            valid = torch.arange(most, device=device) < self.block_count[0, head, :, None]
            total += (pairs[(first - offset).clamp(-BLOCK, BLOCK - 1) + BLOCK] * valid).sum()
        return int(total)


def fa3_contiguous(inputs: Inputs) -> Attention:
    """FlashAttention-3 on keys and values that lie one after the other."""
    k, v = (cache.transpose(0, 1).contiguous() for cache in gather(inputs.kv, len(inputs.q)))
    return _fa3(inputs, k, v, len(inputs.q), cu_seqlens_k=int32(inputs, 0, len(inputs.q)))


def fa3_paged(inputs: Inputs, tokens: int | None = None) -> Attention:
    """FlashAttention-3 as vLLM calls it, on the same pages as ours. With `tokens`, queries are the last of so many."""
    kv, tokens = inputs.kv, tokens or len(inputs.q)
    # [num_pages, page_size, num_kv_heads, head_dim]
    k, v = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
    return _fa3(inputs, k, v, tokens, seqused_k=int32(inputs, tokens), block_table=kv.block_table)


def fa3_paged128(inputs: Inputs) -> Attention:
    """FlashAttention-3 on pages large enough for its TMA loads."""
    return fa3_paged(inputs._replace(kv=repaged(inputs.kv, len(inputs.q), 128)))


def repaged(kv: PagedKV, tokens: int, page_size: int) -> PagedKV:
    """The same keys and values in pages of another size, in random order; `tokens` must be a multiple of that size."""
    num_kv_heads, head_dim = kv.k.shape[1], kv.k.shape[3]
    table = torch.randperm(tokens // page_size, device=kv.k.device)
    cache = torch.empty(len(table), page_size, num_kv_heads, 2 * head_dim, dtype=kv.k.dtype, device=kv.k.device)
    for half, source in zip(cache.split(head_dim, dim=-1), gather(kv, tokens), strict=True):
        half[table] = source.transpose(0, 1).unflatten(0, (-1, page_size))
    k, v = cache.transpose(1, 2).split(head_dim, dim=-1)
    return PagedKV(k, v, table.int()[None], 0)


def fa2_sparse(inputs: Inputs, index: PeerIndex) -> Attention:
    """vLLM's vertical-slash kernel of FlashAttention-2, which takes grouped heads without repeating them."""
    from vllm.vllm_flash_attn import flash_attn_interface as interface

    if not interface.FA2_AVAILABLE:
        raise PeerMissing(f"vLLM's FlashAttention-2 does not load: {interface.FA2_UNAVAILABLE_REASON}")
    if inputs.q.shape[2] != 128:
        raise PeerMissing("vLLM builds its vertical-slash kernel for head_dim 128 only")
    k, v = (cache.transpose(0, 1).contiguous()[None] for cache in gather(inputs.kv, len(inputs.q)))
    q = inputs.q.contiguous()[None]
    return lambda: interface.sparse_attn_func(q, k, v, *index, softmax_scale=inputs.scale, causal=True)[0]


def every_key(inputs: Inputs) -> Callable[[int, int], torch.Tensor]:
    """The keys that a dense kernel keeps, in the form that relative_error takes."""
    return lambda head, first: torch.arange(first + BLOCK, device=inputs.q.device)


def relative_error(out: torch.Tensor, inputs: Inputs, keys: Callable[[int, int], torch.Tensor]) -> float:
    """Largest relative error over a few tiles and heads, against exact attention.

    Args:
        out: [tokens, num_qo_heads, head_dim].
        inputs: what it was computed from.
        keys: gives the kept keys of a head, for the tile that starts at a row; future keys are ignored.
    """
    k, v = gather(inputs.kv, len(inputs.q))
    errors = []
    for head in sampled_heads(inputs.q):
        of_group = head // (inputs.q.shape[1] // len(k))
        for first in sampled_rows(len(inputs.q), BLOCK):
            kept = keys(head, first)
            rows = torch.arange(first, first + BLOCK, device=kept.device)
            future = kept > rows[:, None]
            kept = kept.clamp(max=len(inputs.q) - 1)
            scores = inputs.q[rows, head].float() @ k[of_group, kept].float().T * inputs.scale
            expected = scores.masked_fill_(future, -torch.inf).softmax(-1) @ v[of_group, kept].float()
            errors.append(difference(out[rows, head], expected))
    return worst(errors)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of b; NaN if one of the values is NaN."""
    a, b = a.float(), b.float()
    return float((a - b).norm() / b.norm())


def worst(errors: list[float]) -> float:
    """The largest error; NaN if one is NaN, which max() may pass over."""
    return float(torch.tensor(errors).max())


def sampled_heads(q: torch.Tensor) -> tuple[int, int]:
    """Two query heads of different KV heads."""
    return 1, q.shape[1] - 1


def sampled_rows(tokens: int, tile: int) -> list[int]:
    """First rows of a few tiles, from the first tile to the last whole one."""
    last = tokens // tile - 1
    return [last * i // (SAMPLED_TILES - 1) * tile for i in range(SAMPLED_TILES)]


def _fa3(inputs: Inputs, k: torch.Tensor, v: torch.Tensor, tokens: int, **lengths: torch.Tensor) -> Attention:
    from vllm.vllm_flash_attn import flash_attn_interface as interface

    if not interface.FA3_AVAILABLE:
        raise PeerMissing(f"vLLM's FlashAttention-3 does not load: {interface.FA3_UNAVAILABLE_REASON}")
    rows, start = len(inputs.q), int32(inputs, 0, len(inputs.q))
    more = lengths if inputs.q_scale is None else {**lengths, **_fp8_arguments(inputs, inputs.q_scale)}
    return lambda: interface.flash_attn_varlen_func(
        inputs.q, k, v, rows, start, tokens, softmax_scale=inputs.scale, causal=True, fa_version=3, **more
    )


def _fp8_arguments(inputs: Inputs, q_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arguments for FP8 as vLLM passes them: an output in the model's dtype, and scales by request and KV head."""
    kv = inputs.kv
    assert kv.k_scale is not None
    assert kv.v_scale is not None
    return {
        "out": torch.empty_like(inputs.q, dtype=torch.bfloat16),
        "q_descale": q_scale[None], "k_descale": kv.k_scale[None], "v_descale": kv.v_scale[None],
    }  # fmt: skip


def int32(inputs: Inputs, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=inputs.q.device)
