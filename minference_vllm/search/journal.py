# SPDX-License-Identifier: Apache-2.0
"""What a search has measured, on disk, so that a run which was cut off goes on where it stopped."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from minference_vllm.evals.line import Line, LineFile
from minference_vllm.search.meter import LayerTrials, Trial

WHAT = "a file of measurements of this version"


class Origin(Line):
    """The first line: what the measurements belong to. A search that differs in any of it begins anew."""

    version: str
    """Version of this package."""
    vllm: str
    device: str
    model: str
    data: tuple[str, ...]
    """Fingerprints of the texts."""
    tokens: tuple[int, ...]
    prompts: int
    seed: int
    cost: str
    """What cost is counted in."""
    engine: str
    """The engine's options, as JSON."""
    candidates: tuple[str, ...]
    """The candidates by method, in the form of a pattern file."""


class TrialLine(Line):
    """See meter.Trial."""

    choosing: float
    attending: float
    pairs: tuple[float, ...]
    errors: tuple[float, ...]


class LayerLine(Line):
    """See meter.LayerTrials."""

    position: int
    """The layer's position among the plugin's layers."""
    dense: float
    norm: float
    trials: tuple[TrialLine, ...]


class Entry(Line):
    """A measurement: of all candidates in all layers, or of the effect of the rough candidate in one layer."""

    prompt: int
    """The prompt's number."""
    layers: tuple[LayerLine, ...] | None = None
    position: int | None = None
    kl: float | None = None


class Journal:
    """The measurements of a search.

    Args:
        path: of the file; it is created, or continued if it exists.
        origin: what the measurements must belong to.

    Raises:
        ConfigError: the file belongs to something else.
    """

    def __init__(self, path: Path, origin: Origin) -> None:
        self._file = LineFile(path, origin, Entry, WHAT)

    def add_trials(self, prompt: int, layers: Mapping[int, LayerTrials]) -> None:
        """Add the results of all candidates for a prompt, by the layer's position."""
        lines = [LayerLine(position=position, **asdict(trials)) for position, trials in layers.items()]
        self._file.add(Entry(prompt=prompt, layers=tuple(lines)))

    def add_kl(self, prompt: int, position: int, kl: float) -> None:
        """Add the effect of the rough candidate in one layer on a prompt's next tokens."""
        self._file.add(Entry(prompt=prompt, position=position, kl=kl))

    def trials(self) -> dict[int, dict[int, LayerTrials]]:
        """The results by prompt and layer position."""
        return {
            entry.prompt: {layer.position: _trials(layer) for layer in entry.layers}
            for entry in self._file.lines
            if entry.layers is not None
        }

    def kls(self) -> dict[tuple[int, int], float]:
        """The effects of the rough candidate, by prompt and layer position."""
        return {
            (entry.prompt, entry.position): entry.kl
            for entry in self._file.lines
            if entry.position is not None and entry.kl is not None
        }


def _trials(layer: LayerLine) -> LayerTrials:
    trials = tuple(Trial(trial.choosing, trial.attending, trial.pairs, trial.errors) for trial in layer.trials)
    return LayerTrials(layer.dense, layer.norm, trials)
