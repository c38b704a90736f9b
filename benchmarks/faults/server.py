# SPDX-License-Identifier: Apache-2.0
"""A server to be broken: how it is started, and what is done to it."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.cases import SETTINGS, Act, Case
from benchmarks.faults.injection import PLUGIN, Injection
from demo.server import environment
from minference_vllm.evals import serve
from minference_vllm.metrics.publisher import METRICS_DIR

OURS = "minference"
LOG = "log"
METRICS = "metrics"
PATTERN = "pattern.json"
ALL_KEYS = 8192  # columns and diagonals, as many as a prompt may have tokens at most
TOKENS_LOGGED = re.compile(r"MInference: ([\d,]+) prompt tokens sparse")
FAULTS_LOGGED = re.compile(r"sparse_fault ([\d,]+)")


@dataclass(frozen=True, slots=True)
class Trial:
    """One server under one case.

    Attributes:
        model: a directory.
        serve: options of `vllm serve`, as a shell reads them.
        case: what is to break.
        is_dense: whether this is stock vLLM without the plugin; otherwise it is the plugin's server.
        folder: an empty one for all of the server's files. Its path must be short: sockets lie below it.
    """

    model: str
    serve: str
    case: Case
    is_dense: bool
    folder: Path

    @property
    def injection(self) -> Injection | None:
        return Injection(self.case.fault, self.is_dense, self.folder / "plugin") if self.case.fault else None

    @property
    def log(self) -> str:
        return (self.folder / LOG).read_text(errors="replace")

    @contextmanager
    def running(self) -> Iterator[serve.ServerProcess]:
        """The server, inside a `with` block.

        Raises:
            ServerError: it did not come up.
        """
        arguments = serve.arguments(self.model, self.serve, self.is_dense)
        if not self.is_dense:
            arguments += ["--additional-config", json.dumps({OURS: self._settings()})]
        (self.folder / "tmp").mkdir(parents=True)
        with serve.started(arguments, self.folder / LOG, self._environ()) as server:
            yield server

    def act(self, process: int) -> None:
        """Do what the case demands while the server runs.

        Args:
            process: the first of the server's processes.
        """
        if self.case.act is Act.ARM and self.injection:
            self.injection.arm(self.case.times)
        elif self.case.act is Act.REMOVE_METRICS:
            shutil.rmtree(self.folder / METRICS)
        elif self.case.act is Act.DELETE_PATTERN:
            (self.folder / PATTERN).unlink()
        elif self.case.act is Act.KILL_ENGINE:
            largest(process).send_signal(signal.SIGKILL)

    def mend(self) -> None:
        """Take the fault away, if that is possible."""
        if self.case.act is Act.ARM and self.injection:
            self.injection.disarm()

    @property
    def fired(self) -> int | None:
        """How often the injected fault came; None if none is injected."""
        return self.injection.fired if self.injection else None

    def logged(self) -> tuple[int, int]:
        """Prompt tokens that ran sparse, and that ran dense because of a fault of the sparse path, from the log."""
        return _total(TOKENS_LOGGED, self.log), _total(FAULTS_LOGGED, self.log)

    def left_folders(self) -> int:
        """The number of metrics folders that the server has left behind."""
        return len(list((self.folder / "tmp").glob("minference-metrics-*")))

    def _settings(self) -> dict[str, object]:
        settings = {**SETTINGS, **self.case.settings}
        if self.case.act is Act.DELETE_PATTERN:
            path = self.folder / PATTERN
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(pattern_file(self.model)))
            settings["method"] = {"name": "auto", "pattern_file": str(path)}
        return settings

    def _environ(self) -> dict[str, str]:
        plugins = [*([] if self.is_dense else [OURS]), *([PLUGIN] if self.injection else [])]
        environ = environment(self.model) | {
            "VLLM_PLUGINS": ",".join(plugins),
            "TMPDIR": str(self.folder / "tmp"),
            "VLLM_LOGGING_LEVEL": "INFO",  # what ran sparse is read from lines of this level
        }
        environ.pop(METRICS_DIR, None)
        if self.case.has_bad_metrics_folder:
            environ[METRICS_DIR] = str(Path(__file__) / METRICS)
        if self.case.act is Act.REMOVE_METRICS:
            environ[METRICS_DIR] = str(self.folder / METRICS)
        return environ | (self.injection.environ() if self.injection else {})


def descendants(process: int) -> list[psutil.Process]:
    """All processes that a process has started, and those that they have started."""
    return psutil.Process(process).children(recursive=True)


def largest(process: int) -> psutil.Process:
    """The descendant that holds the most memory: the one with the model."""
    return max(descendants(process), key=lambda child: child.memory_info().rss)


def pattern_file(model: str) -> dict[str, object]:
    """A pattern file for a model, with which each head keeps all keys."""
    config = json.loads(Path(model, "config.json").read_text())
    heads = config["num_attention_heads"]
    geometry = {
        "num_layers": config["num_hidden_layers"],
        "num_qo_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }
    layer = [[ALL_KEYS, ALL_KEYS]] * heads
    return {
        "version": 1,
        "models": [],
        "geometry": geometry,
        "provenance": {"source": os.path.basename(__file__)},
        "layers": [layer] * geometry["num_layers"],
    }


def _total(pattern: re.Pattern[str], log: str) -> int:
    return sum(int(number.replace(",", "")) for number in pattern.findall(log))
