# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU, where tests/emulator stands for the GPU: copies and wgmma come late, in random order."""

import ctypes
import itertools
import platform
import shutil
from dataclasses import replace

import pytest
import torch

from minference_vllm.estimators import ESTIMATORS
from minference_vllm.index import PagedKV, SparseIndex
from minference_vllm.kernels.cuda import library
from tests.conftest import ON_CI
from tests.emulator.build import Build, can_leave_out
from tests.kernels.cases import CASES, Case, make_cache, make_queries, make_rising_cache, make_workspace
from tests.kernels.checks import check_attend, relative_error
from tests.kernels.engines import CUDA, REFERENCE
from tests.kernels.indexes import NOTHING, Kept, index_of

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and not ON_CI, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks of x86-64"),
]

CPU = torch.device("cpu")
SEEDS = 3
SUPPORTED = [case for case in CASES if case.dtype != torch.float32 and case.head_dim in (64, 128)]

PROBE_CASES = [
    *SUPPORTED,
    # Few slots for keys, and warpgroups that take turns.
    Case("group of eight", num_rows=100, context_len=900, num_qo_heads=8, num_kv_heads=1, head_dim=128),
    Case("group of twelve", num_rows=70, context_len=500, num_qo_heads=12, num_kv_heads=1, probe_rows="both"),
]
GROUP_OF_EIGHT = PROBE_CASES[-2]

# Statements without which a kernel is wrong.
ATTEND_BREAKS = {
    "the halves' stages are not evened out": ("attend.cuh", "own[0] = max(own[0], own[1] - 1);"),
    "values are left while they are added": ("attend_consume.cuh", "hopper::mma_wait<0>();\n        hopper::pin(acc);"),
    "gathered keys are multiplied unfenced": ("attend_consume.cuh", "if (by_rows) hopper::fence_async_proxy();"),
    "scores are not masked": ("attend_consume.cuh", "keep(scores);"),
    "keys are copied over others in use": (
        "attend_produce.cuh",
        "hopper::wait(&shared.empty[which][slot], phase ^ 1);",
    ),
    "outputs do not follow the reference": ("attend_softmax.cuh", "acc[i] *= i / 2 % 2 ? shrink.y : shrink.x;"),
    "the halves are out of turn": ("attend_consume.cuh", "if (half == 1) consumer.pass_turn();"),
    "queries are never left": ("attend_consume.cuh", "if (--steps_left == 0) leave(&shared.q_empty);"),
}
PROBE_BREAKS = {
    "keys are copied over others in use": (
        "probe_load.cuh",
        "hopper::wait(&shared.barriers->empty[ring.slot], ring.phase ^ 1);",
    ),
    "scores are read before they are there": (
        "probe_mass.cuh",
        "hopper::mma_wait<0>();\n            hopper::pin(scores[0]);",
    ),
}
BREAKS = [*ATTEND_BREAKS.values(), *PROBE_BREAKS.values()]

# Private stages of one half against none or many of the other, which no estimate gives but the kernel promises to take.
LATE = Case("", num_rows=200, context_len=1100, num_qo_heads=2, num_kv_heads=1, head_dim=128)
HAND_WRITTEN = {
    "nothing but each tile's own keys": [NOTHING, NOTHING],
    "many bands of the second half, none of the first": [Kept([], [], list(range(1, 81)), [0, 400]), NOTHING],
    "many bands of the first half, none of the second": [Kept([], list(range(1, 81)), [], [3, 200]), NOTHING],
    "few against many": [Kept([], [1, 2], list(range(3, 30)), [5]), Kept([], list(range(9, 49)), [1, 8], [])],
    "pairs among shared stages": [
        Kept(list(range(1, 20)), list(range(20, 40)), list(range(40, 49)), [0, 100, 640]),
        Kept(list(range(20, 49)), list(range(1, 10)), list(range(10, 20)), [0, 17, 127, 128]),
    ],
}


class Emulated:
    """Stands for the library of CUDA kernels."""

    def __init__(self, functions: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.functions = functions
        self.seed = 0
        self.left_out = -1
        monkeypatch.setattr(library, "launch", self.launch)
        # So few that a program goes through several tiles.
        monkeypatch.setattr(library, "num_multiprocessors", lambda device: 1 + self.seed % 3)
        # One of this test: a kernel that breaks off does not leave zero.
        self.counter = torch.zeros(1, dtype=torch.int32)
        monkeypatch.setattr(library, "counter", lambda device: self.counter)

    def launch(self, function: str, arguments: ctypes.Structure, device: torch.device) -> None:
        self.functions.emulator_begin(self.seed, self.left_out)
        if error := self.functions[function](ctypes.byref(arguments), None):
            raise RuntimeError(f"{function}, seed {self.seed}: {self.functions.minference_error(error).decode()}")
        assert self.counter.item() == 0, "the next launch would count on from there"


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Build]:
    """The kernels as they are, and such as can be broken; both made at once."""
    edits = [can_leave_out(number, *statements) for number, statements in enumerate(BREAKS)]
    return Build(tmp_path_factory.mktemp("sound")), Build(tmp_path_factory.mktemp("breakable"), edits)


@pytest.fixture
def emulated(builds: tuple[Build, Build], monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(builds[0].functions, monkeypatch)


@pytest.fixture
def breakable(builds: tuple[Build, Build], monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(builds[1].functions, monkeypatch)


def estimated_index(case: Case, q: torch.Tensor, kv: PagedKV) -> SparseIndex:
    ws = make_workspace(case, case.config(), CPU)
    return ESTIMATORS["vertical_slash"](q, kv, case.context_len, case.scale, case.config(), REFERENCE, ws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SUPPORTED])
def test_attend_matches_the_reference(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    q, kv = make_queries(case, CPU), make_cache(case, CPU)
    index = estimated_index(case, q, kv)
    for emulated.seed in range(SEEDS):
        check_attend(CUDA.attend, case, index, q, kv)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [pytest.param(heads, id=name) for name, heads in HAND_WRITTEN.items()])
def test_attend_takes_any_index(emulated: Emulated, heads: list[Kept], head_dim: int) -> None:
    case = replace(LATE, head_dim=head_dim)
    q, kv, index = make_queries(case, CPU), make_cache(case, CPU), index_of(heads, case, CPU)
    for emulated.seed in range(SEEDS):
        check_attend(CUDA.attend, case, index, q, kv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_attend_follows_scores_that_rise(emulated: Emulated, dtype: torch.dtype) -> None:
    case = replace(LATE, dtype=dtype)
    q, kv = make_queries(case, CPU), make_rising_cache(case, CPU)
    for heads in HAND_WRITTEN.values():
        check_attend(CUDA.attend, case, index_of(heads, case, CPU), q, kv)


def check_probe(case: Case) -> None:
    q, kv, config = make_queries(case, CPU), make_cache(case, CPU), case.config()
    results = []
    for probe in (REFERENCE.probe, CUDA.probe):
        ws = make_workspace(case, config, CPU)
        for left_over in (ws.vertical, ws.slash, ws.probe_lse):
            left_over.fill_(7)
        probe(q, kv, case.context_len, case.scale, *config.probe_counts, ws)
        results.append(ws)
    expected, actual = results
    torch.testing.assert_close(actual.probe_lse, expected.probe_lse, rtol=1e-4, atol=1e-4)
    for name in ("vertical", "slash"):
        mass, want = getattr(actual, name), getattr(expected, name)
        assert relative_error(mass[:, : case.seq_len], want[:, : case.seq_len]) < 2e-3
        assert (mass[:, case.seq_len :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in PROBE_CASES])
def test_probe_matches_the_reference(emulated: Emulated, case: Case, dtype: torch.dtype) -> None:
    for emulated.seed in range(SEEDS):
        check_probe(replace(case, dtype=dtype))


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in ATTEND_BREAKS.items()])
def test_a_broken_attend_is_noticed(breakable: Emulated, broken: tuple[str, str]) -> None:
    q, caches = make_queries(LATE, CPU), (make_cache(LATE, CPU), make_rising_cache(LATE, CPU))
    indexes = [index_of(heads, LATE, CPU) for heads in HAND_WRITTEN.values()]

    def check_all() -> None:
        for kv, index in itertools.product(caches, indexes):
            check_attend(CUDA.attend, LATE, index, q, kv)

    check_all()
    breakable.left_out = BREAKS.index(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for breakable.seed in range(10):
            check_all()


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in PROBE_BREAKS.items()])
def test_a_broken_probe_is_noticed(breakable: Emulated, broken: tuple[str, str]) -> None:
    check_probe(GROUP_OF_EIGHT)
    breakable.left_out = BREAKS.index(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for breakable.seed in range(10):
            check_probe(GROUP_OF_EIGHT)


def test_a_deadlock_is_reported(breakable: Emulated) -> None:
    q, kv = make_queries(LATE, CPU), make_cache(LATE, CPU)
    index = index_of(HAND_WRITTEN["many bands of the second half, none of the first"], LATE, CPU)
    breakable.left_out = BREAKS.index(ATTEND_BREAKS["the halves' stages are not evened out"])
    with pytest.raises(RuntimeError, match=r"deadlock[\s\S]*mbarrier"):
        check_attend(CUDA.attend, LATE, index, q, kv)
