# SPDX-License-Identifier: Apache-2.0
"""Arguments that all kernels which read the cache have in common."""

from typing import Any

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk, PagedKV

LOG2_E = 1.4426950408889634


def kv_strides(kv: PagedKV) -> tuple[int, int, int]:
    """Strides of page, KV head and token, the same for k and v.

    The stride of a dimension of size 1 is arbitrary (one KV head under tensor parallelism). It is replaced by 0, so
    that a meaningless number, above all 1, does not make Triton compile another variant.
    """
    page, head, token, _ = kv.k.stride()
    return page, head if kv.num_kv_heads > 1 else 0, token


# The scales of FP8 are tensors. Neither their alignment nor their stride (0 if one scale serves all heads) must select
# another compiled variant.
SCALES = ["q_scale_ptr", "k_scale_ptr", "v_scale_ptr"]
SCALE_STRIDES = ["stride_q_scale", "stride_k_scale", "stride_v_scale"]


def score_scales(chunk: Chunk) -> tuple[Any, ...]:
    """Scales of queries and keys, each with its stride from KV head to KV head; None for what has no scale."""
    return *_described(chunk.q_scale), *_described(chunk.kv.k_scale)


def all_scales(chunk: Chunk) -> tuple[Any, ...]:
    """Scales of queries, keys and values, see score_scales."""
    return *score_scales(chunk), *_described(chunk.kv.v_scale)


def _described(scale: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if scale is None else (scale, scale.stride(0))


@triton.jit
def scaled(x, scale_ptr, stride, i_kv):
    """`x`, a number or a block, times the scale of a KV head; without scales as it is."""
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + i_kv * stride)
    return x


@triton.jit
def scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv):
    """The scale of products of stored queries and keys."""
    return scaled(scaled(scale_log2, q_scale_ptr, stride_q_scale, i_kv), k_scale_ptr, stride_k_scale, i_kv)
