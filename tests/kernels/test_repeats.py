# SPDX-License-Identifier: Apache-2.0
"""A layer that repeats what an earlier layer has launched launches exactly what it would launch by itself."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm import repeats
from minference_vllm.attention import Chooser, LayerState, choose, prefill
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import SparseIndex
from minference_vllm.kernels import tape
from minference_vllm.kernels.cuda import library
from minference_vllm.methods import Block, Method
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.repeats import Repeats
from tests.kernels import test_waits_for_nothing
from tests.kernels.cases import Case
from tests.kernels.layers import Launched, Layers
from tests.kernels.test_warm_up import output_of

METHODS: dict[str, Callable[[Kernel], Method]] = {
    **test_waits_for_nothing.METHODS,
    "block, halves by themselves": lambda kernel: Block(BlockSettings(rows_per_list=64), kernel),
}
CASES = {
    "bf16": Case("", num_rows=9000, context_len=1001, head_dim=128, dtype=torch.bfloat16),
    "fp8": Case("", num_rows=700, context_len=901, head_dim=128, has_fp8_kv=True, has_fp8_q=True, per_head=True),
    "sinks, HND": Case("", num_rows=300, context_len=512, layout="HND", has_sinks=True),
    "heads of 256": Case("", num_rows=300, context_len=512, head_dim=256),
}
every_method = pytest.mark.parametrize("make_method", METHODS.values(), ids=METHODS)
every_kernel = pytest.mark.parametrize("kernel", [Kernel.TRITON, Kernel.CUDA])
SMALL = Case("", num_rows=150, context_len=307, num_qo_heads=4, num_kv_heads=2, dtype=torch.float32)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """Nothing is launched, but noted."""
    found = Launched()
    test_waits_for_nothing.replace_kernels(monkeypatch, found.triton)
    monkeypatch.setattr(library, "enqueue", found.cuda)
    monkeypatch.setattr(library, "num_multiprocessors", lambda _: 132)
    with found:
        yield found


def alone(layers: Layers, method: Method, launched: Launched) -> list[list[Any]]:
    """What each layer launches by itself."""
    launched.take()
    found = []
    for chunk, state in zip(layers.chunks, layers.states, strict=True):
        prefill(chunk, method, state)
        found.append(launched.take())
    return found


def repeated(layers: Layers, method: Method, launched: Launched, of: Repeats, chooser: Chooser = choose) -> list[Any]:
    """What each layer launches if it may repeat another's launches."""
    found = []
    for chunk, state in zip(layers.chunks, layers.states, strict=True):
        of.prefill(chunk, method, state, chooser)
        found.append(launched.take())
    return found


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the layers that do not repeat."""
    found: list[int] = []

    def noted(chunk: Chunk, method: Method, layer: LayerState, chooser: Chooser = choose) -> SparseIndex:
        found.append(layer.position)
        return prefill(chunk, method, layer, chooser)

    monkeypatch.setattr(repeats, "prefill", noted)
    return found


@every_method
@every_kernel
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_repeated_launches_are_those_of_the_layer_alone(
    case: Case,
    kernel: Kernel,
    make_method: Callable[[Kernel], Method],
    launched: Launched,
    prefills: list[int],
) -> None:
    method = make_method(kernel)
    layers = Layers.of(case, method, may_end=case is not CASES["fp8"])
    expected = alone(layers, method, launched)
    assert repeated(layers, method, launched, Repeats()) == expected
    assert prefills == [0]
    for one, other in itertools.combinations(expected, 2):
        assert one != other, "each layer has tensors of its own"


CHANGES: dict[str, Callable[[Chunk], Chunk]] = {
    "other strides of the queries": lambda chunk: replace(chunk, q=padded(chunk.q)),
    "other strides of the output": lambda chunk: replace(chunk, out=padded(chunk.out)),
    "queries that are not aligned": lambda chunk: replace(chunk, q=shifted(chunk.q)),
    "another context": lambda chunk: replace(chunk, context_len=chunk.context_len - 1),
    "fewer rows": lambda chunk: chunk.of_rows(0, chunk.num_rows - 1),
    "another scale": lambda chunk: replace(chunk, scale=2 * chunk.scale),
    "another block table": lambda chunk: replace(chunk, kv=chunk.kv._replace(block_table=chunk.kv.block_table.clone())),
    "sinks": lambda chunk: replace(chunk, sinks=torch.zeros(chunk.num_qo_heads)),
    "keys and values that lie apart": lambda chunk: replace(chunk, kv=apart(chunk.kv)),
}


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between the rows."""
    wide = tensor.new_zeros(len(tensor), tensor.shape[1] + 1, tensor.shape[2])
    wide[:, :-1] = tensor
    return wide[:, :-1]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers one element further from an aligned address."""
    flat = tensor.new_zeros(tensor.numel() + 1)
    flat[1:] = tensor.flatten()
    return flat[1:].view(tensor.shape)


def apart(kv: PagedKV) -> PagedKV:
    """Keys and values in two tensors, laid out alike."""
    k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (kv.k, kv.v))
    return kv._replace(k=k, v=v)


@every_kernel
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_differs_does_not_repeat(
    kernel: Kernel, change: Callable[[Chunk], Chunk], launched: Launched, prefills: list[int]
) -> None:
    method = Block(BlockSettings(), kernel)
    layers = Layers.of(CASES["bf16"], method)
    layers.chunks[1] = change(layers.chunks[1])
    expected = alone(layers, method, launched)
    assert repeated(layers, method, launched, Repeats()) == expected
    assert prefills == [0, 1]


@every_kernel
def test_keys_and_values_may_lie_apart_in_all_layers(kernel: Kernel, launched: Launched, prefills: list[int]) -> None:
    method = Block(BlockSettings(), kernel)
    layers = Layers.of(CASES["bf16"], method)
    layers.chunks[:] = [replace(chunk, kv=apart(chunk.kv)) for chunk in layers.chunks]
    expected = alone(layers, method, launched)
    assert repeated(layers, method, launched, Repeats()) == expected
    assert prefills == [0]


def test_layers_whose_tensors_overlap_never_repeat(launched: Launched, prefills: list[int]) -> None:
    method = Block(BlockSettings(), Kernel.CUDA)
    layers = Layers.of(CASES["bf16"], method)
    layers.chunks[:] = [replace(chunk, out=chunk.q) for chunk in layers.chunks]
    expected = alone(layers, method, launched)
    assert repeated(layers, method, launched, Repeats()) == expected
    assert prefills == [0, 1, 2]


def test_nothing_is_repeated_after_the_step(launched: Launched, prefills: list[int]) -> None:
    method, of = Block(BlockSettings(), Kernel.CUDA), Repeats()
    layers = Layers.of(CASES["bf16"], method)
    repeated(layers, method, launched, of)
    of.forget()
    repeated(layers, method, launched, of)
    assert prefills == [0, 0]


def test_a_chooser_is_called_for_every_layer_unless_it_is_repeatable(launched: Launched, prefills: list[int]) -> None:
    method = Block(BlockSettings(), Kernel.CUDA)
    layers = Layers.of(CASES["bf16"], method)
    repeated(layers, method, launched, Repeats(), lambda *of: choose(*of))
    assert prefills == [0, 1, 2]


def test_a_layer_that_fails_is_not_repeated(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    method, of = Block(BlockSettings(), Kernel.CUDA), Repeats()
    layers = Layers.of(CASES["bf16"], method)
    expected = alone(layers, method, launched)

    def fail(function: str, *_: Any) -> None:
        raise RuntimeError(function)

    with monkeypatch.context() as patch:
        patch.setattr(library, "enqueue", fail)
        with pytest.raises(RuntimeError, match="minference_group_masses"):
            of.prefill(layers.chunks[0], method, layers.states[0])
    assert tape.current_tape() is None
    launched.take()
    assert repeated(layers, method, launched, of) == expected


@pytest.mark.parametrize(
    "kernel", [Kernel.TRITON, pytest.param(Kernel.CUDA, marks=[pytest.mark.gpu, pytest.mark.hopper])]
)
@pytest.mark.parametrize("make_method", [METHODS["block"], METHODS["a share"]], ids=["block", "a share"])
def test_repeated_layers_attend_as_alone(
    kernel: Kernel, make_method: Callable[[Kernel], Method], device: torch.device
) -> None:
    method, case = make_method(kernel), SMALL
    if device.type == "cuda":
        case = replace(SMALL, num_rows=3000, context_len=9001, dtype=torch.bfloat16)
    expected, found = (Layers.of(case, method, device=device) for _ in range(2))
    for layers in (expected, found):
        for number, chunk in enumerate(layers.chunks):
            chunk.q.mul_(1 + number)
            chunk.kv.v.add_(number)
    for chunk, state in zip(expected.chunks, expected.states, strict=True):
        prefill(chunk, method, state)
    of = Repeats()
    for chunk, state in zip(found.chunks, found.states, strict=True):
        of.prefill(chunk, method, state)
    for one, other in zip(found.chunks, expected.chunks, strict=True):
        assert torch.equal(one.out, other.out)
    for one_state, other_state in zip(found.states, expected.states, strict=True):
        assert one_state.guard and other_state.guard
        assert torch.equal(one_state.guard.totals.flat, other_state.guard.totals.flat)
    assert torch.equal(found.states[0].attend.kept_pairs, expected.states[0].attend.kept_pairs)


def test_a_repeated_triton_kernel_is_launched_in_the_variant_that_was_selected() -> None:
    launched = output_of("tests.kernels.selected").split()
    assert launched[0] == "_means_kernel" and launched[-1] == "_attend_heads_kernel"
    assert len(launched) == 8
