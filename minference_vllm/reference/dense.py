# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention of one request's rows over its pages."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from minference_vllm.chunk import PagedKV
from minference_vllm.reference.pages import gather
from minference_vllm.reference.quantized import keys_and_values

ROWS_AT_ONCE = 1024


def dense(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    out: torch.Tensor,
    q_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend to every key up to the row's own.

    Args:
        q: [num_rows, num_qo_heads, head_dim].
        kv: the request's cache, the rows' own keys already in it.
        context_len: keys before the first row.
        scale: softmax scale.
        out: [num_rows, num_qo_heads, head_dim], written.
        q_scale, sinks: see Chunk.
    """
    seq_len = context_len + len(q)
    if kv.k_scale is None:
        keys, values = gather(kv, seq_len)
    else:
        (keys, values), q = keys_and_values(kv, seq_len), q.float()
    if q_scale is not None:
        q = q * q_scale.repeat_interleave(q.shape[1] // kv.num_kv_heads)[:, None]
    for start in range(0, len(q), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(q)))
        seen = context_len + rows.stop
        positions = torch.arange(context_len + rows.start, seen, device=q.device)
        mask = torch.arange(seen, device=q.device) <= positions[:, None]
        if sinks is not None:
            out[rows] = _beside_sinks(q[rows], keys[:, :seen], values[:, :seen], mask, scale, sinks)
            continue
        attended = scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            keys[None, :, :seen],
            values[None, :, :seen],
            attn_mask=None if rows.stop - rows.start == 1 else mask,
            scale=scale,
            enable_gqa=True,
        )
        out[rows] = attended[0].transpose(0, 1)


def _beside_sinks(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, sinks: torch.Tensor
) -> torch.Tensor:
    """Attention with sinks, which torch lacks: each head's sink joins the softmax as one more key, of value zero."""
    out = torch.empty_like(q, dtype=torch.float32)
    group_size = q.shape[1] // len(keys)
    for head in range(q.shape[1]):
        scores = (q[:, head].float() @ keys[head // group_size].float().T * scale).masked_fill_(~mask, -torch.inf)
        with_sink = torch.cat([scores, sinks[head].float().expand(len(q), 1)], dim=1)
        out[:, head] = with_sink.softmax(1)[:, :-1] @ values[head // group_size].float()
    return out
