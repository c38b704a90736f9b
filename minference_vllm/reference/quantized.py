# SPDX-License-Identifier: Apache-2.0
"""The numbers that a chunk's queries, keys and values stand for, in whatever dtype they are stored."""

import torch

from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import FP8_MAX


def keys_and_values(kv: PagedKV, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's first `seq_len` keys and values, [num_kv_heads, seq_len, head_dim] float32 each."""
    k, v = gather(kv, seq_len)
    return _scaled(k, kv.k_scale), _scaled(v, kv.v_scale)


def queries(chunk: Chunk, rows: slice | torch.Tensor, head: int) -> torch.Tensor:
    """Rows of a chunk under one head, [rows, head_dim] float32."""
    q = chunk.q[rows, head].float()
    return q if chunk.q_scale is None else q * chunk.q_scale[head // chunk.group_size]


def score_scales(chunk: Chunk) -> torch.Tensor:
    """[num_qo_heads] float32, the factors that make scores of products of stored queries and keys."""
    scales = torch.full((chunk.kv.num_kv_heads,), chunk.scale, dtype=torch.float32, device=chunk.q.device)
    for of_stored in (chunk.q_scale, chunk.kv.k_scale):
        if of_stored is not None:
            scales = scales * of_stored
    return scales.repeat_interleave(chunk.group_size)


def to_stored(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values, [num_tokens, num_kv_heads, head_dim], as a cache in FP8 keeps them; see PagedKV for the scale."""
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _scaled(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return stored.float() if scale is None else stored.float() * scale[:, None, None]
