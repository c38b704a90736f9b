# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: which layers each stage runs, and which stage counts prompts and logs for all stages."""

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The pipeline stages of an engine, and which of them this process runs.

    Attributes:
        stage: number of the stage that this process runs.
        layers: for each stage, the numbers (in the whole model) of its layers that attend to the whole prompt. A single
            stage may have an empty set: its layers are never needed.
    """

    stage: int = 0
    layers: tuple[frozenset[int], ...] = (frozenset(),)

    def speaks(self, dense_layers: Set[int] = frozenset()) -> bool:
        """Whether this stage counts prompts, and logs what holds for all stages.

        Every stage reads the same prompts, so exactly one stage counts them: the first that has a layer that may run
        sparse, since a stage without such layers would count them as dense. All stages compute the same answer, so they
        need not communicate.

        Args:
            dense_layers: numbers of the layers that are to run dense.
        """
        sparse = (stage for stage, layers in enumerate(self.layers) if layers - dense_layers)
        return self.stage == next(sparse, 0)


ONE_STAGE = Pipeline()
