# SPDX-License-Identifier: Apache-2.0
"""What every kernel that reads the cache is launched with."""

from minference_vllm.chunk import PagedKV

LOG2_E = 1.4426950408889634


def kv_strides(kv: PagedKV) -> tuple[int, int, int]:
    """Strides of page, KV head and token, the same for k and v.

    The stride of a dimension of size 1 is arbitrary (one KV head under tensor parallelism): 0 stands for it, lest a
    meaningless number, 1 above all, select another compiled variant.
    """
    page, head, token, _ = kv.k.stride()
    return page, head if kv.num_kv_heads > 1 else 0, token
