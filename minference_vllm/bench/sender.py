# SPDX-License-Identifier: Apache-2.0
"""Has `vllm bench serve` send a load: vLLM's own client, of this environment and no other."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from minference_vllm.bench.load import Load, Point
from minference_vllm.bench.request import Request, read_result
from minference_vllm.errors import ConfigError
from minference_vllm.evals import serve
from minference_vllm.evals.client import THIS_MACHINE, Client
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.extras import need

RESULT = "result.json"


def check_sender(load: Load) -> None:
    """Check, before anything is started, that what sends the load is installed.

    Raises:
        ConfigError: it is not.
    """
    if not serve.has_vllm():
        raise ConfigError(
            "The load comes from vllm bench serve, and vLLM is not installed beside this command: install it there."
        )
    if load.text is not None:
        need("pandas", "bench")  # with which vLLM reads the prompts


def send(
    client: Client, load: Load, point: Point, requests: int, log: Path, timeout_s: float
) -> tuple[float, tuple[Request, ...]]:
    """The seconds that the load took, and what came of each request.

    Args:
        log: the sender's output is appended to it.
        timeout_s: seconds for the whole load.

    Raises:
        ServerError: nothing was measured.
    """
    with TemporaryDirectory(prefix="minference-bench-") as folder:
        server = [f"--base-url={client.url}", f"--model={client.model}", f"--served-model-name={client.model}"]
        result = ["--save-result", "--save-detailed", f"--result-dir={folder}", f"--result-filename={RESULT}"]
        _run([*load.arguments(point, requests), *server, *result, "--disable-tqdm"], client.url, log, timeout_s)
        return read_result(Path(folder, RESULT))


def _run(arguments: Sequence[str], url: str, log: Path, timeout_s: float) -> None:
    with serve.log_file(log) as output:
        process = subprocess.Popen(
            [*serve.VLLM, "bench", "serve", *arguments],
            env=_environ(url),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ServerError(
            f"vllm bench serve had not ended after {timeout_s} s. {log} ends so:\n{serve.excerpt(log)}"
        ) from None
    finally:
        if process.returncode is None:
            serve.stop(process)
    if status:
        raise ServerError(f"vllm bench serve ended with status {status}. {log} ends so:\n{serve.excerpt(log)}")


def _environ(url: str) -> dict[str, str]:
    """The sender's environment, without proxies for this machine: to a proxy, localhost is another machine."""
    if urlsplit(url).hostname not in THIS_MACHINE:
        return dict(os.environ)
    names = ("no_proxy", "NO_PROXY")
    return {**os.environ, **{name: ",".join(filter(None, [os.environ.get(name), *THIS_MACHINE])) for name in names}}
