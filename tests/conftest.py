# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run under Triton's interpreter; the switch must be set before Triton is imported."""

import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

LONGEST = (
    "test_serving",
    "test_features",
    "test_emulated",
    "test_models",
    "test_api_servers",
    "test_stages",
    "test_search",
    "test_vllm_033",
    "test_boxes",
    "test_emulated_fp8",
    "test_kernels",
    "test_emulated_masses",
    "test_invariants",
    "test_repeats",
)
"""Files of tests, those that take longest on a machine without a GPU first."""

ON_CI = "MINFERENCE_CI" in os.environ
"""Whether this is continuous integration (.ci/run): there, tests fail for want of a tool that others may lack."""

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # The tests' tensors are small: several threads would wait for each other in every operation, here and in the
    # processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    from tests.interpreter import patch_once_a_launch

    patch_once_a_launch()


def import_or_skip(name: str) -> ModuleType:
    """As pytest.importorskip, but a missing module is an error in continuous integration."""
    return importlib.import_module(name) if ON_CI else pytest.importorskip(name)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def log_lines() -> Iterator[list[tuple[str, str]]]:
    """Level and text of what the plugin logs. vLLM's loggers do not propagate, so caplog hears of it at times only."""
    lines: list[tuple[str, str]] = []
    logger, handler = logging.getLogger("vllm.minference"), logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def counts_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the threads that a test has started: one would publish into the folder, or the log, of a later test."""
    from minference_vllm.metrics.counters import Counters

    started: list[Counters] = []
    start = Counters.start

    def start_and_note(counters: Counters) -> None:
        started.append(counters)
        start(counters)

    monkeypatch.setattr(Counters, "start", start_and_note)
    yield
    for counters in started:
        counters.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from minference_vllm.kernels.cuda import library

    # Several processes that test end together if what takes longest comes first.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    has_gpu = torch.cuda.is_available()
    has_hopper = has_gpu and torch.cuda.get_device_capability()[0] == 9
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif item.get_closest_marker("hopper") and not has_hopper:
            item.add_marker(pytest.mark.skip(reason="needs an H100 or H200"))
        elif item.get_closest_marker("hopper") and library.why_missing():
            item.add_marker(pytest.mark.skip(reason=library.why_missing()))
