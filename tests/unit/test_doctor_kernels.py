# SPDX-License-Identifier: Apache-2.0
"""The doctor's trial of each kernel against the reference: sound kernels pass, and one that is wrong is named."""

import json
from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.doctor import selftest
from minference_vllm.doctor.check import Check, Status
from minference_vllm.doctor.diagnosis import to_json
from minference_vllm.doctor.selftest import largest_error, try_kernel, try_kernels, try_reference
from minference_vllm.doctor.trials import Shape, in_fp8, make_chunk
from minference_vllm.kernels import triton
from minference_vllm.ops import Kernel
from minference_vllm.plan import SUPPORTED_HEAD_DIMS

SMALL = Shape(num_qo_heads=2, num_kv_heads=1, head_dim=64)
TRIAL_OF = {
    "probe": "probe",
    "select": "select",
    "share_sizes": "share",
    "band_lists": "band lists",
    "attend": "attend to bands",
    "key_means": "means of keys",
    "row_normalisers": "normalisers",
    "coarse_means": "coarse means",
    "select_boxes": "select boxes",
    "group_masses": "masses of groups",
    "select_groups": "select groups",
    "attend_tiles": "attend to groups",
    "held_out_sums": "recall",
    "measure_recall": "recall",
    "attend_heads": "attend to all keys",
}

OF_NUMBERS = {
    "select", "share", "band lists", "coarse means", "select boxes", "select groups", "select groups by tile"
}  # fmt: skip
"""Operations on what others have made of queries and keys."""

TRIALS = list(dict.fromkeys(TRIAL_OF.values()))
# The kernel of group_masses makes those of boxes too, and that of select_groups lists of halves and of tiles.
TRIALS.insert(TRIALS.index("select boxes"), "masses of boxes")
TRIALS.insert(TRIALS.index("select groups") + 1, "select groups by tile")


def named(checks: list[Check], status: Status) -> list[str]:
    return [check.name for check in checks if check.status is status]


def named_with(name: str, head_dim: int) -> str:
    """A trial of a CUDA kernel, as it is shown."""
    operation, comma, cache = name.partition(", ")
    return f"cuda: {operation}, heads of {head_dim}{comma}{cache}"


def try_triton(device: torch.device, head_dim: int = 64) -> list[Check]:
    return list(try_kernel(make_chunk(SMALL._replace(head_dim=head_dim), device), Kernel.TRITON))


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_sound_kernels_pass(head_dim: int, device: torch.device) -> None:
    checks = try_triton(device, head_dim)
    assert named(checks, Status.OK) == [f"triton: {name}, heads of {head_dim}" for name in TRIALS]
    assert len(checks) == len(named(checks, Status.OK))


def test_what_reads_a_cache_is_tried_in_fp8_too(device: torch.device) -> None:
    checks = list(try_kernel(in_fp8(make_chunk(SMALL, device)), Kernel.TRITON))
    reading = [name for name in TRIALS if name not in OF_NUMBERS]
    assert named(checks, Status.OK) == [f"triton: {name}, heads of 64, cache in FP8" for name in reading]
    assert len(checks) == len(named(checks, Status.OK))


def test_a_scale_that_is_forgotten_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = in_fp8(make_chunk(SMALL, device))
    attend = triton.attend_tiles

    def forgetful(chunk: Chunk, *rest: object) -> None:
        attend(replace(chunk, kv=chunk.kv._replace(v_scale=torch.ones_like(chunk.kv.v_scale))), *rest)

    monkeypatch.setattr(triton, "attend_tiles", forgetful)
    assert named(list(try_kernel(chunk, Kernel.TRITON)), Status.FAILED) == [
        "triton: attend to groups, heads of 64, cache in FP8"
    ]


@pytest.mark.gpu
def test_the_kernels_of_this_gpu_pass(device: torch.device) -> None:
    checks = list(try_kernels(device))
    assert {check.status for check in checks} == {Status.OK}


def test_every_triton_kernel_has_its_trial() -> None:
    assert set(TRIAL_OF) == set(triton.__all__)


def test_every_trial_fails_where_its_kernel_does_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in TRIAL_OF:
        monkeypatch.setattr(triton, function, lambda *_: None)
    checks = try_triton(device)
    assert named(checks, Status.FAILED) == [check.name for check in checks]
    assert all(check.remedy for check in checks)
    json.loads(to_json(checks), parse_constant=pytest.fail)  # infinity is no JSON


def test_a_kernel_that_raises_is_named_alone_with_what_it_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of\nresources")

    monkeypatch.setattr(triton, "probe", refuse)
    [wrong] = [check for check in try_triton(device) if check.status is Status.FAILED]
    assert (wrong.name, wrong.what) == ("triton: probe, heads of 64", "out of resources")


def test_without_a_gpu_the_reference_is_tried_and_the_kernels_are_skipped() -> None:
    checks = list(try_kernels(torch.device("cpu")))
    assert named(checks, Status.SKIPPED) == ["kernels"]
    assert named(checks, Status.OK) == ["reference: block", "reference: vertical_slash"]


def test_a_wrong_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "attend", lambda chunk, *_: chunk.out.copy_(chunk.q))
    assert [check.status for check in try_reference()] == [Status.FAILED] * 2


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [0.0, 1.5]], [[1.0, 0.0], [0.0, 1.0]], 0.5),
        ([[torch.inf, 1.0]], [[torch.inf, 1.0]], 0.0),
        ([[1.0, 1.0]], [[torch.inf, 1.0]], torch.inf),
        ([[0.0, 3.0]], [[0.0, 0.0]], 3.0),
        ([[1.0]], [[1.0, 1.0]], torch.inf),
    ],
    ids=["equal", "one row", "both infinite", "one infinite", "nothing expected", "another shape"],
)
def test_the_error_is_that_of_the_worst_row(
    actual: list[list[float]], expected: list[list[float]], error: float
) -> None:
    assert largest_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error)


def test_what_is_no_number_is_no_small_error() -> None:
    assert not largest_error(torch.tensor([[torch.nan]]), torch.tensor([[1.0]])) <= 1.0


def test_hopper_with_the_library_tries_its_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(selftest.library, "why_missing", str)
    small = SMALL._asdict()
    monkeypatch.setattr(
        selftest,
        "make_chunk",
        lambda shape, _: make_chunk(Shape(**{**small, "head_dim": shape.head_dim}), torch.device("cpu")),
    )
    monkeypatch.setattr(
        selftest, "_compare", lambda trial, kernel, on: Check(f"{kernel}: {trial.name}{on}", Status.OK, "")
    )
    names = [check.name for check in try_kernels(torch.device("cuda", 0))]
    of_groups = ["masses of boxes", "select boxes", "masses of groups", "select groups by tile", "attend to groups"]
    made = ["probe", "attend to bands", *of_groups, "recall", "attend to all keys"]
    in_fp8 = [name for name in made if name not in OF_NUMBERS]
    # Of a cache in FP8 the CUDA probe, which the guard has too, reads heads of 128 alone.
    by_triton = {"probe", "recall"}
    of_64 = [*made, *(f"{name}, cache in FP8" for name in in_fp8 if name not in by_triton)]
    of_128 = [*made, *(f"{name}, cache in FP8" for name in in_fp8)]
    expected = [named_with(name, 64) for name in of_64] + [named_with(name, 128) for name in of_128]
    assert [name for name in names if name.startswith("cuda")] == expected
    of_triton = {name.partition(", heads of ")[2] for name in names if name.startswith("triton")}
    assert of_triton == {f"{size}{dtype}" for size in (64, 128, 256) for dtype in ("", ", cache in FP8")}
    # FP8 begins with Ada.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert not [check.name for check in try_kernels(torch.device("cuda", 0)) if "FP8" in check.name]
