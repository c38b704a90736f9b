# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM finds the plugin, and what `--attention-backend minference` then means to it."""

import logging
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

from minference_vllm import plugin
from minference_vllm.doctor.check import NO_GPU, Check, failed, ok, on_one_line, skipped

GROUP = "vllm.general_plugins"
ENTRY = "minference"
TARGET = f"{plugin.__name__}:{plugin.register.__name__}"
FILTER = "VLLM_PLUGINS"


def check_registration(environ: Mapping[str, str], expects_gpu: bool = True) -> Iterator[Check]:
    """The entry point, and what the backend is once vLLM has loaded its plugins, as each of its processes does."""
    entry = _check_entry_point(environ)
    yield entry
    if entry.remedy:
        yield skipped("backend", "vLLM does not load the plugin")
    elif not expects_gpu:
        yield skipped("backend", NO_GPU)
    else:
        yield _check_backend()


def _check_entry_point(environ: Mapping[str, str]) -> Check:
    if TARGET not in (entry.value for entry in entry_points(group=GROUP, name=ENTRY)):
        found = f"no {ENTRY!r} among the entry points of {GROUP}"
        return failed("plugin", found, "Install the package into the environment that holds vLLM: pip install .")
    names = environ.get(FILTER)
    if names is not None and ENTRY not in names.split(","):
        return failed("plugin", f"{FILTER}={names} leaves it out", f"Add {ENTRY} to {FILTER}, or unset it")
    return ok("plugin", f"{TARGET} is an entry point of {GROUP}")


def _check_backend() -> Check:
    with _collected(plugin.logger) as messages:
        plugin.load_plugins()
    path = plugin.selected_path()
    if path not in (plugin.GPU_BACKEND, plugin.CPU_BACKEND):
        found = f"{path} has taken the name" if path else "; ".join(messages) or "vLLM does not know the name"
        return failed("backend", found, f"List the plugins to load in {FILTER}: only one can be vLLM's CUSTOM backend")
    try:
        pkgutil.resolve_name(path)
    except Exception as error:
        remedy = "Install the vLLM that this package is tested with, in its build for this machine"
        return failed("backend", f"{path} cannot be imported: {on_one_line(error)}", remedy)
    if messages:
        return failed("backend", "; ".join(messages), "docs/troubleshooting.md says what each message means")
    return ok("backend", f"--attention-backend {ENTRY} is {path}")


@contextmanager
def _collected(logger: logging.Logger) -> Iterator[list[str]]:
    """Inside a `with` block, the warnings and errors of a logger and its children."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
