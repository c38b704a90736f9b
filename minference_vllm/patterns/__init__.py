# SPDX-License-Identifier: Apache-2.0
"""What is known of a model's heads beforehand: files that say how much each head of each layer keeps."""

from minference_vllm.patterns.auto import AutoSettings, Pattern, Resolved, ServedModel, resolve
from minference_vllm.patterns.file import DENSE, Geometry, PatternFile, read_pattern
from minference_vllm.patterns.shared import TAKES

__all__ = [
    "DENSE",
    "TAKES",
    "AutoSettings",
    "Geometry",
    "Pattern",
    "PatternFile",
    "Resolved",
    "ServedModel",
    "read_pattern",
    "resolve",
]
