# SPDX-License-Identifier: Apache-2.0
"""The longest prompt that a server admits, and the limits by which its scheduler cuts prompts into chunks."""

import math
from typing import Any

from minference_vllm.budget import Budget


def budget(vllm_config: Any) -> Budget:
    """The scheduler's limits, which decide how prompts are cut into chunks."""
    scheduler = vllm_config.scheduler_config
    tokens, shared = scheduler.max_num_batched_tokens, getattr(scheduler, "long_prefill_token_threshold", 0)
    if shared and getattr(scheduler, "long_prefill_token_threshold_adaptive", False):
        shared = max(shared, tokens // 2)  # the share of two requests; more get less, at least the threshold
    scheduled = getattr(scheduler, "max_num_scheduled_tokens", None) or tokens
    slots = getattr(getattr(vllm_config, "speculative_config", None), "max_num_new_slots_for_drafting", 0)
    scheduled = scheduled if scheduled < tokens else math.inf
    return Budget(tokens, min(shared or tokens, tokens), slots, scheduled, _grain(vllm_config))


def _grain(vllm_config: Any) -> int:
    """Chunks end at multiples of this many keys. The number is final only once a worker has its layers."""
    cache = getattr(vllm_config, "cache_config", None)
    is_aligned = getattr(cache, "mamba_cache_mode", "none") == "align"
    return int(getattr(cache, "block_size", None) or 1) if is_aligned else 1


def longest_prompt(vllm_config: Any) -> int:
    """Tokens of the longest prompt that is admitted: a model that generates needs room for one more token."""
    model = vllm_config.model_config
    return int(model.max_model_len) - (getattr(model, "runner_type", "generate") == "generate")
