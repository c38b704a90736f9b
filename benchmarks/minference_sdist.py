# SPDX-License-Identifier: Apache-2.0
"""MInference's own kernels as peers, its index (CUDA) and its sparse attention (Triton), from its sdist on PyPI:

    MINFERENCE_SKIP_CUDA_BUILD=TRUE pip download --no-binary :all: --no-deps --no-build-isolation minference==0.1.6.0

Its code is no part of this repository. Two files of the unpacked source distribution are loaded by their paths, because
importing the package would import everything that it depends on.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import Inputs
from benchmarks.peers import BLOCK, Attention, PeerIndex, PeerMissing
from minference_vllm.reference.pages import gather

INDEX_SOURCE = "csrc/vertical_slash_index.cu"
INDEX_LAUNCHER = "convert_vertical_slash_indexes_64x64"
KERNEL_SOURCE = "minference/ops/pit_sparse_flash_attention_v2.py"
PACKAGE = "minference_sdist"


class MInference:
    """The index and the Triton kernel of the unpacked source distribution `minference==0.1.6.0`."""

    def __init__(self, sdist: Path | None) -> None:
        self._sdist = sdist

    def index(self, vertical: torch.Tensor, slash: torch.Tensor, tokens: int) -> Callable[[], PeerIndex]:
        """A call that builds the index.

        Args:
            vertical: [num_qo_heads, num_verticals] int32, ascending.
            slash: [num_qo_heads, num_slashes] int32, ascending.
            tokens: length of the prompt.
        """
        num_heads, num_slashes = slash.shape
        if num_heads * -(-tokens // BLOCK) * num_slashes >= 2**31:
            raise PeerMissing("MInference's index counts its entries, heads x tiles x slashes, in 32 bits")
        convert, length = self._kernel.convert_vertical_slash_indexes, _length(tokens, slash)
        arguments = length, vertical[None], slash.flip(1)[None].contiguous(), tokens, BLOCK, BLOCK
        return lambda: PeerIndex(*convert(*arguments))

    def triton(self, inputs: Inputs, index: PeerIndex) -> Attention:
        """The kernel, on keys and values that are repeated for every query head, as it needs them."""
        num_rows, num_qo_heads, _ = inputs.q.shape
        # [1, num_qo_heads, tokens, head_dim]
        q = inputs.q.transpose(0, 1).contiguous()[None]
        group = num_qo_heads // inputs.kv.k.shape[1]
        k, v = (cache.repeat_interleave(group, 0)[None] for cache in gather(inputs.kv, num_rows))
        attend, length = self._kernel._triton_mixed_sparse_attention, _length(num_rows, q)
        return lambda: attend(q, k, v, length, *index, inputs.scale)[0].transpose(0, 1)

    @cached_property
    def _kernel(self) -> Any:
        """MInference's module with the Triton kernel, under a name of our own."""
        if self._sdist is None:
            raise PeerMissing("--minference-sdist was not given")
        build = compile_index(self._sdist / INDEX_SOURCE)
        stubs = {name: ModuleType(name) for name in (PACKAGE, f"{PACKAGE}.cuda", f"{PACKAGE}.ops")}
        for stub in stubs.values():
            stub.__path__ = []
        stubs[f"{PACKAGE}.cuda"].convert_vertical_slash_indexes = build  # type: ignore[attr-defined]
        sys.modules.update(stubs)
        name = f"{PACKAGE}.ops.{Path(KERNEL_SOURCE).stem}"
        spec = importlib.util.spec_from_file_location(name, self._sdist / KERNEL_SOURCE)
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def compile_index(source: Path) -> Callable[..., tuple[torch.Tensor, ...]]:
    """MInference's CUDA file without its binding, which takes a minute and torch's headers: not all machines have them.

    The kernel and its launcher are compiled as they are. What the binding does, allocating zeros, is done below.
    """
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    with tempfile.TemporaryDirectory(prefix="minference-") as directory:
        stripped, shared = Path(directory, "index.cu"), Path(directory, "index.so")
        stripped.write_text(without_binding(source.read_text()))
        command = [nvcc, "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-o", str(shared), str(stripped)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PeerMissing(f"{INDEX_SOURCE} does not compile: {done.stderr.strip()[-500:]}")
        launch = getattr(ctypes.CDLL(str(shared)), INDEX_LAUNCHER)

    def convert(
        seqlens: torch.Tensor, vertical: torch.Tensor, slash: torch.Tensor, tokens: int, block_m: int, block_n: int
    ) -> tuple[torch.Tensor, ...]:
        assert block_m == block_n == BLOCK
        batch, num_heads, num_slashes = slash.shape
        num_tiles, num_verticals = -(-tokens // BLOCK), vertical.shape[2]
        shapes = ((), (num_slashes,), (), (num_verticals,))
        made = tuple(seqlens.new_zeros(batch, num_heads, num_tiles, *shape) for shape in shapes)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (seqlens, vertical, slash, *made)]
        launch(*pointers, batch, num_heads, num_tiles, num_verticals, num_slashes)
        return made

    return convert


def without_binding(source: str) -> str:
    """The CUDA file up to its torch function, with C linkage for the launcher."""
    kept, found, _ = source.partition("std::vector<at::Tensor>")
    kept = re.sub(r"^#include <(pybind11|torch)/.*$", "", kept, flags=re.MULTILINE)
    kept, launchers = re.subn(rf"^void {INDEX_LAUNCHER}\(", r'extern "C" \g<0>', kept, flags=re.MULTILINE)
    if not (found and launchers == 1):
        raise PeerMissing(f"{INDEX_SOURCE} is not that of minference 0.1.6.0")
    return kept


def _length(tokens: int, like: torch.Tensor) -> torch.Tensor:
    """[1] int32: the form in which its kernels take the length of a prompt."""
    return torch.tensor([tokens], dtype=torch.int32, device=like.device)
