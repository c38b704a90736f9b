# SPDX-License-Identifier: Apache-2.0
"""Means of consecutive keys."""

import torch

from minference_vllm.chunk import PagedKV
from minference_vllm.reference.operands import from_operand, to_operand
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import MEAN


def key_means(kv: PagedKV, seq_len: int, means: torch.Tensor, mean: int = MEAN) -> None:
    """Average every `mean` keys, from absolute position 0 on, as they are stored: the scale of FP8 keys is not applied.

    Args:
        kv: the request's cache.
        seq_len: keys of the request in the cache; if fewer than `mean` are left over at the end, they get no mean.
        means: [num_kv_heads, >= seq_len // mean, head_dim], in the model's dtype or FP8, see operands.to_operand;
            the first seq_len // mean entries are written, computed in float32 and rounded once.
        mean: keys in a mean.
    """
    count = seq_len // mean
    if count:
        keys, _ = gather(kv, count * mean)
        averages = keys.float().unflatten(1, (-1, mean)).mean(2)
        means[:, :count] = to_operand(averages, means.dtype)


def coarse_means(means: torch.Tensor, seq_len: int, coarse: torch.Tensor, keys: int, coarse_keys: int) -> None:
    """Average means of `keys` keys to means of `coarse_keys`.

    Args:
        means: [num_kv_heads, >= seq_len // keys, head_dim].
        seq_len: keys of the request; if fewer than `coarse_keys` are left over at the end, they get no mean.
        coarse: [num_kv_heads, >= seq_len // coarse_keys, head_dim] of the same dtype, written.
    """
    count, each = seq_len // coarse_keys, coarse_keys // keys
    averages = from_operand(means[:, : count * each]).unflatten(1, (-1, each)).mean(2)
    coarse[:, :count] = to_operand(averages, coarse.dtype)
