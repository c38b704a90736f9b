# SPDX-License-Identifier: Apache-2.0
"""Reading a request's keys and values out of the paged cache."""

import torch

from minference_vllm.chunk import PagedKV


def gather(kv: PagedKV, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's first `seq_len` keys and values, [num_kv_heads, seq_len, head_dim] each, in the cache's dtype."""
    pages = kv.block_table[kv.row, : -(-seq_len // kv.page_size)].long()

    def rows(cache: torch.Tensor) -> torch.Tensor:
        # [pages, num_kv_heads, page_size, head_dim] -> [num_kv_heads, pages * page_size, head_dim]
        return cache[pages].transpose(0, 1).flatten(1, 2)[:, :seq_len]

    return rows(kv.k), rows(kv.v)
