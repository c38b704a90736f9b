# SPDX-License-Identifier: Apache-2.0
"""One chunk without a model, in which each row in its middle looks at a far place of its own.

Keys are random, but sixteen neighbours are alike. Each row's query is the key just before it, so that nearly all of its
attention lies there. In every second head, 256 rows in the middle of the chunk instead look each at a different key in
the first half of the context.
"""

from typing import Any

import torch

from benchmarks.cases import Case, make_inputs
from minference_vllm.chunk import Chunk
from minference_vllm.config import MInferenceConfig
from minference_vllm.reference.dense import dense
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape

FAR_ROWS = 256
LOOK = 1.4  # a query is this times what sixteen keys have in common, which puts them 16 nats above others
UNLIKE = 0.3  # how much a key deviates from what its sixteen have in common
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 128
CLOSE = 2e-2  # relative to the dense row


def make_chunk(tokens: int, rows: int, seed: int, device: torch.device) -> tuple[Chunk, slice]:
    """The last `rows` of a request of `tokens`, and the slice of them that looks far in every second head."""
    inputs = make_inputs(Case(tokens, 1, 1, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM), device, seed)
    context_len = tokens - rows
    pages = inputs.kv.block_table[0].long()
    # [pages, num_kv_heads, page_size, head_dim]; a page is sixteen keys
    own = inputs.kv.k[pages]
    common = own[:, :, :1].clone()
    inputs.kv.k[pages] = common + UNLIKE * own
    # [tokens, num_qo_heads, head_dim]
    keys = (
        common.expand_as(own).transpose(1, 2).flatten(0, 1)[:tokens].repeat_interleave(NUM_QO_HEADS // NUM_KV_HEADS, 1)
    )
    looked_at = torch.arange(context_len - 1, tokens - 1, device=device)[:, None].repeat(1, NUM_QO_HEADS)
    middle = slice((rows - FAR_ROWS) // 2, (rows - FAR_ROWS) // 2 + FAR_ROWS)
    generator = torch.Generator(device).manual_seed(seed)
    far = torch.randperm(context_len // 2, generator=generator, device=device)[:FAR_ROWS]
    looked_at[middle, ::2] = far[:, None]
    q = LOOK * keys.gather(0, looked_at[:, :, None].expand(-1, -1, HEAD_DIM))
    return Chunk(q, torch.empty_like(q), inputs.kv, context_len, inputs.scale), middle


def measure(minference: dict[str, Any], tokens: int, rows: int, seed: int) -> dict[str, Any]:
    """Fields of a row.

    Args:
        minference: settings of the plugin.
        tokens, rows: of the request and of its last chunk.

    Returns:
        answers_dense: 1 by definition.
        answers_sparse: share of the far rows, in the heads in which they look far, whose output is dense attention's.
        error: relative to dense attention, over all of those rows.
        recall, redone, density: as for prompts; recall_worst: of the worst head.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunk, middle = make_chunk(tokens, rows, seed, device)
    runtime = Runtime(MInferenceConfig.model_validate(minference), device, publish=False)
    shape = ScratchShape(NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, chunk.q.dtype, tokens, rows)
    layer = runtime.layer_state(shape, 0, 1)
    if not runtime.run(lambda: chunk, layer):
        raise SystemExit("the sparse path failed; the log says why")
    wanted = torch.empty_like(chunk.q[middle])
    dense(chunk.q[middle], chunk.kv, chunk.context_len + middle.start, chunk.scale, wanted)
    got, wanted = chunk.out[middle, ::2].float(), wanted[:, ::2].float()
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    found = {
        "prompts": 1,
        "answers_dense": 1.0,
        "answers_sparse": (errors < CLOSE).float().mean().item(),
        "error": ((got - wanted).norm() / wanted.norm()).item(),
        "density": layer.attend.kept_pairs.item() / (NUM_QO_HEADS * chunk.causal_pairs),
    }
    if layer.guard is not None:
        totals = layer.guard.totals
        found |= {
            "recall": totals.sums.mean().item(),
            "recall_worst": totals.worst.min().item(),
            "redone": totals.redone.item() / NUM_QO_HEADS,
        }
    return {name: round(value, 4) for name, value in found.items()}
