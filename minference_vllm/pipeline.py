# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism: which layers each stage runs, and which stage speaks for all."""

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pipeline:
    """An engine's stages, as one of them sees them.

    Attributes:
        stage: its number.
        layers: by stage, the numbers in the whole model of the layers that attend to the whole prompt; a single stage
            need not know its own.
    """

    stage: int = 0
    layers: tuple[frozenset[int], ...] = (frozenset(),)

    def speaks(self, dense_layers: Set[int] = frozenset()) -> bool:
        """Whether this stage counts prompts, and logs what holds for all stages.

        Every stage reads the same prompts, so one must: the first with a layer that may run sparse, for a stage without
        any would count them as dense. All stages come to the same answer, and need not ask each other.

        Args:
            dense_layers: numbers of those that are to run dense.
        """
        sparse = (stage for stage, layers in enumerate(self.layers) if layers - dense_layers)
        return self.stage == next(sparse, 0)


ONE_STAGE = Pipeline()
