# SPDX-License-Identifier: Apache-2.0
"""How benchmarks.faults breaks a server, and what it makes of what it sees. A small program stands for vLLM's."""

import importlib.metadata
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults import answers, injection, trial
from benchmarks.faults.answers import Answer
from benchmarks.faults.cases import CASES, Act, Case, Outcome
from benchmarks.faults.injection import PLUGIN, VARIABLE, Fault, Injection, fail
from benchmarks.faults.promises import broken
from benchmarks.faults.server import Trial, pattern_file
from benchmarks.faults.trial import Finding
from minference_vllm import ops
from minference_vllm.evals import serve
from minference_vllm.patterns.file import Geometry, parse_pattern
from minference_vllm.scratch import AttendBuffers
from tests.conftest import import_or_skip

TEXT = " ".join(f"word{at}" for at in range(3000))

# injecting


@pytest.fixture
def armed(tmp_path: Path) -> Injection:
    found = Injection(Fault.RAISES, is_dense=False, folder=tmp_path)
    found.arm(times=2)
    return found


def test_vllm_finds_the_plugin_that_breaks_it(tmp_path: Path) -> None:
    given = Injection(Fault.GIVES_NAN, is_dense=True, folder=tmp_path / "plugin")
    environ = given.environ()
    assert Injection.from_json(environ[VARIABLE]) == given
    folder, root = environ["PYTHONPATH"].split(os.pathsep)[:2]
    [found] = importlib.metadata.distributions(path=[folder])
    [entry] = found.entry_points.select(group="vllm.general_plugins")
    assert entry.name == PLUGIN and entry.load() is injection.install
    assert Path(root, "benchmarks", "faults").is_dir()


def test_a_fault_comes_so_often_and_only_while_armed(armed: Injection) -> None:
    assert [armed.fires() for _ in range(4)] == [True, True, False, False]
    assert armed.fired == 2
    armed.arm()
    assert armed.fires()
    armed.disarm()
    assert not armed.fires()


def test_each_fault_is_what_it_says(tmp_path: Path) -> None:
    def broken_by(fault: Fault) -> tuple[Any, torch.Tensor]:
        given, output = Injection(fault, False, tmp_path / fault), torch.zeros(3)
        given.folder.mkdir()
        assert fault is Fault.NO_SCRATCH or fail(given, lambda: "attended", output) == "attended"
        given.arm()
        return fail(given, lambda: "attended", output), output

    with pytest.raises(RuntimeError, match="a kernel fails"):
        broken_by(Fault.RAISES)
    for fault in (Fault.OUT_OF_MEMORY, Fault.NO_SCRATCH):
        with pytest.raises(torch.OutOfMemoryError):
            broken_by(fault)
    result, output = broken_by(Fault.GIVES_NAN)
    assert result == "attended" and bool(output.isnan().all())


def test_the_plugin_breaks_what_launches_the_sparse_kernels(armed: Injection, monkeypatch: pytest.MonkeyPatch) -> None:
    class Chunk:
        out = torch.zeros(1)

    monkeypatch.setattr(ops, "attend", lambda chunk, index, buffers, kernel: "attended")
    monkeypatch.setenv(VARIABLE, armed.environ()[VARIABLE])
    injection.install()
    with pytest.raises(RuntimeError, match=injection.SAID):
        ops.attend(Chunk(), None, None, None)
    armed.disarm()
    assert ops.attend(Chunk(), None, None, None) == "attended"


def test_the_plugin_breaks_vllms_own_attention(armed: Injection, monkeypatch: pytest.MonkeyPatch) -> None:
    import_or_skip("vllm")
    layer, given = injection.stock_backend().get_impl_cls(), replace(armed, is_dense=True)
    monkeypatch.setattr(layer, "forward", lambda *_, **__: "attended")
    monkeypatch.setenv(VARIABLE, given.environ()[VARIABLE])
    injection.install()

    def forward(metadata: object) -> Any:
        return layer.forward(None, None, None, None, None, None, metadata, output=torch.zeros(1))

    assert forward(None) == "attended"  # a profiling run
    with pytest.raises(RuntimeError, match=injection.SAID):
        forward("of a step")
    armed.disarm()
    assert forward("of a step") == "attended"


def test_the_plugin_breaks_the_start_of_vllms_own_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_or_skip("vllm")
    builder = injection.stock_backend().get_builder_cls()
    monkeypatch.setattr(builder, "__init__", builder.__init__)
    monkeypatch.setenv(VARIABLE, Injection(Fault.NO_SCRATCH, True, tmp_path / "p").environ()[VARIABLE])
    injection.install()
    with pytest.raises(torch.OutOfMemoryError, match=injection.SAID):
        builder(None, [], None, torch.device("cpu"))


def test_the_plugin_breaks_the_claim_of_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttendBuffers, "allocate", AttendBuffers.allocate)
    monkeypatch.setenv(VARIABLE, Injection(Fault.NO_SCRATCH, False, tmp_path / "p").environ()[VARIABLE])
    injection.install()
    with pytest.raises(torch.OutOfMemoryError):
        AttendBuffers.allocate(1, 16, torch.device("cpu"))


def test_the_pattern_file_fits_its_model(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = parse_pattern(json.dumps(pattern_file(str(tmp_path))), "made")
    assert file.geometry == Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=64)


# asking


def test_prompts_end_where_they_began() -> None:
    for prompt in answers.long_prompts(TEXT):
        passage, cue = prompt.split("\n\n")
        assert len(passage) == answers.TEXT_CHARACTERS and passage.startswith(f"{cue} ")
    assert len(answers.short_prompt(TEXT)) < answers.TEXT_CHARACTERS / 2
    with pytest.raises(ValueError, match="are needed"):
        answers.begin_again("a short text", 0, 100, 10)


def test_answers_are_compared_as_far_as_they_are_sure() -> None:
    expected = Answer(200, (1, 2, 3, 4), leads=(2.0, 1.2, 1.0, 2.0))
    assert expected.sure == 2
    assert expected.agrees(Answer(200, (1, 2, 9, 9)))
    assert not expected.agrees(Answer(200, (1, 9, 3, 4)))
    assert not expected.agrees(Answer(500, (1, 2, 3, 4)))
    assert not expected.agrees(Answer(200, (1,)))
    assert not answers.all_agree([expected] * 2, [expected, Answer(answers.NO_ANSWER)])


# promises


GOOD = Finding(
    Outcome.GOES_ON, fired=1, before_equal=True, during_status=200, during_equal=True, after_equal=True,
    sparse_tokens_before=9, sparse_tokens_after=9, fault_tokens=9, says_so=True,
)  # fmt: skip
ENDED = Finding(Outcome.ENDS, fired=1, before_equal=True, during_status=500, exit_status=1, sparse_tokens_before=9)


def test_a_server_that_does_as_promised_breaks_nothing() -> None:
    assert broken(CASES["a kernel raises once"], False, GOOD, ENDED) == []
    assert broken(CASES["a kernel raises once"], True, ENDED, ENDED) == []
    assert broken(CASES["engine killed"], False, replace(ENDED, fired=None), replace(ENDED, fired=None)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": Outcome.ENDS}, "the server ends, and is to: goes on"),
        ({"fired": 0}, "the fault never came"),
        ({"fired": 2}, "came 2 times"),
        ({"left_processes": 1}, "1 processes are left"),
        ({"left_folders": 1}, "1 folders"),
        ({"before_equal": False}, "before the fault"),
        ({"during_equal": False}, "while the fault lasted"),
        ({"after_equal": False}, "after the fault"),
        ({"sparse_tokens_before": 0}, "nothing ran sparse"),
        ({"sparse_tokens_after": 0}, "0 tokens ran sparse"),
        ({"fault_tokens": 0}, "sparse_fault"),
        ({"says_so": False}, "its log does not say"),
    ],
)
def test_each_promise_can_be_broken(changes: dict[str, Any], said: str) -> None:
    faults = broken(CASES["a kernel raises once"], False, replace(GOOD, **changes), ENDED)
    assert len(faults) == 1 and said in faults[0]


@pytest.mark.parametrize("changes", [{"exit_status": 0}, {"during_status": 0}])
def test_a_server_that_ends_must_end_as_stock_vllm(changes: dict[str, Any]) -> None:
    ours, stock = replace(ENDED, fired=None, **changes), replace(ENDED, fired=None)
    [fault] = broken(CASES["engine killed"], False, ours, stock)
    assert "stock vLLM's" in fault


def test_a_broken_path_must_stay_dense() -> None:
    faults = broken(CASES["a kernel raises always"], False, replace(GOOD, broken_ranks=1), ENDED)
    assert faults == ["9 tokens ran sparse after the fault"]


# a whole trial


# It answers, and says in its log, as vLLM with the plugin would; once its worker is dead it fails, and ends.
SERVER = """
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

worker = subprocess.Popen([sys.executable, "-c", "x = b'1' * (32 << 20); import time; time.sleep(600)"])
if "--orphan" in sys.argv:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["max_tokens"] > 100:
            worker.wait(60)
        if worker.poll() is not None:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"EngineCore died")
            threading.Timer(0.1, os._exit, [3]).start()
            return
        print("MInference: 1,000 prompt tokens sparse, 24 dense (sparse_fault 24) in 1 s", flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"token_ids": [len(asked["prompt"])]}]}).encode())

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr(serve, "VLLM", (sys.executable, str(tmp_path / "server.py")))
    monkeypatch.setattr(serve, "POLL_S", 0.05)
    monkeypatch.setattr(trial, "SETTLE_S", 0.0)
    monkeypatch.setattr(trial, "KILLED_AFTER_S", 0.1)
    monkeypatch.setattr(trial, "LEFT_TIMEOUT_S", 0.5)
    prompts = [*answers.long_prompts(TEXT), answers.short_prompt(TEXT)]
    return [Answer(200, (len(prompt),), leads=(9.0,)) for prompt in prompts]


def run_trial(tmp_path: Path, case: Case, expected: list[Answer]) -> Finding:
    return trial.run(Trial("m", "", case, is_dense=False, folder=tmp_path / "t"), TEXT, expected)


def test_a_server_that_nothing_befalls_goes_on(tmp_path: Path, expected: list[Answer]) -> None:
    found = run_trial(tmp_path, Case("", None, Outcome.GOES_ON, said="tokens sparse"), expected)
    asked = len(expected)
    assert found == Finding(
        Outcome.GOES_ON, before_equal=True, during_status=200, during_equal=True, after_equal=True, says_so=True,
        sparse_tokens_before=1000 * asked, sparse_tokens_after=1000 * asked, fault_tokens=24 * (2 * asked + 1),
    )  # fmt: skip


def test_other_answers_are_told(tmp_path: Path, expected: list[Answer]) -> None:
    found = run_trial(tmp_path, Case("", None, Outcome.GOES_ON), [*expected[:-1], Answer(200, (1,), leads=(9.0,))])
    assert (found.before_equal, found.during_equal, found.after_equal) == (False, True, False)


def test_a_server_whose_engine_is_killed_ends(tmp_path: Path, expected: list[Answer]) -> None:
    found = run_trial(tmp_path, CASES["engine killed"], expected)
    assert (found.outcome, found.during_status, found.exit_status) == (Outcome.ENDS, 500, 3)
    assert found.left_processes == 0 and found.after_equal is None


def test_processes_that_outlive_their_server_are_counted(tmp_path: Path, expected: list[Answer]) -> None:
    server = Trial("m", "--orphan", CASES["engine killed"], is_dense=False, folder=tmp_path / "t")
    assert trial.run(server, TEXT, expected).left_processes == 1


def test_a_server_that_does_not_come_up_refuses(
    tmp_path: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "VLLM", (sys.executable, "-c", "raise MemoryError('no scratch')"))
    found = run_trial(tmp_path, Case("", None, Outcome.REFUSES, said="MemoryError: no scratch"), expected)
    assert found == Finding(Outcome.REFUSES, says_so=True)


def test_the_folder_for_metrics_can_be_taken_away(tmp_path: Path, expected: list[Answer]) -> None:
    case = CASES["metrics folder vanishes"]
    assert case.act is Act.REMOVE_METRICS
    (tmp_path / "t" / "metrics").mkdir(parents=True)
    assert run_trial(tmp_path, case, expected).outcome is Outcome.GOES_ON
    assert not (tmp_path / "t" / "metrics").exists()
