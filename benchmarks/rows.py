# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks that pair what sparse attention answers with what dense attention does, prompt by prompt."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import DENSE, SPARSE, interval

ALL = "all"
"""Stands in place of a text's name for the prompts of all texts."""
DIGITS = 5  # of a share, which makes thousandths of a percent
PAIRED = ("answers", "answer_loss")
INTERVALS = (
    "95% interval, by Student's t, of the mean difference of a prompt's answers or answer loss, sparse less dense; of "
    "the prompts that were drawn, not of texts: those of one text may overlap"
)

Prompt = Mapping[str, float | None]
"""The findings for one prompt, by name."""


def make_rows(of: dict[str, Any], found: Mapping[tuple[int, str], Sequence[Prompt]]) -> list[dict[str, Any]]:
    """A row for each length and text, and, if there are several texts, one more for all texts of a length.

    Args:
        of: fields that all rows share.
        found: the prompts by length and text.
    """
    rows = [make_row({"tokens": tokens, "text": text, **of}, prompts) for (tokens, text), prompts in found.items()]
    for length in sorted({tokens for tokens, _ in found}):
        texts = [prompts for (tokens, _), prompts in found.items() if tokens == length]
        if len(texts) > 1:
            pooled = [prompt for prompts in texts for prompt in prompts]
            rows.append(make_row({"tokens": length, "text": ALL, **of}, pooled))
    return rows


def make_row(of: dict[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """A row: means over prompts, and intervals of the differences of each prompt's dense and sparse figures."""
    row = {**of, "prompts": len(prompts)}
    for name in prompts[0]:
        numbers = [number for prompt in prompts if (number := prompt[name]) is not None]
        # No mean over prompts of which some lack the figure, such as density where nothing ran sparse.
        row[name] = round(statistics.fmean(numbers), DIGITS) if len(numbers) == len(prompts) else None
    for name in PAIRED:
        if f"{name}_{SPARSE}" in prompts[0]:
            ends = interval.of_mean([_difference(prompt, name) for prompt in prompts])
            low, high = (round(end, DIGITS) for end in ends) if ends else (None, None)
            row |= {f"{name}_low": low, f"{name}_high": high}
    return row


def _difference(prompt: Prompt, name: str) -> float:
    sparse, dense = prompt[f"{name}_{SPARSE}"], prompt[f"{name}_{DENSE}"]
    assert sparse is not None and dense is not None
    return sparse - dense
