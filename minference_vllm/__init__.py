# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill for long prompts in stock vLLM. Importing this package imports neither torch nor vLLM."""

__version__ = "0.1.0"
