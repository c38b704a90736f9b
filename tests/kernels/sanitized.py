# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on adversarial shapes, for compute-sanitizer, under which a call takes seconds.

compute-sanitizer --tool racecheck --error-exitcode 9 python -m tests.kernels.sanitized
"""

import itertools
from dataclasses import replace

import torch

from minference_vllm.kernels.cuda import library
from minference_vllm.workspace import Workspace
from tests.kernels.cases import ADVERSARIAL, IRREGULAR, Case, make_cache, make_queries, make_workspace
from tests.kernels.checks import check_attend, relative_error
from tests.kernels.engines import CUDA, REFERENCE
from tests.kernels.test_random import random_index

# Every column, so that slots come round in one tile.
MANY_COLUMNS = Case("many columns", num_rows=400, context_len=900, head_dim=128, vertical_size=10_000, slash_size=16)
CASES = [
    replace(case, head_dim=head_dim, dtype=dtype)
    for case, (head_dim, dtype) in itertools.product(
        [*IRREGULAR, *ADVERSARIAL, MANY_COLUMNS], [(64, torch.float16), (128, torch.bfloat16)]
    )
    if case.seq_len < 5000 and case.dtype != torch.float32
]


def probe(case: Case, q: torch.Tensor, ws: Workspace, device: torch.device) -> None:
    kv, config = make_cache(case, device), case.config()
    expected = make_workspace(case, config, device)
    for engine, filled in ((CUDA, ws), (REFERENCE, expected)):
        engine.probe(q, kv, case.context_len, case.scale, *config.probe_counts, filled)
    for name in ("vertical", "slash"):
        mass, want = (getattr(of, name)[:, : case.seq_len] for of in (ws, expected))
        assert relative_error(mass, want) < 2e-3, (case, name)


def main() -> None:
    device = torch.device("cuda")
    programs = library.num_multiprocessors
    generator = torch.Generator().manual_seed(0)
    for case in CASES:
        q, kv = make_queries(case, device), make_cache(case, device)
        ws = make_workspace(case, case.config(), device)
        probe(case, q, ws, device)
        # A tile a program, then many: what a program reads of one tile it overwrites for the next.
        for few in (False, True):
            library.num_multiprocessors = (lambda device: 2) if few else programs
            check_attend(CUDA.attend, case, random_index(case, ws, generator), q, kv)


if __name__ == "__main__":
    main()
