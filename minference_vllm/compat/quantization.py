# SPDX-License-Identifier: Apache-2.0
"""The type of what vLLM's KV cache holds, and its scales."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def kv_cache_dtype(vllm_config: Any) -> "torch.dtype":
    """In which type keys and values of plain layers are kept."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    dtype: torch.dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)
    return dtype


def is_quantized(kv_cache_dtype: str) -> bool:
    """Whether the cache holds anything but plain floating-point keys and values."""
    return kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32", "half", "float")


def is_fp8(kv_cache_dtype: str) -> bool:
    """Whether the cache holds FP8 (e4m3, with NaN and without infinities) that has no scales but the layer's."""
    import torch
    from vllm.platforms import current_platform

    return kv_cache_dtype in ("fp8", "fp8_e4m3") and current_platform.fp8_dtype() == torch.float8_e4m3fn


def fp8_scales(layer: Any, num_kv_heads: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None":
    """The layer's scales of FP8 queries, keys and values, each [num_kv_heads] float32 on the device.

    None unless the layer has one scale for all heads or one for each KV head: vLLM's FlashAttention takes no others.
    """
    import torch

    scales = []
    for name in ("_q_scale", "_k_scale", "_v_scale"):
        scale = getattr(layer, name, None)
        if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32:
            return None
        if scale.numel() not in (1, num_kv_heads):
            return None
        scales.append(scale.flatten().expand(num_kv_heads))
    q, k, v = scales
    return q, k, v
