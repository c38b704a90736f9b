# SPDX-License-Identifier: Apache-2.0
"""The servers that are compared. They run already, or are started here when they are needed."""

import contextlib
import itertools
import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from minference_vllm.errors import ConfigError
from minference_vllm.evals import serve
from minference_vllm.evals.client import Client
from minference_vllm.evals.private import of_url, without_secrets

logger = logging.getLogger("vllm.minference.evals")


UNCHECKED = (
    "Both servers were named by their URLs, so nothing has checked that they differ in attention alone: model length, "
    "chunk size (--max-num-batched-tokens), data types, parallelism and the rest must be the same."
)


class Role(StrEnum):
    """What a server is for. Files, options and the report name it so."""

    DENSE = "dense"
    SPARSE = "sparse"
    CONTROL = "control"
    """A second one with the plugin, of other settings: one that keeps every key shows what rounding alone changes."""


@dataclass(frozen=True, slots=True)
class Server:
    """One of the servers.

    Attributes:
        role: what it is for.
        url: where it runs already; empty if it is to be started.
        arguments: what follows `vllm` to start it; empty if it runs already.
    """

    role: Role
    url: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether nothing may run sparse on it."""
        return self.role is Role.DENSE

    @property
    def origin(self) -> str:
        return of_url(self.url) or shlex.join(["vllm", *without_secrets(self.arguments)])


@dataclass(frozen=True, slots=True)
class Pair:
    """The dense and the sparse server, and a third where one is asked for.

    Attributes:
        model: its name on servers that run already, or the model to serve.
        timeout_s: seconds for one answer.
        folder: for the logs of servers that are started here.
        control: see Role.
    """

    dense: Server
    sparse: Server
    model: str
    timeout_s: float
    folder: Path
    control: Server | None = None

    @property
    def every(self) -> tuple[Server, ...]:
        """The dense server comes first."""
        return self.dense, self.sparse, *filter(None, [self.control])

    @property
    def notes(self) -> list[str]:
        """What a reader of the report must know about the servers."""
        return [UNCHECKED] if any(server.url for server in self.every) else []

    @contextlib.contextmanager
    def client(self, server: Server) -> Iterator[Client]:
        """One of them, for as long as the `with` block lasts; it is started if need be.

        Raises:
            ConfigError: it does not serve the model.
            ServerError: it did not come up.
        """
        with contextlib.ExitStack() as stack:
            url = server.url or stack.enter_context(serve.running(server.arguments, self.folder / f"{server.role}.log"))
            # Options of vllm serve may give the model another name.
            client = Client(url, self.model, self.timeout_s, or_the_only=not server.url)
            stack.callback(client.close)
            yield client

    def check(self) -> None:
        """Check, before the first prompt, that running servers answer, serve the model, and are dense and sparse.

        Raises:
            ConfigError: one of these is not so.
        """
        for one, other in itertools.combinations(self.every, 2):
            if one.url and one.url == other.url:
                raise ConfigError(f"--{one.role} and --{other.role} are both {of_url(one.url)}: name two servers.")
        for server in self.every:
            if server.url:
                with self.client(server) as client:
                    work = client.work()
                    if server.is_dense:
                        work.refuse_sparse(client.shown_url)
                    elif not work.exported:
                        logger.warning(
                            "%s has no metrics of minference_vllm: is it the %s server?", client.shown_url, server.role
                        )
