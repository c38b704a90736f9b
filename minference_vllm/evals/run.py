# SPDX-License-Identifier: Apache-2.0
"""An evaluation from samples to report: each server in turn, then what came of it on disk."""

import contextlib
import json
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minference_vllm.errors import ConfigError
from minference_vllm.evals import serve
from minference_vllm.evals.answers import answer
from minference_vllm.evals.client import Client
from minference_vllm.evals.journal import Journal, Origin
from minference_vllm.evals.page import make_page
from minference_vllm.evals.prepare import Prepared
from minference_vllm.evals.private import of_url, without_secrets
from minference_vllm.evals.report import make_report
from minference_vllm.files import write_file

JSON_REPORT, HTML_REPORT = "report.json", "report.html"

logger = logging.getLogger("vllm.minference.evals")


@dataclass(frozen=True, slots=True)
class Server:
    """One of the two servers.

    Attributes:
        is_dense: else sparse.
        url: where it is; empty if it is to be started.
        arguments: what follows `vllm` to start it; empty if it is there.
    """

    is_dense: bool
    url: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "dense" if self.is_dense else "sparse"

    @property
    def origin(self) -> str:
        return of_url(self.url) or shlex.join(["vllm", *without_secrets(self.arguments)])


@dataclass(frozen=True, slots=True)
class Run:
    """Where and how samples are evaluated.

    Attributes:
        model: as servers that are there name it, or what is to be served.
        folder: of the replies and the report.
        concurrency: requests in flight.
        timeout_s: for one answer.
        record: more for the report, what and when for one.
    """

    dense: Server
    sparse: Server
    model: str
    folder: Path
    concurrency: int
    timeout_s: float
    record: dict[str, str]

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.dense, self.sparse


def evaluate(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Ask both servers, write both reports, and give that in JSON.

    Raises:
        ConfigError: the servers, or files of an earlier run, are not what they are to be.
        ServerError: a server did not come up, or cannot be reached any more.
    """
    dense, sparse = (
        Journal(
            run.folder / f"{server.name}.jsonl", Origin(samples=prepared.sha256, model=run.model, server=server.origin)
        )
        for server in run.servers
    )
    for journal in (dense, sparse):
        journal.refuse_misfits(prepared.samples)
    for server, journal in ((run.dense, dense), (run.sparse, sparse)):
        # A server that has nothing left to answer is not started: that takes minutes.
        if journal.left(prepared.samples):
            with _client(run, server) as client:
                answer(client, prepared.samples, journal, run.concurrency, server.is_dense)
    report = {**run.record, **make_report(prepared, dense, sparse)}
    pages = {JSON_REPORT: f"{json.dumps(report, indent=1, allow_nan=False)}\n", HTML_REPORT: make_page(report)}
    for name, text in pages.items():
        write_file(run.folder / name, text, str(run.folder / name))
    return report


def check_servers(run: Run) -> None:
    """Before the first prompt: servers that are there answer, serve the model, and are what they are to be.

    Raises:
        ConfigError: they do not, or are not.
    """
    if run.dense.url and run.dense.url == run.sparse.url:
        raise ConfigError(f"--dense and --sparse are both {of_url(run.dense.url)}: name two servers.")
    for server in run.servers:
        if server.url:
            with _client(run, server) as client:
                work = client.work()
                if server.is_dense:
                    work.refuse_sparse(client.shown_url)
                elif not work.exported:
                    logger.warning("%s has no metrics of minference_vllm: is it the sparse server?", client.shown_url)


@contextlib.contextmanager
def _client(run: Run, server: Server) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        url = server.url or stack.enter_context(serve.running(server.arguments, run.folder / f"{server.name}.log"))
        # Options of vllm serve may give the model another name.
        client = Client(url, run.model, run.timeout_s, or_the_only=not server.url)
        stack.callback(client.close)
        yield client
