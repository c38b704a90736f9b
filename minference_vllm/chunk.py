# SPDX-License-Identifier: Apache-2.0
"""One request's rows of a step, and its keys and values as they lie in vLLM's cache."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from minference_vllm.index import BAND, TILE

FP8 = torch.float8_e4m3fn
"""The dtype of a quantized cache and of the queries that come with it. Means of keys may be stored in it too."""

SINK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that learned sinks may have."""


class PagedKV(NamedTuple):
    """One request's keys and values in vLLM's paged cache.

    Attributes:
        k, v: [num_pages, num_kv_heads, page_size, head_dim], any strides but the last, which is 1.
        block_table: [num_reqs, max_pages] int32: entry j of a row is the page of the request's keys from j * page_size
            on.
        row: which row of block_table is this request's.
        k_scale, v_scale: [num_kv_heads] float32, any stride, what each head's FP8 keys and values are multiplied by;
            None if the cache is in the model's dtype.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    row: int
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's query rows of this step in one layer, and all that attending to them needs.

    Attributes:
        q: [num_rows, num_qo_heads, head_dim], any strides but the last, which is 1; FP8 only over a cache in FP8.
        out: [num_rows, num_qo_heads, head_dim], in the model's dtype, written by attention.
        kv: the request's cache, the chunk's own keys already in it.
        context_len: keys before the chunk.
        scale: softmax scale.
        q_scale: [num_kv_heads] float32, any stride, what FP8 queries of each KV head's query heads are multiplied by;
            None if q is in the model's dtype.
        sinks: [num_qo_heads], stride 1, a learned score of each query head that joins its rows' softmax and brings no
            value (gpt-oss); None if the layer has none. Not to be confused with a method's sink tokens, the prompt's
            first keys.
        may_end_prompt: whether this may be the last chunk of the request's prompt.

    Raises:
        ValueError: a kernel would read or write such tensors wrongly.
    """

    q: torch.Tensor
    out: torch.Tensor
    kv: PagedKV
    context_len: int
    scale: float
    q_scale: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    may_end_prompt: bool = True

    def __post_init__(self) -> None:
        q, out, (k, v, table, row, _, _) = self.q, self.out, self.kv
        if q.stride(2) != 1 or out.stride(2) != 1:
            raise ValueError(f"q and out must end in stride 1, got {q.stride()} and {out.stride()}")
        if q.shape != out.shape:
            raise ValueError(f"q is {tuple(q.shape)}, out {tuple(out.shape)}: both must be alike")
        if table.dtype != torch.int32 or table.stride(1) != 1 or not 0 <= row < len(table):
            raise ValueError(
                f"block_table must be int32 with stride 1 along a request, and hold row {row}; "
                f"got {table.dtype} {tuple(table.shape)} with strides {table.stride()}"
            )
        if k.stride() != v.stride() or k.stride(3) != 1:
            raise ValueError(
                f"k and v must share strides and end in 1, got {k.stride()} and {v.stride()}; "
                "pass the two halves of one cache tensor"
            )
        if k.shape[2] % BAND or q.shape[1] % k.shape[1]:
            raise ValueError(
                f"pages of {k.shape[2]} keys must be multiples of {BAND}, and {q.shape[1]} query heads of "
                f"{k.shape[1]} KV heads"
            )
        self._check_dtypes()
        self._check_sinks()

    def _check_dtypes(self) -> None:
        kv = self.kv
        for name, tensor, scale in (("q", self.q, self.q_scale), ("k", kv.k, kv.k_scale), ("v", kv.v, kv.v_scale)):
            if not tensor.dtype.is_floating_point or (tensor.dtype == FP8) is (scale is None):
                given = f"{name} is {tensor.dtype} {'without' if scale is None else 'with'} a scale"
                raise ValueError(f"{given}: {FP8} needs one, the model's dtype takes none, and no other dtype is read")
            if scale is not None and (scale.dtype != torch.float32 or scale.shape != (kv.num_kv_heads,)):
                raise ValueError(
                    f"{name}_scale must be float32, one for each of {kv.num_kv_heads} KV heads, "
                    f"got {scale.dtype} {tuple(scale.shape)}"
                )
        if self.q_scale is None and self.q.dtype != self.out.dtype:
            raise ValueError(f"q is {self.q.dtype}, out {self.out.dtype}: both must be alike")
        if self.q_scale is not None and (kv.k_scale is None or self.out.dtype == FP8):
            raise ValueError(f"k is {kv.k.dtype}, out {self.out.dtype}: under FP8 queries k must be {FP8}, and out not")

    def _check_sinks(self) -> None:
        sinks = self.sinks
        if sinks is None:
            return
        if sinks.shape != (self.num_qo_heads,) or sinks.stride(0) != 1 or sinks.dtype not in SINK_DTYPES:
            raise ValueError(
                f"sinks must be one number for each of {self.num_qo_heads} query heads, with stride 1, in "
                f"{', '.join(map(str, SINK_DTYPES))}; got {sinks.dtype} {tuple(sinks.shape)}, strides {sinks.stride()}"
            )

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are FP8. Queries may be FP8 too."""
        return self.kv.k_scale is not None

    def of_rows(self, first: int, count: int) -> "Chunk":
        """Consecutive rows of the chunk as a chunk of their own; the rows before them become part of its context."""
        if count == self.num_rows:
            return self
        end = first + count
        return replace(
            self,
            q=self.q[first:end],
            out=self.out[first:end],
            context_len=self.context_len + first,
            may_end_prompt=self.may_end_prompt and end == self.num_rows,
        )

    def of_heads(self, first: int, count: int) -> "Chunk":
        """The chunk for some of its query heads: all query heads of some KV heads, or some of those of one KV head."""
        if count == self.num_qo_heads:
            return self
        heads, kv = slice(first, first + count), self.kv
        kv_heads = slice(first // self.group_size, -(-(first + count) // self.group_size))
        k_scale, v_scale, q_scale = (
            scale if scale is None else scale[kv_heads] for scale in (kv.k_scale, kv.v_scale, self.q_scale)
        )
        kv = kv._replace(k=kv.k[:, kv_heads], v=kv.v[:, kv_heads], k_scale=k_scale, v_scale=v_scale)
        sinks = None if self.sinks is None else self.sinks[heads]
        return replace(self, q=self.q[:, heads], out=self.out[:, heads], kv=kv, q_scale=q_scale, sinks=sinks)

    @property
    def num_rows(self) -> int:
        return self.q.shape[0]

    @property
    def num_qo_heads(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.kv.num_kv_heads

    @property
    def seq_len(self) -> int:
        """Keys of the request, the chunk's own included."""
        return self.context_len + self.q.shape[0]

    @property
    def causal_pairs(self) -> int:
        """Row-key pairs of one head that dense causal attention would compute."""
        return self.num_rows * self.context_len + self.num_rows * (self.num_rows + 1) // 2

    @property
    def first_tile(self) -> int:
        """Number of the tile that holds the chunk's first row, counted from the request's first row."""
        return self.context_len // TILE

    @property
    def num_tiles(self) -> int:
        """How many tiles hold rows of the chunk."""
        return -(-self.seq_len // TILE) - self.first_tile if self.num_rows else 0
