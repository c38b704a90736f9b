# SPDX-License-Identifier: Apache-2.0
"""What a metadata builder of ours is told of a step, and what of that can be relied on."""

from typing import Any

from minference_vllm.plan import StepTraits


def has_host_tensors_of_its_own(vllm_config: Any) -> bool:
    """Whether no later step overwrites the host tensors that describe a step.

    vLLM's V2 runner makes them anew for each, its V1 runner has one set.
    """
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def pools_blocks(builder: Any) -> bool:
    """Whether the rows that a metadata builder of ours is told of are several for each token.

    So it is where vLLM has derived it for audio layers that pool blocks (Voxtral's). It multiplies all lengths, and we
    do not see it: the specification that it hands on says `tokens_per_state` 1.
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
