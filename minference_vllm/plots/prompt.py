# SPDX-License-Identifier: Apache-2.0
"""Has vLLM read one prompt in this process, and records what is chosen for it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm.compat import engines
from minference_vllm.errors import ConfigError
from minference_vllm.layers import SparseLayer
from minference_vllm.offline import OPEN_GATE, our_layers, sound_snapshot, start_engine
from minference_vllm.patterns import TAKES, Resolved
from minference_vllm.plots.capture import Capture
from minference_vllm.recall import LayerRecall

LETTERS = 4  # letters in a token of ordinary text
MARGIN = 64  # tokens


@dataclass(frozen=True, slots=True)
class PromptChoice:
    """What was chosen for a prompt.

    Attributes:
        method: its settings, in one line.
        num_layers: number of the plugin's layers, dense ones included.
        capture: what was kept by the layers that ran sparse, by their position among all of the plugin's.
        recall: of those layers, before the guard acted.
    """

    method: str
    num_layers: int
    capture: Capture
    recall: dict[int, LayerRecall]

    def recall_of(self, position: int) -> list[float] | None:
        """Mean recall of each head of a layer; None if none was measured."""
        measured = self.recall.get(position)
        return None if measured is None else [total / measured.chunks for total in measured.totals]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Density and recall, each [num_layers, num_heads]; NaN where a layer ran dense."""
        num_heads = max(len(layer.kept_pairs) for layer in self.capture.layers.values())
        density, recall = torch.full((2, self.num_layers, num_heads), torch.nan).unbind()
        for position, layer in self.capture.layers.items():
            density[position, : len(layer.kept_pairs)] = layer.density
            if (measured := self.recall_of(position)) is not None:
                recall[position, : len(measured)] = torch.tensor(measured)
        return density, recall

    def numbers(self) -> dict[str, Any]:
        """Method, length, and density and recall by layer, for JSON."""
        return {
            "method": self.method,
            "tokens": self.capture.num_tokens,
            "density": {position: layer.density.tolist() for position, layer in sorted(self.capture.layers.items())},
            "recall": {position: self.recall_of(position) for position in sorted(self.recall)},
        }


def tokens_of(model: str, text: str, most: int | None) -> list[int]:
    """A prompt's tokens, the first `most` of them if that is given.

    Raises:
        ConfigError: the model has no tokenizer here, or the prompt is too short to choose anything for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = tokenizer.encode(text) if most is None else _first_tokens(tokenizer, text, most)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The tokenizer of {model!r} cannot be read: {error}") from None
    if len(tokens) < 2:
        raise ConfigError(f"{len(tokens)} tokens are to be read: give a longer text, or more --tokens.")
    return tokens


def _first_tokens(tokenizer: Any, text: str, most: int) -> list[int]:
    """The first tokens of a text. Only as much text as needed is encoded, because a whole novel takes half a minute."""
    letters = LETTERS * (most + MARGIN)
    while True:
        tokens: list[int] = tokenizer.encode(text[:letters])
        # The last tokens before a cut may differ from those of the whole text, hence MARGIN more than needed.
        if len(tokens) >= most + MARGIN or letters >= len(text):
            return tokens[:most]
        letters *= 2


def read_prompt(
    model: str,
    tokens: Sequence[int],
    settings: Mapping[str, Any],
    engine: Mapping[str, Any],
    mapped: Collection[int] | None,
) -> PromptChoice:
    """Start an engine, have it read the prompt once, and say what each head kept.

    Args:
        model: directory, or name on the hub.
        tokens: of the prompt.
        settings: of the plugin, which override MINFERENCE_CONFIG's; but the gate is always open.
        engine: arguments of vllm.LLM, which override those set here.
        mapped: positions of the layers whose maps are wanted; None for some that are evenly spread.

    Raises:
        ConfigError: nothing of the prompt ran sparse, or it has no such layer.
    """
    options = {"max_model_len": len(tokens) + 1, **engine}
    llm = start_engine(model, {**settings, **OPEN_GATE}, options)
    ours = our_layers(llm, model)
    runtime, num_layers = ours[0].runtime, len(ours)
    before = runtime.counters.snapshot().recall
    capture = Capture(len(tokens), wanted(mapped, num_layers))
    runtime.chooser = capture
    engines.read_tokens(llm, tokens)
    if not capture.layers:
        raise ConfigError(f"Nothing of the {len(tokens)} tokens ran sparse: the log says how many layers may, and why.")
    measured = (sound_snapshot(runtime).recall - before).layers
    return PromptChoice(described(runtime.resolved), num_layers, capture, by_position(ours, measured))


def by_position(layers: Sequence[SparseLayer], measured: Mapping[int, LayerRecall]) -> dict[int, LayerRecall]:
    """What was measured, by the layers' positions instead of their numbers. Nothing is measured in dense layers."""
    return {layer.position: measured[layer.number] for layer in layers if layer.number in measured}


def described(resolved: Resolved) -> str:
    """A method in one line."""
    if resolved.pattern is not None:
        return f"{resolved.settings.name}, {TAKES[resolved.settings.name]} of {resolved.pattern.name}"
    settings = ", ".join(f"{name} {value}" for name, value in resolved.settings if name != "name")
    return f"{resolved.settings.name}: {settings}"


def refuse_layers(model: str, mapped: Collection[int]) -> None:
    """Refuse layers that the model's config.json does not have. No engine is needed for this; if the file cannot be
    read, the engine will say so later.

    Raises:
        ConfigError: one is beyond the last layer.
    """
    try:
        num_layers = int(engines.text_config(model).num_hidden_layers)
    except Exception:  # vLLM and transformers have no common exception for a refusal
        return
    wanted(mapped, num_layers)


def wanted(mapped: Collection[int] | None, num_layers: int) -> Collection[int]:
    """The layers to draw.

    Raises:
        ConfigError: one that was asked for is none of the model's.
    """
    if mapped is None:
        return spread(num_layers)
    if strange := [layer for layer in mapped if not 0 <= layer < num_layers]:
        raise ConfigError(f"Layer {strange[0]} is none of the plugin's: they are 0 to {num_layers - 1}.")
    return mapped


def spread(num_layers: int, count: int = 6) -> list[int]:
    """As many layers as `count` says, evenly spread, including the first and the last."""
    last = num_layers - 1
    return sorted({round(at * last / max(count - 1, 1)) for at in range(count)})
