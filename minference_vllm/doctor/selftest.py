# SPDX-License-Identifier: Apache-2.0
"""Runs every operation with the kernels of this machine, and compares it with the reference."""

from collections.abc import Iterator

import torch

from minference_vllm.attention import LayerState, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.doctor.check import Check, failed, ok, on_one_line, skipped
from minference_vllm.doctor.trials import ROUNDED, ROWS, Shape, Trial, in_fp8, make_chunk, make_trials, scratch_shape
from minference_vllm.kernels.cuda import library
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.ops.kernel import HOPPER
from minference_vllm.ops.means import FP8_CAPABILITY
from minference_vllm.plan import SUPPORTED_HEAD_DIMS
from minference_vllm.reference.dense import dense
from minference_vllm.scratch import AttendBuffers

REMEDY = {
    Kernel.CUDA: 'Serve with "kernel": "triton", and report this',
    Kernel.TRITON: "Serve without the plugin, and report this",
    Kernel.REFERENCE: "Reinstall PyTorch, or report this",
}


def try_kernels(device: torch.device) -> Iterator[Check]:
    """Each operation with each kernel that runs here; without a GPU, the reference against dense attention."""
    if device.type != "cuda":
        yield skipped("kernels", "no GPU to run them on")
        yield from try_reference()
        return
    capability = torch.cuda.get_device_capability(device)
    of_kernels: dict[Kernel, tuple[int, ...]] = {Kernel.TRITON: SUPPORTED_HEAD_DIMS}
    if capability[0] == HOPPER and not library.why_missing():
        of_kernels[Kernel.CUDA] = library.SUPPORTED_HEAD_DIMS
    for kernel, head_dims in of_kernels.items():
        for head_dim in head_dims:
            chunk = make_chunk(Shape(head_dim=head_dim), device)
            yield from try_kernel(chunk, kernel)
            if capability >= FP8_CAPABILITY:
                yield from try_kernel(in_fp8(chunk), kernel)


def try_kernel(chunk: Chunk, kernel: Kernel) -> Iterator[Check]:
    """Each operation for which this kernel has code of its own; over an FP8 cache, only those that read the cache."""
    for trial in make_trials(chunk, kernel):
        if (kernel is not Kernel.CUDA or trial.has_cuda) and (trial.reads_cache or not chunk.is_quantized):
            cache = ", cache in FP8" if chunk.is_quantized else ""
            yield _compare(trial, kernel, f", heads of {chunk.head_dim}{cache}")


def _compare(trial: Trial, kernel: Kernel, on_what: str) -> Check:
    name = f"{kernel}: {trial.name}{on_what}"
    try:
        expected, actual = trial.run(Kernel.REFERENCE), trial.run(kernel)
        errors = [largest_error(got, want) for (got, _), (want, _) in zip(actual, expected, strict=True)]
    except Exception as error:  # of Triton's compiler or CUDA
        return failed(name, on_one_line(error), REMEDY[kernel])
    compared = list(zip(errors, (tolerance for _, tolerance in expected), strict=True))
    # Not `error > limit`, because a NaN must count as wrong too.
    wrong = [f"{error:.1e} where {limit:.1e} is allowed" for error, limit in compared if not error <= limit]
    if wrong:
        return failed(name, f"error relative to the reference: {', '.join(wrong)}", REMEDY[kernel])
    return ok(name, f"error relative to the reference: {max(errors):.1e}", errors=errors)


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a row (last dimension), relative to its norm or to the mean norm, whichever is more."""
    if actual.shape != expected.shape:
        return torch.inf
    got, want = actual.double(), expected.double()
    difference = torch.where(got == want, 0.0, got - want).norm(dim=-1)
    size = want.where(want.isfinite(), 0.0).norm(dim=-1)
    scale = size.clamp(min=size.mean()) if size.numel() else size
    errors = torch.where(difference == 0, 0.0, difference / scale.where(scale > 0, 1.0)).flatten()
    return float(errors.max()) if errors.numel() else 0.0


def try_reference() -> Iterator[Check]:
    """With settings that keep every key, each method must give what dense attention gives."""
    device = torch.device("cpu")
    chunk = make_chunk(Shape(), device)
    whole = torch.empty_like(chunk.out)
    dense(chunk.q, chunk.kv, chunk.context_len, chunk.scale, whole)
    methods: tuple[Method, ...] = (
        Block(BlockSettings(share=1.0, max_density=1.0), Kernel.REFERENCE),
        VerticalSlash(VerticalSlashSettings(vertical_size=2**20, slash_size=2**20), Kernel.REFERENCE),
    )
    for method in methods:
        shape = scratch_shape(chunk)
        budgets = method.budgets(chunk.num_qo_heads, device)
        attend = AttendBuffers.allocate(chunk.num_qo_heads, ROWS, device)
        prefill(chunk, method, LayerState(0, budgets, method.scratch(shape, device), attend))
        name, error = f"{Kernel.REFERENCE}: {method.settings.name}", largest_error(chunk.out, whole)
        if error <= ROUNDED:
            yield ok(name, f"with all keys, error relative to dense attention: {error:.1e}")
        else:
            found = f"with all keys, error relative to dense attention: {error:.1e} where {ROUNDED:.1e} is allowed"
            yield failed(name, found, REMEDY[Kernel.REFERENCE])
