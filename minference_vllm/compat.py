# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM releases, and what we ask of vLLM that is no stable interface."""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

from minference_vllm.plan import Reason

TESTED = ((0, 32), (0, 33))

logger = logging.getLogger("vllm.minference")


@functools.cache
def warn_if_untested() -> None:
    """One warning where the installed vLLM is none that this release was tested with."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # a source tree in the path, or a build of another name
        import vllm

        version = vllm.__version__
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if release not in TESTED:
        tested = " and ".join(".".join(map(str, release)) for release in TESTED)
        logger.warning("MInference is tested with vLLM %s; this is %s. It will try all the same.", tested, version)


def layer_index(layer_name: str) -> int | None:
    """Index of a layer in the whole model (across pipeline stages), None if its name holds no single number."""
    from vllm.model_executor.models.utils import extract_layer_index

    try:
        return extract_layer_index(layer_name)
    except AssertionError:
        return None


def reports_metrics() -> bool:
    """Whether this worker speaks for its engine: every rank sees the same tokens."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_tp_group().rank_in_group == 0 and get_pp_group().is_first_rank


def is_quantized(kv_cache_dtype: str) -> bool:
    """Whether the cache holds anything but plain keys and values of the model's kind."""
    return kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32", "half", "float")


def batch_invariant() -> bool:
    """Whether the user asked for results that do not depend on batching; chunks change what a sparse layer keeps."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def flash_attention(head_dim: int) -> Callable[..., Any]:
    """vLLM's FlashAttention over pages, in the version that vLLM picks here for this head size."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    return functools.partial(flash_attn_varlen_func, fa_version=get_flash_attn_version(head_size=head_dim))


def text_config(model: str) -> Any:
    """The language model's part of a model's configuration; `model` is a directory or a name on the hub."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    return get_hf_text_config(get_config(model, trust_remote_code=False))


def has_host_tensors_of_its_own(vllm_config: Any) -> bool:
    """Whether no later step overwrites the host tensors that describe a step.

    vLLM's V2 runner makes them anew for each, its V1 runner has one set.
    """
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def step_dense_reason(common: Any, metadata: Any) -> Reason | None:
    """Why a whole step must run dense, from vLLM's common and backend metadata; None if it need not."""
    if common.causal is not True:
        return Reason.NOT_CAUSAL
    if getattr(common, "logits_indices_padded", None) is not None:
        return Reason.FAST_PREFILL
    if getattr(metadata, "mm_prefix_query_range_tensor", None) is not None:
        return Reason.MM_PREFIX
    if getattr(metadata, "rswa_prefix_lens", None) is not None:
        return Reason.RSWA
    return None
