# SPDX-License-Identifier: Apache-2.0
"""Key sets as real prompts have them, for models whose weights are made up.

Made-up weights attend to everything alike, so their heaviest diagonals lie scattered over the whole prompt, which no
trained model does. Here the plugin's own probe runs as always, then its masses are replaced by drawn ones, and the
plugin's selection, index and attention go on from those.
"""

from dataclasses import replace
from typing import Any

import torch

from minference_vllm.config import MInferenceConfig
from minference_vllm.engine import Engine
from minference_vllm.estimators import ESTIMATORS
from minference_vllm.index import PagedKV, SparseIndex
from minference_vllm.tuning.masses import CLUSTER, KeySets
from minference_vllm.workspace import Workspace

DESCRIPTION = (
    "synthetic: the probe, the selection and the index run in full, but between probe and selection its masses are "
    f"replaced by drawn ones (a device copy, counted in the time). Verticals are the sinks and random columns; slashes "
    f"are half a contiguous local band and half clusters of {CLUSTER} at random distances. Drawn for each query head, "
    "with a fixed seed, once for each length that a chunk ends at, during the warm-up; all layers use the same."
)


def install(seed: int) -> None:
    """Make vertical_slash choose drawn sets from now on, in this process."""
    sets, estimator = KeySets(seed), ESTIMATORS["vertical_slash"]

    def synthetic(
        q: torch.Tensor,
        kv: PagedKV,
        context_len: int,
        scale: float,
        config: MInferenceConfig,
        engine: Engine,
        ws: Workspace,
    ) -> SparseIndex:
        def probe(*arguments: Any) -> None:
            engine.probe(*arguments)
            sets.overwrite(ws, context_len + len(q), config)

        return estimator(q, kv, context_len, scale, config, replace(engine, probe=probe), ws)

    ESTIMATORS["vertical_slash"] = synthetic
