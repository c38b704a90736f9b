# SPDX-License-Identifier: Apache-2.0
"""The command line: what is typed wrong ends in a sentence, before and after the work."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minference_vllm import cli, offline
from minference_vllm.cli import tune
from minference_vllm.cli.status import FAILED, STOPPED
from minference_vllm.compat import engines
from minference_vllm.errors import LONGEST_MESSAGE, ConfigError
from minference_vllm.patterns.published import published
from minference_vllm.plots import prompt
from minference_vllm.tuning import heads
from minference_vllm.tuning.gate import write_gate
from tests.unit.test_pattern_import import release  # noqa: F401
from tests.unit.test_patterns import content


@pytest.mark.parametrize("value", ["\u0663", "\u00b2", "1_0", " 5", "9" * 5000, "16777217", "+1"])
def test_a_count_is_written_in_plain_digits_and_has_an_end(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(["tune", "--chunk", value])
    assert ended.value.code == FAILED
    message = capsys.readouterr().err.splitlines()[-1]
    assert "is no whole number from 1 to 16777216" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "arguments", [["--seed", "-1"], ["--seed", str(2**63)], ["--samples", "1000000000"], ["--concurrency", "100000"]]
)
def test_what_would_fail_at_the_end_of_a_night_is_refused_at_once(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["eval", *arguments])


def test_a_long_argument_is_not_repeated_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["tune", "x" * 100_000])
    assert len(capsys.readouterr().err.splitlines()[-1]) < LONGEST_MESSAGE + 100


def test_a_name_that_no_encoding_has_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "\udcff.json"
    file.write_text(json.dumps(content()))
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["patterns", "show", str(file)]) == 0
    shown.seek(0)
    assert "\\udcff.json: for org/Model-1M" in shown.read()


def test_a_command_that_is_stopped_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "load_config", stop)
    assert cli.main(["tune"]) == STOPPED
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize("out", ["x" * 5000, "loop", "file/below.json"])
def test_a_file_that_tune_could_not_write_is_refused_before_it_measures(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    assert cli.main(["tune", "--out", str(tmp_path / out)]) == FAILED
    assert "cannot be " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_changed_while_tune_measured_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"settings.json"):
        write_gate(file, 4096)
    assert file.read_text() == text


def test_an_engine_that_vllm_does_not_start_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TypeError("unexpected argument 'no_such'")

    monkeypatch.setattr(offline.plugin, "register", lambda: None)
    monkeypatch.setattr(engines, "offline_engine", refuse)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # start_engine sets it
    with pytest.raises(ConfigError, match="vLLM does not start 'm' with these options: unexpected argument 'no_such'"):
        prompt.read_prompt("m", [1, 2], {}, {"no_such": 1}, None)


class OfTransformers(Exception):
    """As transformers has them, of kinds of its own."""


def give_config(monkeypatch: pytest.MonkeyPatch, num_heads: int) -> None:
    """Have every model a configuration with so many heads."""
    config = SimpleNamespace(num_attention_heads=num_heads, num_hidden_layers=2, hidden_size=256)
    monkeypatch.setattr(engines, "text_config", lambda model: config)


def test_a_model_with_no_sensible_heads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    give_config(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"The heads of 'm' cannot be read from its config.json"):
        heads.of_model("m")

    def refuse(model: str) -> None:
        raise OfTransformers("expected int,\n got str")

    monkeypatch.setattr(engines, "text_config", refuse)
    with pytest.raises(
        ConfigError, match=r"The heads of 'm' cannot be read from its config.json: expected int,  got str"
    ):
        heads.of_model("m")


@pytest.mark.parametrize(("option", "value"), [("--source", "x" * 1001), ("--licence", "\udcff")])
def test_what_cannot_stand_in_a_pattern_file_is_refused_by_its_option(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_config(monkeypatch, 4)
    (tmp_path / "list.json").write_text("[]")
    arguments = [str(tmp_path / "list.json"), "--model", "m", "--out", str(tmp_path / "out.json")]
    assert cli.main(["patterns", "import", *arguments, option, value]) == FAILED
    assert f"{option} " in capsys.readouterr().err


def test_a_release_may_hold_other_calls_than_those_that_name_lists(release: Path) -> None:  # noqa: F811
    names = release / "minference" / "configs" / "model2path.py"
    names.write_text(f'OTHER = {{"a": f(), 0x{"f" * 4000}: f("b"), None: f("c"), "d": f(b"e")}}\n{names.read_text()}')
    assert dict(published(release)).keys() == {"yi-9b-200k.json", "yi-9b-200k-v2.json"}
