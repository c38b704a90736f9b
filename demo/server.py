# SPDX-License-Identifier: Apache-2.0
"""Start, question and stop one `vllm serve --attention-backend minference` on this machine.

The demo and the serving tests use `running`. `python -m demo.server MODEL [vllm serve options]`, which `make serve`
calls, keeps a server in the foreground.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from minference_vllm.evals.serve import free_port, stop

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 15
ANSWER_TIMEOUT_S = 3600  # a busy machine without a GPU reads a prompt of the demo in many minutes
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # a CPU's instructions for it, as Linux names them


def fast_dtype() -> str:
    """bfloat16, but float32 on a CPU that has no instructions for bfloat16 and takes twice as long to compute in it."""
    cpu = Path("/proc/cpuinfo")
    has_it = shutil.which("nvidia-smi") or (cpu.exists() and BFLOAT16 & set(cpu.read_text().split()))
    return "bfloat16" if has_it else "float32"


# A model of 8K context, on whatever this machine has.
SMALL_MODEL = (f"--dtype={fast_dtype()}", "--max-model-len=8192", "--max-num-seqs=8", "--enforce-eager")


class ServerError(RuntimeError):
    """The server did not come up; the message ends with an excerpt of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at `url`, for example http://127.0.0.1:8000."""

    url: str
    log: Path

    def get(self, path: str) -> str:
        with open_directly(self.url + path, timeout=10) as response:
            return response.read().decode()

    def client(self) -> openai.OpenAI:
        """The official client, set up to bypass any proxy."""
        direct = openai.DefaultHttpxClient(trust_env=False)
        base_url = f"{self.url}/v1"
        return openai.OpenAI(
            base_url=base_url, api_key="unused", timeout=ANSWER_TIMEOUT_S, max_retries=0, http_client=direct
        )

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of /metrics which have this name and these labels; 0 when there are none."""
        samples = (s for family in text_string_to_metric_families(self.get("/metrics")) for s in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def open_directly(request: str | urllib.request.Request, timeout: float) -> Any:
    """urlopen that bypasses any proxy of the environment: to a proxy, 127.0.0.1 is another machine."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)


def command(model: str, *options: str) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [str(vllm), "serve", model, "--attention-backend", "minference", *options]


def minference_option(**fields: object) -> list[str]:
    """The `vllm serve` option that sets fields of this package's configuration."""
    return ["--additional-config", json.dumps({"minference": fields})]


def environment(model: str) -> dict[str, str]:
    """What the caller has set, over defaults which start a small model on any machine."""
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    if version("vllm").endswith("+cpu"):
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # containers often hide the NUMA nodes that binding needs
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
    return {**defaults, **os.environ}


def start(model: str, log: Path, *options: str, **environ: str) -> subprocess.Popen[bytes]:
    """A process that serves `model`; its output goes to the file `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command(model, *options),
            env={**environment(model), **environ},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own process group: `stop` reaches vLLM's workers too
        )


@contextmanager
def running(model: str, log: Path, *options: str, start: Callable[..., Any] = start) -> Iterator[Server]:
    """Serve `model` on a free local port inside a `with` block. The server's output goes to the file `log`."""
    server = Server(f"http://127.0.0.1:{(port := free_port())}", log)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = start(model, log, "--host", "127.0.0.1", "--port", str(port), *options)
    try:
        wait_until_ready(server, process)
        yield server
    finally:
        stop(process, STOP_TIMEOUT_S)


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Poll /health, and say every ten seconds that it is still loading."""
    start = reported = time.monotonic()
    while (now := time.monotonic()) - start < START_TIMEOUT_S:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {process.returncode}. Log:\n{excerpt(server.log)}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            server.get("/health")
            return
        if now - reported >= 10:
            reported = now
            print(f"    loading, {now - start:.0f} s", flush=True)
        time.sleep(0.5)
    raise ServerError(f"vllm serve was not ready after {START_TIMEOUT_S} s. Log:\n{excerpt(server.log)}")


def excerpt(log: Path, last: int = 20) -> str:
    """The end of a log, after the earlier lines that name an error: vLLM prints the cause far above its last words."""
    lines = log.read_text(errors="replace").splitlines()
    causes = [line for line in lines[:-last] if "Error: " in line]
    return "\n".join([*causes[-10:], "...", *lines[-last:]])


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m demo.server MODEL [vllm serve options]")
    model, *options = sys.argv[1:]
    serve = command(model, *options)
    print(shlex.join(serve), flush=True)
    os.execve(serve[0], serve, environment(model))


if __name__ == "__main__":
    main()
