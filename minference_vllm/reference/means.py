# SPDX-License-Identifier: Apache-2.0
"""Means of consecutive keys."""

import torch

from minference_vllm.chunk import PagedKV
from minference_vllm.reference.operands import from_operand, to_operand
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import CENTRE_END, CENTRE_START, MEAN


def key_means(kv: PagedKV, seq_len: int, means: torch.Tensor, mean: int = MEAN) -> None:
    """Average every `mean` keys, from absolute position 0 on, and subtract the request's centre from each average.

    The centre is the mean of keys CENTRE_START .. CENTRE_END. A vector that all keys of a head share adds the same to
    all scores of a row, and the row's normaliser takes it away again. But rounding adds an error in proportion to the
    vector's size, and in some models (Qwen2.5) biases of keys are tens of times as large as what tells keys apart. They
    are added before RoPE, so what is left of them grows with a key's position. SageAttention (arXiv 2410.02367, section
    4.2) smooths keys for the same reason.

    Keys are taken as they are stored: the scale of FP8 keys is not applied.

    Args:
        kv: the request's cache.
        seq_len: keys of the request in the cache; if fewer than `mean` are left over at the end, they get no mean. From
            the means of fewer than CENTRE_END keys nothing is subtracted.
        means: [num_kv_heads, >= seq_len // mean, head_dim], in the model's dtype or FP8, see operands.to_operand;
            the first seq_len // mean entries are written, computed in float32 and rounded once.
        mean: keys in a mean.
    """
    count = seq_len // mean
    if count:
        keys, _ = gather(kv, count * mean)
        averages = keys.float().unflatten(1, (-1, mean)).mean(2)
        if count * mean >= CENTRE_END:
            averages -= keys[:, CENTRE_START:CENTRE_END].float().mean(1, keepdim=True)
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
