# SPDX-License-Identifier: Apache-2.0
"""The tasks: each makes prompts of a length from what it is given, a file a task."""

from collections.abc import Callable, Sequence

from minference_vllm.errors import ConfigError
from minference_vllm.evals.material import Material
from minference_vllm.evals.sample import Sample
from minference_vllm.evals.tasks import facts, needle, position, retrieval, ruler

Maker = Callable[[Material, int, int], list[Sample]]
"""Samples of a length: the material, tokens, how many."""

OF_TEXT: dict[str, Maker] = {"needle": needle.make, "facts": facts.make, "position": position.make}
"""They need the user's text."""
OF_NOTHING: dict[str, Maker] = {"retrieval": retrieval.make}
OF_PROMPTS = "agreement"
"""It needs the user's prompts."""
RULER = "ruler"
"""All of RULER's tasks; `ruler:vt` is one of them."""
RULER_TASKS = ruler.TASKS
MAKERS = OF_NOTHING | OF_TEXT
NAMES = (*MAKERS, OF_PROMPTS, RULER)


def expand(names: Sequence[str]) -> list[str]:
    """Single tasks, RULER's thirteen for `ruler`, each once.

    Raises:
        ConfigError: there is no task of a name.
    """
    expanded: list[str] = []
    for name in names:
        if name not in (*NAMES, *RULER_TASKS):
            raise ConfigError(f"There is no task {name!r}: the tasks are {', '.join((*NAMES, *RULER_TASKS))}.")
        expanded += RULER_TASKS if name == RULER else [name]
    return list(dict.fromkeys(expanded))
