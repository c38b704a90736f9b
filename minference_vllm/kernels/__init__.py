# SPDX-License-Identifier: Apache-2.0
"""Device code: triton/ for every GPU, cuda/ (csrc/) for Hopper. Imports torch and triton, never vLLM."""
