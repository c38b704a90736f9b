# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill of one chunk: estimate what matters, attend to it."""

import torch

from minference_vllm.config import MInferenceConfig
from minference_vllm.engine import Engine
from minference_vllm.estimators import ESTIMATORS
from minference_vllm.index import PagedKV
from minference_vllm.workspace import Workspace


def sparse_prefill(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    config: MInferenceConfig,
    engine: Engine,
    ws: Workspace,
    out: torch.Tensor,
) -> None:
    """Attention of a chunk over the keys that matter to it (MInference, arXiv 2407.02490).

    Args:
        q: [num_rows, num_qo_heads, head_dim], the chunk's queries.
        kv: the request's cache, the chunk's own keys already in it.
        context_len: keys before the chunk.
        scale: softmax scale.
        config, engine, ws: how, with what code, in whose scratch.
        out: [num_rows, num_qo_heads, head_dim], written.
    """
    index = ESTIMATORS[config.method](q, kv, context_len, scale, config, engine, ws)
    engine.attend(q, kv, context_len, scale, index, out, ws.lse, ws.kept_pairs)
