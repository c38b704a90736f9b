# SPDX-License-Identifier: Apache-2.0
"""The backend that vLLM sees on a GPU: FlashAttention's capabilities with our builder and implementation."""

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from minference_vllm.impl import MInferenceImpl
from minference_vllm.metadata import MInferenceBuilder


class MInferenceBackend(FlashAttentionBackend):
    """Dense FlashAttention, and sparse prefill of long prompts."""

    @staticmethod
    def get_name() -> str:
        # vLLM looks the name up among its backends.
        return "CUSTOM"

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Dense runs beside a sparse chunk are planned from the lengths on the host, so the device's must be the same.
        return False

    @staticmethod
    def get_impl_cls() -> type[MInferenceImpl]:
        return MInferenceImpl

    @staticmethod
    def get_builder_cls() -> type[MInferenceBuilder]:
        return MInferenceBuilder
