# SPDX-License-Identifier: Apache-2.0
"""Runs one server under one case, and says what became of it."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults import answers
from benchmarks.faults.answers import Answer
from benchmarks.faults.cases import Act, Outcome
from benchmarks.faults.server import Trial, descendants
from benchmarks.soak.watch import scrape
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.serve import ServerProcess
from minference_vllm.metrics.families import BROKEN

END_TIMEOUT_S = 60.0
"""A server that still runs so long after its last answer goes on."""
SETTLE_S = 3.0  # counts come to the log once a second
LEFT_TIMEOUT_S = 15.0  # a server's processes may end so long after the first
KILLED_AFTER_S = 1.0
MANY_TOKENS = 4000  # an answer that is not over when its engine is killed
ENGINE_ERRORS = (answers.NO_ANSWER, 500)
"""What a request gets whose engine dies: an error, or a connection that breaks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a server.

    Attributes:
        outcome: see Outcome.
        fired: calls of attention that failed by injection; None where none is injected.
        before_equal, during_equal, after_equal: whether its answers were, as far as they are sure, those of a dense
            server that nothing befell.
        during_status: HTTP status of the request that met the fault; 0 for a broken connection.
        exit_status: of a server that has ended by itself.
        seconds_to_end: from the fault to that.
        sparse_tokens_before, sparse_tokens_after: prompt tokens that ran sparse before the fault, and once it was over.
        fault_tokens: prompt tokens that ran dense because the sparse path failed.
        broken_ranks: on which that is given up, as /metrics says at last; None where it says nothing of it.
        says_so: whether the log holds what the case promises.
        left_processes: that a server which has ended by itself had started, and which still run; None for others.
        left_folders: for metrics, after the server's end.
    """

    outcome: Outcome
    fired: int | None = None
    before_equal: bool | None = None
    during_status: int | None = None
    during_equal: bool | None = None
    after_equal: bool | None = None
    exit_status: int | None = None
    seconds_to_end: float | None = None
    sparse_tokens_before: int | None = None
    sparse_tokens_after: int | None = None
    fault_tokens: int | None = None
    broken_ranks: int | None = None
    says_so: bool | None = None
    left_processes: int | None = None
    left_folders: int = 0

    def row(self) -> dict[str, Any]:
        return asdict(self)


def run(trial: Trial, text: str, expected: list[Answer]) -> Finding:
    """Start the server, ask, break it, ask, mend it, ask.

    Args:
        text: what prompts are cut from.
        expected: what a dense server answers to answers.ask_all.
    """
    found: dict[str, Any] = {"outcome": Outcome.REFUSES}
    try:
        with trial.running() as server:
            found["before_equal"] = answers.all_agree(expected, answers.ask_all(server.url, trial.model, text))
            found["sparse_tokens_before"], _ = _counted(trial)
            found |= _break(trial, server, text, expected)
    except ServerError:
        pass  # it did not come up, as the outcome says; the log has the rest
    says_so = trial.case.said in trial.log if trial.case.said and not trial.is_dense else None
    return Finding(**found, fired=trial.fired, says_so=says_so, left_folders=trial.left_folders())


def _break(trial: Trial, server: ServerProcess, text: str, expected: list[Answer]) -> dict[str, Any]:
    """What happens from the fault on."""
    began, family = time.monotonic(), descendants(server.process.pid)
    during = _ask_meanwhile(trial, server, text)
    found: dict[str, Any] = {"during_status": during.status, "during_equal": expected[0].agrees(during)}
    if during.status in ENGINE_ERRORS:
        try:
            found["exit_status"] = server.process.wait(END_TIMEOUT_S)
            found["seconds_to_end"] = round(time.monotonic() - began, 1)
            # Before the server's block is left, which ends whatever is there.
            _, alive = psutil.wait_procs(family, LEFT_TIMEOUT_S)
            return {**found, "outcome": Outcome.ENDS, "left_processes": len(alive)}
        except subprocess.TimeoutExpired:
            pass
    trial.mend()
    before, _ = _counted(trial)
    found["after_equal"] = answers.all_agree(expected, answers.ask_all(server.url, trial.model, text))
    sparse, faults = _counted(trial, since=before or 0)
    found |= {"sparse_tokens_after": sparse, "fault_tokens": faults, "exit_status": server.process.poll()}
    if found["exit_status"] is None:
        found["broken_ranks"] = broken_ranks(scrape(server.url))
    return {**found, "outcome": Outcome.GOES_ON if found["exit_status"] is None else Outcome.ENDS}


def _ask_meanwhile(trial: Trial, server: ServerProcess, text: str) -> Answer:
    """The answer to a long prompt that meets the fault."""
    prompt = answers.long_prompts(text)[0]
    if trial.case.act is not Act.KILL_ENGINE:
        trial.act(server.process.pid)
        return answers.ask(server.url, trial.model, prompt)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(answers.ask, server.url, trial.model, prompt, MANY_TOKENS)
        time.sleep(KILLED_AFTER_S)
        trial.act(server.process.pid)
        return asked.result()


def broken_ranks(page: str) -> int | None:
    """What a server's /metrics say of BROKEN."""
    lines = "\n".join(line for line in page.splitlines() if line.startswith(BROKEN.name))
    families = text_string_to_metric_families(f"{lines}\n")
    found = [sample.value for family in families for sample in family.samples]
    return int(sum(found)) if found else None


def _counted(trial: Trial, since: int = 0) -> tuple[int | None, int | None]:
    """Trial.logged, once it holds all that was answered; nothing of stock vLLM, which counts none.

    Args:
        since: tokens that ran sparse before.
    """
    if trial.is_dense:
        return None, None
    time.sleep(SETTLE_S)
    sparse, faults = trial.logged()
    return sparse - since, faults
