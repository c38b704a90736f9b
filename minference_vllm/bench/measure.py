# SPDX-License-Identifier: Apache-2.0
"""Goes through the points of a sweep on one server."""

from collections.abc import Sequence
from pathlib import Path

from minference_vllm.bench.load import Load, Point
from minference_vllm.bench.request import Measured, Request
from minference_vllm.bench.sender import send
from minference_vllm.evals.answers import work_after, work_of
from minference_vllm.evals.client import Client
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.extras import need
from minference_vllm.evals.line import Line, LineFile

WHAT = "a file of measurements of this version"


class Origin(Line):
    """The first line of a file of measurements: what they belong to."""

    load: dict[str, str | int | None]
    model: str
    server: str
    """The server's URL, or the command that starts it."""


class Measurements(LineFile[Measured]):
    """A server's measurements of points, on disk. See LineFile."""

    origin: Origin

    def __init__(self, path: Path, origin: Origin) -> None:
        super().__init__(path, origin, Measured, WHAT)

    def of(self, point: Point) -> Measured | None:
        """The newest measurement of a point."""
        return next((entry for entry in reversed(self.lines) if entry.point == point), None)

    def left(self, points: Sequence[Point]) -> list[Point]:
        """The points that are still to be measured, including those in which a request failed."""
        newest = {point: self.of(point) for point in points}
        return [point for point, found in newest.items() if found is None or len(found.answered) < len(found.requests)]


def measure(client: Client, load: Load, points: Sequence[Point], into: Measurements, log: Path, is_dense: bool) -> None:
    """Measure what is left of these points.

    Args:
        log: a file for what the sender says.
        is_dense: whether this is the dense server, on which nothing may run sparse.

    Raises:
        ConfigError: something ran sparse on the dense server.
        ServerError: the server cannot be reached any more, or a point has errors only.
    """
    left = into.left(points)
    vllm, warm = client.version(), set()
    progress = need("tqdm").tqdm(total=len(points), initial=len(points) - len(left), unit="point", dynamic_ncols=True)
    try:
        for point in left:
            progress.set_description(f"{'dense' if is_dense else 'sparse'}, {_named(point)}")
            if load.warmups and point.lengths not in warm:
                _, requests = send(client, load, point, load.warmups, log, client.timeout_s)
                _refuse_hopeless(requests, client.shown_url)
                warm.add(point.lengths)
            before = work_of(client, is_dense)
            duration, requests = send(client, load, point, load.requests, log, client.timeout_s)
            _refuse_hopeless(requests, client.shown_url)
            read = [request.input_tokens for request in requests if not request.error]
            after = work_after(client, is_dense, before, read)
            into.add(Measured(point=point, vllm=vllm, duration=duration, requests=requests, work=after - before))
            progress.update()
    finally:
        progress.close()


def _named(point: Point) -> str:
    lengths = " to ".join(str(length) for length in point.lengths if length is not None)
    return f"{lengths} tokens, {point.load}" if lengths else point.load


def _refuse_hopeless(requests: Sequence[Request], url: str) -> None:
    """Stop if all requests failed: the server or its options are wrong, and going on could waste a night."""
    if requests and all(request.error for request in requests):
        raise ServerError(f"{url} gave errors only, to {len(requests)} requests. The first: {requests[0].error}")
