# SPDX-License-Identifier: Apache-2.0
"""What the metrics leave behind as processes end: what was counted last, and no folder."""

import os
import subprocess
import sys

import pytest

from minference_vllm.metrics import exporter
from minference_vllm.metrics.publisher import METRICS_DIR, MULTIPROC_DIR


def run_script(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.check_output(command, env=os.environ | environment, text=True)


@pytest.fixture(autouse=True)
def no_directory(monkeypatch):
    for variable in (METRICS_DIR, MULTIPROC_DIR):
        monkeypatch.delenv(variable, raising=False)


FORKING_SERVER = """
import os, sys
from minference_vllm.metrics.exporter import install
install()
child = os.fork()
if child == 0:
    install()
    sys.exit()
os.waitpid(child, 0)
print(os.path.isdir(os.environ["MINFERENCE_METRICS_DIR"]))
"""


def test_the_directory_outlives_forked_children_and_goes_with_its_owner(tmp_path):
    assert run_script(FORKING_SERVER, TMPDIR=str(tmp_path)) == "True\n"
    assert not list(tmp_path.iterdir())


# A worker's last step is counted while its server is already ending.
ENDING_SERVER = """
import logging, multiprocessing.util, sys, time  # vLLM imports it before the plugin
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.exporter import install
from minference_vllm.metrics.snapshot import Snapshot
logging.basicConfig(stream=sys.stdout, level=logging.INFO)

def serve():
    counters = Counters(log_every=10, tally=dict, read=Snapshot)
    counters.start()
    time.sleep(0.2)
    counters.defer({("sparse", "gate_open"): (5, 1, 1)})
    counters.flush()  # as its thread does

install()
multiprocessing.get_context("fork").Process(target=serve).start()
"""


def test_a_server_that_ends_before_its_workers_costs_no_warning(tmp_path):
    lines = run_script(ENDING_SERVER, TMPDIR=str(tmp_path)).splitlines()
    assert [line.split(" prompt tokens")[0] for line in lines] == ["INFO:vllm.minference.metrics:MInference: 5"]
    assert not list(tmp_path.iterdir())


SHORT_RUN = """
import logging, os, shutil, sys
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.snapshot import Snapshot
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
counters = Counters(log_every=10, tally=dict, read=Snapshot)
counters.start()
counters.defer({("sparse", "gate_open"): (5, 1, 1)})
if "fork" in sys.argv and (child := os.fork()):
    os.waitpid(child, 0)
if "remove" in sys.argv:
    shutil.rmtree(os.environ["MINFERENCE_METRICS_DIR"])
sys.exit()
"""


@pytest.mark.parametrize("fork", [(), ("fork",)], ids=["", "a forked child publishes nothing of its parent's"])
def test_what_was_counted_last_is_published_and_logged_at_exit_once(fork, tmp_path):
    assert run_script(SHORT_RUN, *fork, MINFERENCE_METRICS_DIR=str(tmp_path)).count("5 prompt tokens sparse") == 1
    (snapshot,) = exporter.DirectoryCollector(str(tmp_path))._snapshots()
    assert snapshot.chunks == {("sparse", "gate_open"): 1}


def test_a_directory_that_is_gone_at_exit_costs_no_warning(tmp_path):
    (line,) = run_script(SHORT_RUN, "remove", MINFERENCE_METRICS_DIR=str(tmp_path)).splitlines()
    assert "5 prompt tokens sparse" in line
