# SPDX-License-Identifier: Apache-2.0
"""A benchmark from the points of a sweep to the report: measures each server in turn, then writes the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minference_vllm.bench.load import Load, Point, described
from minference_vllm.bench.measure import Measurements, Origin, measure
from minference_vllm.bench.page import make_page
from minference_vllm.bench.report import make_report
from minference_vllm.evals.document import write_reports
from minference_vllm.evals.servers import Pair, Server


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured.

    Attributes:
        servers: both; their folder also holds measurements and report.
        load: what is sent.
        points: the sweep.
        record: further entries of the report, such as the command and its date.
    """

    servers: Pair
    load: Load
    points: Sequence[Point]
    record: dict[str, str]


def run(wanted: Run) -> dict[str, Any]:
    """Measure both servers, write both reports, and return the JSON one.

    Raises:
        ConfigError: the servers, or files of an earlier run, do not fit what is asked for.
        ServerError: a server did not come up, or cannot be reached any more.
    """
    servers = wanted.servers
    wanted.load.cut_prompts(wanted.points)
    dense, sparse = (_measurements(wanted, server) for server in (servers.dense, servers.sparse))
    for server, measurements in ((servers.dense, dense), (servers.sparse, sparse)):
        # A server that has nothing left to do is not started, because that takes minutes.
        if measurements.left(wanted.points):
            with servers.client(server) as client:
                log = servers.folder / f"{server.role}-load.log"
                measure(client, wanted.load, wanted.points, measurements, log, server.is_dense)
    report = {**wanted.record, **make_report(wanted.points, dense, sparse)}
    report["notes"] = servers.notes + report["notes"]
    write_reports(servers.folder, report, make_page(report))
    return report


def _measurements(wanted: Run, server: Server) -> Measurements:
    servers = wanted.servers
    origin = Origin(load=described(wanted.load), model=servers.model, server=server.origin)
    return Measurements(servers.folder / f"{server.role}.jsonl", origin)
