# SPDX-License-Identifier: Apache-2.0
"""What several checks of vLLM 0.33 share. pytest loads it under other releases too, so it imports vLLM late."""

import pytest
import torch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention in torch stands in for FlashAttention's, which needs a GPU."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from tests.contract.check_layer import flash_attention

    monkeypatch.setattr(FlashAttentionImpl, "forward", flash_attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
