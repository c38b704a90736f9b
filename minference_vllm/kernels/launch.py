# SPDX-License-Identifier: Apache-2.0
"""What every kernel that reads the cache is launched with."""

from minference_vllm.index import PagedKV

LOG2_E = 1.4426950408889634


def kv_strides(kv: PagedKV) -> tuple[int, int, int]:
    """Strides of page, KV head and token, the same for k and v.

    The stride of a dimension of size 1 is arbitrary (one KV head under tensor parallelism): 0 stands for it, lest a
    meaningless number, 1 above all, select another compiled variant.
    """
    if kv.k.stride() != kv.v.stride() or kv.k.stride(3) != 1:
        raise ValueError(
            f"k and v must share strides and end in 1, got {kv.k.stride()} and {kv.v.stride()}; "
            "pass the two halves of one cache tensor"
        )
    page, head, token, _ = kv.k.stride()
    return page, head if kv.k.shape[1] > 1 else 0, token
