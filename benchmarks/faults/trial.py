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
"""A server that still runs this long after its last answer is taken to go on."""
SETTLE_S = 3.0  # counts come to the log once a second
LEFT_TIMEOUT_S = 15.0  # time that a server's other processes have to end after the first
KILLED_AFTER_S = 1.0
MANY_TOKENS = 4000  # of an answer that must not be over before its engine is killed
ENGINE_ERRORS = (answers.NO_ANSWER, 500)
"""What a request gets if its engine dies: an error, or a connection that breaks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a server.

    Attributes:
        outcome: see Outcome.
        fired: calls of attention that failed by injection; None where none is injected.
        before_equal, during_equal, after_equal: whether its answers were, as far as tokens are sure, those of a dense
            server without any fault.
        during_status: HTTP status of the request that met the fault; 0 for a broken connection.
        exit_status: of a server that ended by itself.
        seconds_to_end: from the fault to the end of such a server.
        sparse_tokens_before, sparse_tokens_after: prompt tokens that ran sparse before and after the fault.
        fault_tokens: prompt tokens that ran dense because the sparse path failed.
        broken_ranks: ranks that had given the sparse path up, by the last /metrics; None where that does not say.
        says_so: whether the log holds what the case promises.
        left_processes: of a server that ended by itself, the processes it had started that still run; None for others.
        left_folders: metrics folders that are left after the server's end.
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
    """Break the server, and say what happens from then on."""
    began, family = time.monotonic(), descendants(server.process.pid)
    during = _ask_meanwhile(trial, server, text)
    found: dict[str, Any] = {"during_status": during.status, "during_equal": expected[0].agrees(during)}
    if during.status in ENGINE_ERRORS:
        try:
            found["exit_status"] = server.process.wait(END_TIMEOUT_S)
            found["seconds_to_end"] = round(time.monotonic() - began, 1)
            # Counted inside the server's block, because leaving the block ends every process that is left.
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
    """The value of BROKEN on a server's /metrics."""
    lines = "\n".join(line for line in page.splitlines() if line.startswith(BROKEN.name))
    families = text_string_to_metric_families(f"{lines}\n")
    found = [sample.value for family in families for sample in family.samples]
    return int(sum(found)) if found else None


def _counted(trial: Trial, since: int = 0) -> tuple[int | None, int | None]:
    """Trial.logged, once it includes all that was answered; None for stock vLLM, which counts nothing.

    Args:
        since: tokens that had run sparse before.
    """
    if trial.is_dense:
        return None, None
    time.sleep(SETTLE_S)
    sparse, faults = trial.logged()
    return sparse - since, faults
