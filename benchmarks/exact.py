# SPDX-License-Identifier: Apache-2.0
"""Exact attention of a batch in float32, straight from its definition: benchmarks.attention_suite compares with it."""

from typing import NamedTuple

import torch

from benchmarks.batches import KV_SCALES, Batch, Inputs, Shape
from minference_vllm.reference.quantized import to_stored


class Exact(NamedTuple):
    """Attention of a step's rows.

    Attributes:
        out: [num_rows, num_qo_heads, head_dim] float32.
        lse: [num_rows, num_qo_heads] float32, natural log-sum-exp of each row's scores.
        spread: [num_rows, num_qo_heads] float32, the largest difference between two numbers among a row's values.
    """

    out: torch.Tensor
    lse: torch.Tensor
    spread: torch.Tensor

    def moved(self, lse: torch.Tensor, rows: slice) -> torch.Tensor:
        """[rows, num_qo_heads, 1]: how far outputs of some rows may be from exact ones because keys were left out.

        An output is a weighted mean of values. If the share s of the weights is left out, the output moves by s times
        the difference between two means, that of the values kept and that of the values left out.

        Args:
            lse: [rows, num_qo_heads], of the rows' scores with kept keys.
        """
        lost = 1 - (lse - self.lse[rows]).exp()
        return (lost.clamp(min=0) * self.spread[rows])[..., None]


def attention(shape: Shape, batch: Batch, inputs: Inputs, has_fp8_queries: bool) -> Exact:
    """Exact attention on the numbers that the cache represents. Queries are in FP8 if the layer gets them so."""
    exact = Exact(
        torch.empty(inputs.q.shape, device=inputs.q.device),
        *torch.empty(2, *inputs.q.shape[:2], device=inputs.q.device),
    )
    q = as_stored(inputs.q, "_q_scale") if has_fp8_queries else inputs.q.float()
    for number, (request, rows) in enumerate(batch.spans()):
        k, v = inputs.k[number], inputs.v[number]
        k, v = (as_stored(k, "_k_scale"), as_stored(v, "_v_scale")) if shape.is_fp8 else (k.float(), v.float())
        keys = torch.arange(request.seq_len, device=q.device)
        future = keys > keys[request.context_len :, None]
        for head in range(shape.num_qo_heads):
            values = v[:, head // shape.group_size]
            scores = q[rows, head] @ k[:, head // shape.group_size].T * shape.head_dim**-0.5
            scores.masked_fill_(future, -torch.inf)
            exact.lse[rows, head] = scores.logsumexp(-1)
            exact.out[rows, head] = scores.softmax(-1) @ values
            exact.spread[rows, head] = values.max() - values.min()
    return exact


def as_stored(x: torch.Tensor, scale: str) -> torch.Tensor:
    """The numbers that remain of these after rounding to FP8 under the layer's scale of that name."""
    scales = torch.full((x.shape[1],), KV_SCALES[scale], device=x.device)
    return to_stored(x, scales).float() * KV_SCALES[scale]
