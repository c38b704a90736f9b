# SPDX-License-Identifier: Apache-2.0
"""What the command-line tools need of vLLM: a model's config, a server's config, an engine in Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from minference_vllm.compat import attention_layers, is_draft_layer, is_ours


def text_config(model: str) -> Any:
    """The language model's part of a model's configuration; `model` is a directory or a name on the hub."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    return get_hf_text_config(get_config(model, trust_remote_code=False))


def engine_config(model: str, **options: Any) -> Any:
    """The VllmConfig that `vllm serve MODEL` makes of its options, named as in EngineArgs; None means not given.

    No weights are read and nothing is started.

    Raises:
        Exception: of any type; vLLM has no common one for refusing a model or an option.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    given = {name: value for name, value in options.items() if value is not None}
    return EngineArgs(model=model, **given).create_engine_config(UsageContext.OPENAI_API_SERVER)


def offline_engine(model: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """vLLM in Python, with our backend.

    Args:
        settings: the plugin's.
        options: arguments of vllm.LLM.
    """
    from vllm import LLM

    return LLM(model, **{"attention_backend": "MINFERENCE", "additional_config": {"minference": settings}, **options})


def our_layers(llm: Any) -> list[Any]:
    """The implementations of our layers, but drafters', in an engine of this process, in running order."""
    config = llm.llm_engine.vllm_config
    layers = attention_layers(config).items()
    return [layer.impl for name, layer in layers if is_ours(layer) and not is_draft_layer(name, layer, config)]


def read_tokens(llm: Any, tokens: Sequence[int]) -> None:
    """Have an engine read a prompt, and answer with one token."""
    from vllm import SamplingParams

    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": list(tokens)}], one, use_tqdm=False)


class States:
    """The hidden states after the last layer of an engine in this process, and the logits that follow from them.

    Args:
        llm: the engine. The states of everything that it reads from now on are kept until `take`.
    """

    def __init__(self, llm: Any) -> None:
        [self._model] = llm.apply_model(lambda model: model)
        self._steps: list[Any] = []
        self._model.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        # With a draft model, some models return the states of other layers as well.
        self._steps.append((output[0] if isinstance(output, tuple) else output).clone())

    def take(self) -> Any:
        """[rows, hidden size], of all steps since the last call."""
        import torch

        steps, self._steps = self._steps, []
        return torch.cat(steps) if steps else torch.empty(0, 0)

    def logits(self, states: Any) -> Any:
        """[rows, vocabulary]"""
        return self._model.compute_logits(states)
