# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm doctor`: what it finds, what it says of it, and how it ends. Kernels: test_doctor_kernels.py."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_vllm import cli, compat
from minference_vllm.doctor import diagnosis, gpu, versions
from minference_vllm.doctor.check import NO_GPU, Check, Status, failed, ok, skipped, warning
from minference_vllm.doctor.metrics import check_metrics
from minference_vllm.doctor.settings import Limits
from minference_vllm.kernels.cuda import library
from minference_vllm.metrics.publisher import METRICS_DIR
from tests.conftest import import_or_skip


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


# The command


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the doctor find these; gives what it was asked."""
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL", "MINFERENCE_CONFIG"):
        monkeypatch.setenv(name, "")  # what the command sets is undone

    def pretend(*checks: Check) -> list[Any]:
        asked: list[Any] = []
        monkeypatch.setattr(
            diagnosis, "diagnose", lambda *arguments, expects_gpu: asked.append(arguments) or list(checks)
        )
        return asked

    return pretend


def test_lines_are_aligned_and_a_failed_check_says_what_to_do(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found(ok("torch", "2"), failed("metrics folder", "is full", "Empty it"), skipped("gpu", "none"))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok       torch           2",
        "failed   metrics folder  is full",
        "                         -> Empty it.",
        "skipped  gpu             none",
    ]


def test_nothing_wrong_is_status_0_and_skipped_is_not_wrong(found: Any) -> None:
    found(ok("torch", "2"), skipped("gpu", "none"))
    assert cli.main(["doctor"]) == 0


def test_a_warning_says_what_to_do_and_fails_nothing(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found(warning("gate", "hardly opens", "Lower the setting"))
    assert cli.main(["doctor"]) == 0
    [line, remedy] = capsys.readouterr().out.splitlines()
    assert (line, remedy.split()) == ("warning  gate  hardly opens", ["->", "Lower", "the", "setting."])
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"


def test_json_is_one_object_of_a_known_layout(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found(ok("gpu", "one", count=1), failed("kernel", "wrong", "Report it"))
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["schema_version"], report["status"]) == (1, "failed")
    assert report["checks"] == [
        {"name": "gpu", "status": "ok", "what": "one", "remedy": "", "facts": {"count": 1}},
        {"name": "kernel", "status": "failed", "what": "wrong", "remedy": "Report it", "facts": {}},
    ]


def test_what_is_given_reaches_the_checks(found: Any) -> None:
    asked = found()
    limits = ("--max-num-batched-tokens", "8192", "--max-model-len", "65536", "--tensor-parallel-size", "2")
    inline = {"minference": {"min_chunk": 256}}
    settings = ("--config", "own.json", "--additional-config", json.dumps(inline))
    cli.main(["doctor", "--model", "a/b", *settings, "--kv-cache-dtype", "fp8", *limits])
    ((environ, model, given, additional),) = asked
    assert (environ["MINFERENCE_CONFIG"], model) == ("own.json", "a/b")
    assert (given, additional) == (Limits(8192, 65536, "fp8", 2), inline)


@pytest.mark.parametrize("text", ["[]", "{", '{"minference": {"debug": NaN}}'])
def test_an_additional_config_that_is_no_json_object_is_refused(
    text: str, found: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = found()
    assert cli.main(["doctor", "--additional-config", text]) == 2
    assert capsys.readouterr().err.startswith("--additional-config ")
    assert asked == []


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--max-model-len", "0"])
    assert ended.value.code == 2


def test_a_check_that_raises_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("what")

    [check] = diagnosis._examine("gpu", broken)
    assert (check.status, check.name, check.what) == (Status.FAILED, "gpu", "the check raised KeyError: 'what'")


def test_here_it_runs_to_its_end_and_prints_json_alone(tmp_path: Path) -> None:
    import_or_skip("vllm")
    command = [sys.executable, "-m", "minference_vllm.cli", "doctor", "--json"]
    environ = {**os.environ, METRICS_DIR: str(tmp_path)}
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    report = json.loads(ran.stdout)
    assert ran.returncode == (0 if report["status"] == "ok" else 1), ran.stderr
    names = [check["name"] for check in report["checks"]]
    assert {"vllm", "gpu", "backend", "settings", "gate", "metrics folder"} <= set(names)
    assert len(set(names)) == len(names)
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


# Versions


def test_a_vllm_that_is_not_tested_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, status in (("0.33.1", Status.OK), ("0.31.0", Status.FAILED)):
        monkeypatch.setattr(compat, "installed_version", lambda version=version: version)
        assert by_name(versions.check_versions())["vllm"].status is status


class Driver:
    """NVIDIA's library: a driver for CUDA 12.8, or an error code in place of any answer."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.is_shut_down = False

    def nvmlInit_v2(self) -> int:
        return self.code

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        text.value = b"570.86"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, number: Any) -> int:
        number._obj.value = 12080
        return 0

    def nvmlShutdown(self) -> None:
        self.is_shut_down = True


def test_the_driver_is_asked_where_pytorch_is_built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    checks = by_name(versions.check_versions())
    assert checks["cuda"].what.startswith("12.8")
    assert (checks["driver"].status, checks["driver"].what) == (Status.OK, "570.86, for CUDA up to 12.8")
    assert driver.is_shut_down


def test_no_driver_and_one_that_does_not_answer_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for opened, said in ((none, "cannot open shared object file"), (lambda _: Driver(code=9), "error 9")):
        monkeypatch.setattr(ctypes, "CDLL", opened)
        check = by_name(versions.check_versions())["driver"]
        assert check.status is Status.FAILED
        assert said in check.what


# The GPU


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there is a GPU of this capability, and a library or why there is none."""

    def pretend(capability: tuple[int, int], why_missing: str = "") -> dict[str, Check]:
        for name, value in (("is_available", True), ("current_device", 0), ("device_count", 2)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
        monkeypatch.setattr(library, "why_missing", lambda: why_missing)
        return by_name(gpu.check_gpu())

    return pretend


def test_hopper_with_its_library_is_as_it_should_be(card: Any) -> None:
    checks = card((9, 0))
    assert checks["gpu"].what == "a card, compute capability 9.0, and 1 more"
    assert {check.status for check in checks.values()} == {Status.OK}


def test_hopper_without_its_library_is_a_fault(card: Any) -> None:
    check = card((9, 0), "no CUDA library in this installation")["cuda library"]
    assert (check.status, check.what) == (Status.FAILED, "no CUDA library in this installation")
    assert "MINFERENCE_BUILD_CUDA=1" in check.remedy


def test_other_gpus_need_no_library_and_old_ones_do_not_do(card: Any) -> None:
    checks = card((8, 0), "no CUDA library in this installation")
    assert [check.status for check in checks.values()] == [Status.OK, Status.SKIPPED]
    assert card((7, 5))["gpu"].status is Status.FAILED


def test_no_gpu_is_a_fault_only_where_pytorch_is_built_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    for built_for, status in ((None, Status.SKIPPED), ("12.8", Status.FAILED)):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        check = by_name(gpu.check_gpu())["gpu"]
        assert check.status is status
    assert check.what == "The NVIDIA driver on your system is too old"


def test_where_no_gpu_is_expected_what_needs_one_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(library, "why_missing", lambda: "")
    checks = by_name(diagnosis.diagnose({}, None, Limits(), expects_gpu=False))
    skipped = {name for name, check in checks.items() if check.what == NO_GPU}
    assert skipped >= {"driver", "gpu", "kernel"} and "backend" in checks
    assert checks["backend"].status is Status.SKIPPED
    assert checks["cuda library"].status is Status.OK
    monkeypatch.setattr(library, "why_missing", lambda: "it was not built")
    assert by_name(gpu.check_gpu(expects_gpu=False))["cuda library"].status is Status.FAILED


# The metrics folder


def test_a_folder_for_metrics_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    [check] = check_metrics({METRICS_DIR: str(tmp_path / "new")})
    assert check.status is Status.OK
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_used_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [check] = check_metrics({METRICS_DIR: str(tmp_path / "file")})
    assert check.status is Status.FAILED
    assert str(tmp_path / "file") in check.what
    assert METRICS_DIR in check.remedy


def test_metrics_that_are_turned_off_are_skipped() -> None:
    [check] = check_metrics({METRICS_DIR: os.devnull})
    assert check.status is Status.SKIPPED
