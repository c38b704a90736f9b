# SPDX-License-Identifier: Apache-2.0
"""Everything that may break: how it is provoked, and what stock vLLM and the plugin are promised to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from benchmarks.faults.injection import ALWAYS, Fault

# Every key is kept, so that answers can be compared with dense attention's. All chunks of a long prompt run sparse.
SETTINGS: dict[str, Any] = {
    "min_seq_len": 1024,
    "min_chunk": 64,
    "log_every": 1,  # what ran sparse is read from the log, which needs no metrics
    "method": {"name": "block", "share": 1.0},
}


class Outcome(StrEnum):
    """What became of the server."""

    GOES_ON = "goes on"
    ENDS = "ends"
    REFUSES = "does not start"


class Act(StrEnum):
    """What is done to a server while it serves."""

    NOTHING = "nothing"
    ARM = "arm"
    REMOVE_METRICS = "remove metrics"
    DELETE_PATTERN = "delete pattern"
    KILL_ENGINE = "kill engine"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to break a server.

    Attributes:
        how: what is done, told to the reader of the result.
        stock, ours: what each server should do. None: stock vLLM has nothing of the kind that could break.
        fault: the fault of attention in the server's processes.
        times: how often the fault comes.
        act: what is done while it serves.
        has_bad_metrics_folder: whether the folder for metrics cannot be made.
        settings: of the plugin, in addition to SETTINGS.
        said: what the plugin's server must say in its log.
        is_answered_right: whether the plugin's server must answer as dense attention would while the fault lasts.
        starts_sparse: whether long prompts run sparse before the fault.
        stays_sparse: whether they do after the fault.
        needs_gpu: whether there is nothing to break without a GPU.
    """

    how: str
    stock: Outcome | None
    ours: Outcome
    fault: Fault | None = None
    times: int = ALWAYS
    act: Act = Act.NOTHING
    has_bad_metrics_folder: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""
    is_answered_right: bool = True
    starts_sparse: bool = True
    stays_sparse: bool = True
    needs_gpu: bool = False


CASES: dict[str, Case] = {
    "a kernel raises once": Case(
        "the function that launches the attention kernel raises RuntimeError, once",
        Outcome.ENDS,
        Outcome.GOES_ON,
        Fault.RAISES,
        times=1,
        act=Act.ARM,
        said="sparse attention failed in layer",
    ),
    "a kernel raises always": Case(
        "the function that launches the attention kernel raises RuntimeError, whenever it is called",
        Outcome.ENDS,
        Outcome.GOES_ON,
        Fault.RAISES,
        act=Act.ARM,
        said="times in a row. All runs dense",
        stays_sparse=False,
    ),
    "out of memory in a step": Case(
        "the function that launches the attention kernel raises torch.OutOfMemoryError, whenever it is called",
        Outcome.ENDS,
        Outcome.GOES_ON,
        Fault.OUT_OF_MEMORY,
        act=Act.ARM,
        said="times in a row. All runs dense",
        stays_sparse=False,
    ),
    "NaN, debug on": Case(
        'attention writes NaN; the plugin has "debug": true, which makes it an exception, as one of vLLM\'s own',
        Outcome.GOES_ON,
        Outcome.ENDS,
        Fault.GIVES_NAN,
        act=Act.ARM,
        settings={"debug": True},
        said="the output holds NaN or infinity",
    ),
    "NaN, debug off": Case(
        "attention writes NaN for as long as one prompt is read; what is answered then is worthless in both",
        Outcome.GOES_ON,
        Outcome.GOES_ON,
        Fault.GIVES_NAN,
        act=Act.ARM,
        is_answered_right=False,
    ),
    "out of memory at start": Case(
        "torch.OutOfMemoryError at the engine's start: where the plugin claims scratch, in vLLM's builder of metadata",
        Outcome.REFUSES,
        Outcome.REFUSES,
        Fault.NO_SCRATCH,
        said="OutOfMemoryError",
    ),
    "no launch at start": Case(
        "the function that launches the attention kernel raises RuntimeError from the engine's start on: first in the "
        "plugin's dry run, after which nothing may call it",
        None,
        Outcome.GOES_ON,
        Fault.NO_LAUNCH,
        times=1,
        said="sparse attention cannot run here, and all runs dense",
        starts_sparse=False,
        stays_sparse=False,
        needs_gpu=True,
    ),
    "no folder for metrics": Case(
        "MINFERENCE_METRICS_DIR lies below a plain file",
        None,
        Outcome.GOES_ON,
        has_bad_metrics_folder=True,
        said="metrics will be missing on /metrics",
    ),
    "metrics folder vanishes": Case(
        "the folder of MINFERENCE_METRICS_DIR is deleted while the server runs",
        None,
        Outcome.GOES_ON,
        act=Act.REMOVE_METRICS,
        said="metrics cannot be written",
    ),
    "pattern file deleted": Case(
        "the pattern file that the server was started with is deleted while it runs",
        None,
        Outcome.GOES_ON,
        act=Act.DELETE_PATTERN,
        said="the method is vertical_slash with the sizes of the pattern file",
    ),
    "engine killed": Case(
        "SIGKILL to the largest process that the server has started, in the middle of an answer",
        Outcome.ENDS,
        Outcome.ENDS,
        act=Act.KILL_ENGINE,
    ),
}
