# SPDX-License-Identifier: Apache-2.0
"""What a metadata builder of ours is told about a step, and which parts of it can be relied on."""

from typing import Any

from minference_vllm.plan import StepTraits


def has_host_tensors_of_its_own(vllm_config: Any) -> bool:
    """Whether the host tensors that describe a step are never overwritten by a later step.

    vLLM's V2 runner makes new ones for each step, its V1 runner reuses one set.
    """
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def pools_blocks(builder: Any) -> bool:
    """Whether a metadata builder of ours is told of several rows for each token.

    This is so in the builders that vLLM derives from ours for audio layers which pool blocks (Voxtral's). vLLM
    multiplies all lengths there without showing it: the specification that it passes on says `tokens_per_state` 1.
    """
    return any("BlockPooling" in base.__name__ for base in type(builder).__mro__)


def step_traits(common: Any, metadata: Any) -> StepTraits:
    """What decides whether anything of a step may run sparse, from vLLM's common and backend metadata."""
    return StepTraits(
        is_causal=common.causal is True,
        is_fast_prefill=getattr(common, "logits_indices_padded", None) is not None,
        has_mm_prefix=getattr(metadata, "mm_prefix_query_range_tensor", None) is not None,
        has_rswa=getattr(metadata, "rswa_prefix_lens", None) is not None,
    )
