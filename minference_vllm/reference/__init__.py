# SPDX-License-Identifier: Apache-2.0
"""Every kernel in plain torch, with the same signature: what tests compare kernels with, and what runs without a
GPU."""

from minference_vllm.reference.attend import attend
from minference_vllm.reference.bands import band_lists
from minference_vllm.reference.boxes import select_boxes
from minference_vllm.reference.groups import select_groups
from minference_vllm.reference.masses import group_masses
from minference_vllm.reference.means import coarse_means, key_means
from minference_vllm.reference.normalisers import row_normalisers
from minference_vllm.reference.probe import probe
from minference_vllm.reference.recall import measure_recall
from minference_vllm.reference.select import select
from minference_vllm.reference.share import share_sizes

__all__ = [
    "attend",
    "band_lists",
    "coarse_means",
    "group_masses",
    "key_means",
    "measure_recall",
    "probe",
    "row_normalisers",
    "select",
    "select_boxes",
    "select_groups",
    "share_sizes",
]
