# SPDX-License-Identifier: Apache-2.0
"""The heads of a model's attention layer on one GPU."""

from typing import Any, NamedTuple

from minference_vllm.compat import engines
from minference_vllm.errors import ConfigError
from minference_vllm.plan import SUPPORTED_HEAD_DIMS


class Heads(NamedTuple):
    """Query heads, KV heads and their size."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def on_rank(self, tensor_parallel_size: int) -> "Heads":
        """The heads on one of so many GPUs, which the kernels must support.

        Raises:
            ConfigError: they do not.
        """
        qo_heads, kv_heads, head_dim = self
        if (kv_heads % tensor_parallel_size and tensor_parallel_size % kv_heads) or qo_heads % tensor_parallel_size:
            split = f"{qo_heads} query heads over {kv_heads} KV heads"
            raise ConfigError(f"{split} cannot be split over {tensor_parallel_size} GPUs.")
        # With fewer KV heads than GPUs, vLLM repeats them.
        rank = Heads(qo_heads // tensor_parallel_size, max(kv_heads // tensor_parallel_size, 1), head_dim)
        if rank.num_qo_heads % rank.num_kv_heads:
            raise ConfigError(f"{qo_heads} query heads are no multiple of {kv_heads} KV heads.")
        if head_dim not in SUPPORTED_HEAD_DIMS:
            supported = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
            raise ConfigError(f"Heads of size {head_dim} never run sparse; the kernels know {supported}.")
        return rank


def of_model(model: str) -> Heads:
    """The heads of a model, from its config.json.

    Raises:
        ConfigError: vLLM cannot read it, or it does not say.
    """
    try:
        return from_config(engines.text_config(model))
    except Exception as error:  # vLLM and transformers have no common exception for a refusal
        raise ConfigError(f"The heads of {model!r} cannot be read from its config.json: {error}") from None


def from_config(config: Any) -> Heads:
    """The heads of a Hugging Face configuration, which may leave out what has its usual value."""
    heads = config.num_attention_heads
    return Heads(
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
