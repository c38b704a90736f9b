# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.soak sees of a server's processes, GPUs and metrics. None starts a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import watch

PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 3.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:num_preemptions_total{engine="0"} 7.0
process_start_time_seconds 1.5
vllm:kv_cache_usage_perc{engine="0"} 0.5
"""


def test_totals_are_summed_over_engines() -> None:
    assert watch.read_totals(PAGE) == {
        watch.RUNNING: 5.0, watch.WAITING: 1.0, watch.PREEMPTED: 7.0, watch.STARTED: 1.5,
    }  # fmt: skip


def test_a_server_that_another_process_answers_for_has_restarted() -> None:
    watching = watch.Watch("http://nowhere", None, has_gpu=False)
    for start in (1.0, 1.0, None, 2.0, 2.0):
        totals = None if start is None else {watch.STARTED: start, watch.PREEMPTED: start}
        watching.samples.append(watch.Sample(0.0, None, None, totals))
    assert (watching.restarts, watching.unread, watching.preemptions) == (1, 1, 1)
    assert watching.growth() == {"host": None, "gpu": None}


def test_memory_is_that_of_all_processes_together() -> None:
    holds = "x = b'1' * (64 << 20); print(flush=True); input()"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holds!r}])"
    with subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert (watch.resident_mib(process.pid) or 0) > 64
        process.communicate(b"\n")
    assert watch.resident_mib(process.pid) is None


SMI = """\
#!/bin/sh
case "$*" in
*--id=1,GPU-b*) printf '30\\n4\\n' ;;
*--id=*) echo "no such GPU: $*" >&2; exit 6 ;;
*) printf '1000\\n30\\n4\\n' ;;
esac
"""


@pytest.mark.parametrize(("visible", "mib"), [(None, 1034.0), ("", 1034.0), ("1,GPU-b", 34.0), ("1, GPU-b", 34.0)])
def test_only_gpus_that_the_server_sees_are_watched(
    visible: str | None, mib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert watch.gpu_mib() == mib
