# SPDX-License-Identifier: Apache-2.0
"""The tasks, one file for each. A task makes prompts of a given length from the material."""

from collections.abc import Callable, Sequence

from minference_vllm.errors import ConfigError
from minference_vllm.evals.material import Material
from minference_vllm.evals.sample import Sample
from minference_vllm.evals.tasks import facts, needle, position, retrieval, ruler

Maker = Callable[[Material, int, int], list[Sample]]
"""Makes samples of one length from the material, the number of tokens, and the number of samples."""

OF_TEXT: dict[str, Maker] = {"needle": needle.make, "facts": facts.make, "position": position.make}
"""The tasks that need the user's text."""
OF_NOTHING: dict[str, Maker] = {"retrieval": retrieval.make}
OF_PROMPTS = "agreement"
"""The task that needs the user's prompts."""
RULER = "ruler"
"""Stands for all of RULER's tasks; `ruler:vt` is one of them."""
RULER_TASKS = ruler.TASKS
MAKERS = OF_NOTHING | OF_TEXT
NAMES = (*MAKERS, OF_PROMPTS, RULER)


def expand(names: Sequence[str]) -> list[str]:
    """The names of single tasks, each once; `ruler` is replaced by its thirteen tasks.

    Raises:
        ConfigError: no task has one of these names.
    """
    expanded: list[str] = []
    for name in names:
        if name not in (*NAMES, *RULER_TASKS):
            raise ConfigError(f"There is no task {name!r}: the tasks are {', '.join((*NAMES, *RULER_TASKS))}.")
        expanded += RULER_TASKS if name == RULER else [name]
    return list(dict.fromkeys(expanded))
