# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on adversarial shapes, for compute-sanitizer, under which a call takes seconds.

compute-sanitizer --tool racecheck --error-exitcode 9 python -m tests.kernels.sanitized
"""

import itertools
from dataclasses import replace

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.kernels import cuda
from minference_vllm.kernels.cuda import library
from minference_vllm.methods.base import MAX_TOKENS
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.scratch import ProbeBuffers
from tests.kernels.cases import ADVERSARIAL, IRREGULAR, Case, make_chunk
from tests.kernels.checks import check_attend, check_probe, relative_error
from tests.kernels.indexes import random_tile_index
from tests.kernels.recalls import check_heads, check_recall
from tests.kernels.test_random import random_index

# Every column is kept, so that a single tile reuses the slots of the ring.
MANY_COLUMNS = Case("many columns", num_rows=400, context_len=900, head_dim=128, vertical_size=10_000, slash_size=16)
CASES = [
    replace(case, head_dim=head_dim, dtype=dtype)
    for case, (head_dim, dtype) in itertools.product(
        [*IRREGULAR, *ADVERSARIAL, MANY_COLUMNS], [(64, torch.float16), (128, torch.bfloat16)]
    )
    if case.seq_len < 5000 and case.dtype != torch.float32
]
FP8_CASES = [replace(case, has_fp8_kv=True, has_fp8_q=True, per_head=True) for case in CASES[::3]]


def probe(case: Case, chunk: Chunk) -> None:
    counts = case.vertical_slash(Kernel.CUDA).settings.probe_counts
    results = []
    for function in (cuda.probe.probe, reference.probe):
        results.append(ProbeBuffers.allocate(case.num_qo_heads, sum(counts), case.shape.max_seq_len, chunk.q.device))
        function(chunk, *counts, results[-1])
    for name in ("vertical", "slash"):
        mass, want = (getattr(of, name)[:, : case.seq_len] for of in results)
        assert relative_error(mass, want) < 2e-3, (case, name)


def choose_groups(case: Case, chunk: Chunk) -> None:
    """Only runs the kernels; other tests check that the groups are right."""
    device = chunk.q.device
    for coarse_from in (0, MAX_TOKENS):
        method = Block(BlockSettings(coarse_from=coarse_from), Kernel.CUDA)
        method.choose(chunk, method.budgets(case.num_qo_heads, device), method.scratch(case.shape, device))


def attend(case: Case, chunk: Chunk, generator: torch.Generator) -> None:
    device, programs = chunk.q.device, library.num_multiprocessors
    assert cuda.attend.supports(chunk)
    check_heads(Kernel.CUDA, case, device)
    # One tile per program, then many, so that a program overwrites what it has read for the tile before.
    for few in (False, True):
        library.num_multiprocessors = (lambda device: 2) if few else programs
        for draw in (random_index, random_tile_index):
            check_attend(cuda.attend.attend, chunk, draw(case, generator, device))
    library.num_multiprocessors = programs


def main() -> None:
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    for case in CASES:
        chunk = make_chunk(case, device)
        probe(case, chunk)
        choose_groups(case, chunk)
        check_recall(Kernel.CUDA, case, device)
        attend(case, chunk, generator)
    for case in FP8_CASES:
        chunk = make_chunk(case, device)
        if cuda.probe.supports_held_out(chunk):
            check_probe(case, device, Kernel.CUDA)
        choose_groups(case, chunk)
        check_recall(Kernel.CUDA, case, device)
        attend(case, chunk, generator)


if __name__ == "__main__":
    main()
