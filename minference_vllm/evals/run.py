# SPDX-License-Identifier: Apache-2.0
"""An evaluation from samples to report: asks each server in turn, then writes the comparison to disk."""

from dataclasses import dataclass
from typing import Any

from minference_vllm.evals.answers import answer
from minference_vllm.evals.document import write_reports
from minference_vllm.evals.journal import Journal, Origin
from minference_vllm.evals.page import make_page
from minference_vllm.evals.prepare import Prepared
from minference_vllm.evals.report import make_report, reused
from minference_vllm.evals.servers import Pair, Server
from minference_vllm.evals.worth import worth_comparing


@dataclass(frozen=True, slots=True)
class Run:
    """How samples are evaluated.

    Attributes:
        servers: to ask; their folder also holds the replies and the report.
        concurrency: requests in flight.
        above: percentage that the dense server must score above on a task and length; otherwise its samples are left
            out. None leaves out none.
        record: further entries of the report, such as the "date" of the start.
    """

    servers: Pair
    concurrency: int
    record: dict[str, str]
    above: int | None = None


def evaluate(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Ask the servers, write both reports, and return the JSON one.

    Raises:
        ConfigError: the servers, or files of an earlier run, do not fit what is asked for; or all samples are left out.
        ServerError: a server did not come up, or cannot be reached any more.
    """
    servers = run.servers
    journals = {
        server.role: Journal(
            servers.folder / f"{server.role}.jsonl",
            Origin(samples=prepared.sha256, model=servers.model, server=server.origin),
        )
        for server in servers.every
    }
    for journal in journals.values():
        journal.refuse_misfits(prepared.samples)
    dense, *others = servers.every
    _ask(run, dense, prepared, journals[dense.role])
    if run.above is not None:
        prepared = worth_comparing(prepared, journals[dense.role].replies(), run.above)
    for server in others:
        _ask(run, server, prepared, journals[server.role])
    notes = servers.notes
    for role, journal in journals.items():
        notes += reused(role, journal, prepared.samples, run.record["date"])
    report = {**run.record, "notes": notes, **make_report(prepared, **journals)}
    report["settings"]["dense_above_percent"] = run.above
    write_reports(servers.folder, report, make_page(report))
    return report


def _ask(run: Run, server: Server, prepared: Prepared, journal: Journal) -> None:
    """Have a server answer what it has not answered yet."""
    # A server that has nothing left to answer is not started, because that takes minutes.
    if journal.left(prepared.samples):
        with run.servers.client(server) as client:
            answer(client, prepared.samples, journal, run.concurrency, server)
