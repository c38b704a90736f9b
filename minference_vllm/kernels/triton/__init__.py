# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: for every GPU and, under Triton's interpreter, for tests without one."""

from minference_vllm.kernels.triton.attend import attend
from minference_vllm.kernels.triton.attend_heads import attend_heads
from minference_vllm.kernels.triton.attend_tiles import attend_tiles
from minference_vllm.kernels.triton.bands import band_lists
from minference_vllm.kernels.triton.boxes import select_boxes
from minference_vllm.kernels.triton.groups import select_groups
from minference_vllm.kernels.triton.masses import group_masses
from minference_vllm.kernels.triton.means import coarse_means, key_means
from minference_vllm.kernels.triton.normalisers import row_normalisers
from minference_vllm.kernels.triton.probe import held_out_sums, probe
from minference_vllm.kernels.triton.recall import measure_recall
from minference_vllm.kernels.triton.select import select
from minference_vllm.kernels.triton.share import share_sizes

__all__ = [
    "attend",
    "attend_heads",
    "attend_tiles",
    "band_lists",
    "coarse_means",
    "group_masses",
    "held_out_sums",
    "key_means",
    "measure_recall",
    "probe",
    "row_normalisers",
    "select",
    "select_boxes",
    "select_groups",
    "share_sizes",
]
