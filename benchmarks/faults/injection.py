# SPDX-License-Identifier: Apache-2.0
"""Breaks attention inside a server from outside, as a plugin of vLLM's that only this benchmark puts in its path.

vLLM loads this plugin in each of its processes, and the plugin wraps the functions that are to break; the package
itself knows nothing of it. A wrapper does nothing until a file appears, so that a server can be broken, and repaired,
while it serves.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

PLUGIN = "minference_faults"
VARIABLE = "BENCHMARK_FAULT"
SAID = "injected by benchmarks.faults"
ALWAYS = 10**9

ENTRY_POINTS = f"[vllm.general_plugins]\n{PLUGIN} = benchmarks.faults.injection:install\n"
METADATA = f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 1.0\n"


class Fault(StrEnum):
    """What attention does in place of its work."""

    RAISES = "raises"
    OUT_OF_MEMORY = "out of memory"
    GIVES_NAN = "gives NaN"
    NO_SCRATCH = "no scratch"
    """Out of memory when the engine starts, where memory that lasts for the engine's life is allocated."""
    NO_LAUNCH = "no launch"
    """An exception when the engine starts, at the first launch of kernels: in the plugin's dry run, on a GPU only."""


AT_START = {Fault.NO_SCRATCH, Fault.NO_LAUNCH}
"""Faults that are active from the start, without being armed."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault of one server.

    Attributes:
        fault: of its attention.
        is_dense: whether vLLM's own attention is to fail, or the sparse path's.
        folder: this server's; it holds the files that arm the fault and count how often it came.
    """

    fault: Fault
    is_dense: bool
    folder: Path

    def environ(self) -> dict[str, str]:
        """The variables that a server's environment needs in addition; also writes the plugin that vLLM is to find."""
        metadata = self.folder / f"{PLUGIN}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(METADATA)
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
        paths = filter(None, [str(self.folder), str(ROOT), os.environ.get("PYTHONPATH")])
        text = json.dumps({"fault": self.fault, "is_dense": self.is_dense, "folder": str(self.folder)})
        return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: text}

    @classmethod
    def from_json(cls, text: str) -> "Injection":
        fields = json.loads(text)
        return cls(Fault(fields["fault"]), fields["is_dense"], Path(fields["folder"]))

    def arm(self, times: int = ALWAYS) -> None:
        """From now on, attention fails this many times."""
        draft = self.folder / "arming"
        draft.write_text(str(times))
        draft.rename(self._armed)

    def disarm(self) -> None:
        self._armed.unlink()

    @property
    def fired(self) -> int:
        """How often attention has failed so far."""
        return self._fired.stat().st_size if self._fired.exists() else 0

    def fires(self) -> bool:
        """In the server: whether this call of attention is to fail."""
        if self.fault not in AT_START and not (self._armed.exists() and self.fired < int(self._armed.read_text())):
            return False
        with self._fired.open("ab") as file:
            file.write(b".")
        return True

    @property
    def _armed(self) -> Path:
        return self.folder / "armed"

    @property
    def _fired(self) -> Path:
        return self.folder / "fired"


def install() -> None:
    """The plugin's entry point: break what this server's environment names."""
    injection = Injection.from_json(os.environ[VARIABLE])
    if injection.is_dense:
        _break_stock(injection)
    elif injection.fault is Fault.NO_SCRATCH:
        _break_scratch(injection)
    else:
        _break_sparse(injection)


def stock_backend() -> Any:
    """The class of vLLM's own attention here."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend


def _break_stock(injection: Injection) -> None:
    """Break vLLM's attention layer, or for NO_SCRATCH its metadata builder, which allocates when the engine starts."""
    if injection.fault is Fault.NO_SCRATCH:
        builder = stock_backend().get_builder_cls()
        start = builder.__init__
        builder.__init__ = lambda *given, **named: fail(injection, lambda: start(*given, **named), None)
        return
    layer_class = stock_backend().get_impl_cls()
    stock = layer_class.forward

    @functools.wraps(stock)
    def forward(
        self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any,
        *scales: Any, **named: Any,
    ) -> Any:  # fmt: skip
        def attend() -> Any:
            return stock(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named)

        return attend() if attn_metadata is None else fail(injection, attend, output)

    layer_class.forward = forward


def _break_sparse(injection: Injection) -> None:
    """Break the functions that launch the sparse kernels, whichever kernels these are."""
    from minference_vllm import ops

    ours = ops.attend

    @functools.wraps(ours)
    def attend(chunk: Any, *rest: Any) -> Any:
        return fail(injection, lambda: ours(chunk, *rest), chunk.out)

    ops.attend = attend


def _break_scratch(injection: Injection) -> None:
    from minference_vllm.scratch import AttendBuffers

    ours = AttendBuffers.allocate
    AttendBuffers.allocate = staticmethod(lambda *sizes: fail(injection, lambda: ours(*sizes), None))


def fail(injection: Injection, attend: Callable[[], Any], output: Any) -> Any:
    """Attention as it is, or its fault if one is due.

    Args:
        output: the tensor that attention writes.
    """
    import torch

    if not injection.fires():
        return attend()
    if injection.fault is Fault.GIVES_NAN:
        result = attend()
        output.fill_(float("nan"))
        return result
    if injection.fault in (Fault.RAISES, Fault.NO_LAUNCH):
        raise RuntimeError(f"a kernel fails, {SAID}")
    raise torch.OutOfMemoryError(f"out of memory, {SAID}")
