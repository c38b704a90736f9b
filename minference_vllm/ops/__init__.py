# SPDX-License-Identifier: Apache-2.0
"""The operations that methods are made of. Each picks the implementation that runs it, launches it, and returns.

Arguments and results are those of the function in minference_vllm.reference that its docstring names; `kernel` says
which implementation is wanted. What the CUDA library does not support (an FP8 cache under queries in the model's dtype,
heads of 256, unaligned tensors) runs in Triton.
"""

from minference_vllm.ops.attend import attend
from minference_vllm.ops.boxes import select_boxes
from minference_vllm.ops.groups import select_groups
from minference_vllm.ops.kernel import Kernel, choose_kernel, report_shape
from minference_vllm.ops.lists import band_lists
from minference_vllm.ops.masses import box_masses, group_masses
from minference_vllm.ops.means import coarse_means, key_means, means_dtype
from minference_vllm.ops.normalisers import row_normalisers
from minference_vllm.ops.probe import probe
from minference_vllm.ops.recall import measure_recall
from minference_vllm.ops.select import select
from minference_vllm.ops.share import share_sizes

__all__ = [
    "Kernel",
    "attend",
    "band_lists",
    "box_masses",
    "choose_kernel",
    "coarse_means",
    "group_masses",
    "key_means",
    "means_dtype",
    "measure_recall",
    "probe",
    "report_shape",
    "row_normalisers",
    "select",
    "select_boxes",
    "select_groups",
    "share_sizes",
]
