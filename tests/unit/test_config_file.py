# SPDX-License-Identifier: Apache-2.0
"""The file of settings: when it is read, what wins over it, and the sentence that refuses a broken one."""

from pathlib import Path

import pytest

from minference_vllm.config import CONFIG_FILE_VARIABLE, MInferenceConfig, load_config, misplaced
from minference_vllm.files import MAX_FILE_BYTES
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from tests.unit.test_config import refusal


@pytest.fixture
def config_file(tmp_path: Path):
    """Writes a configuration file; gives the environment that names it."""

    def write(text: str) -> dict[str, str]:
        path = tmp_path / "settings.json"
        path.write_text(text)
        return {CONFIG_FILE_VARIABLE: str(path)}

    return write


def test_a_file_is_read_and_inline_settings_win_over_it(config_file) -> None:
    environ = config_file('{"min_seq_len": 4096, "min_chunk": 500}')
    assert load_config({"minference": {"min_chunk": 700}}, environ) == MInferenceConfig(min_seq_len=4096, min_chunk=700)


def test_an_inline_method_replaces_that_of_the_file_with_all_its_settings(config_file) -> None:
    environ = config_file('{"method": {"name": "vertical_slash", "vertical_size": 500}}')
    config = load_config({"minference": {"method": {"name": "vertical_slash", "slash_size": 700}}}, environ)
    assert config.method == VerticalSlashSettings(slash_size=700)


def test_the_file_alone_is_enough(config_file) -> None:
    environ = config_file('{"method": {"name": "vertical_slash", "probe_rows": "both"}}')
    assert load_config(None, environ).method.probe_rows == "both"


def test_an_empty_variable_names_no_file() -> None:
    assert load_config(None, {CONFIG_FILE_VARIABLE: ""}) == MInferenceConfig()


def test_the_environment_of_the_process_is_read_by_default(config_file, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in config_file('{"min_chunk": 77}').items():
        monkeypatch.setenv(name, value)
    assert load_config(None).min_chunk == 77


def test_a_bad_value_in_a_file_is_refused_by_field(config_file) -> None:
    assert "minference.dense_layers=-3" in refusal(None, config_file('{"dense_layers": -3}'))


@pytest.mark.parametrize(
    "text",
    ['{"min_seq_len": 4096', "", "min_seq_len: 4096", '{"min_seq_len": 1' + "0" * 5000 + "}"],
    ids=["cut off", "empty", "no JSON", "a number of 5001 digits"],
)
def test_a_broken_file_is_refused_by_its_name(config_file, text: str) -> None:
    environ = config_file(text)
    message = refusal(None, environ)
    assert environ[CONFIG_FILE_VARIABLE] in message
    assert "not valid JSON" in message


@pytest.mark.parametrize("bracket", ["[", '{"method":'])
def test_a_file_of_brackets_is_refused_by_its_name(config_file, bracket: str) -> None:
    environ = config_file(bracket * (200_000 // len(bracket)))
    message = refusal(None, environ)
    assert environ[CONFIG_FILE_VARIABLE] in message
    assert "nested too deeply" in message


def test_a_large_file_is_refused_by_its_name(config_file) -> None:
    # It is not read to its end, so what it holds does not matter.
    environ = config_file("{}" + " " * (MAX_FILE_BYTES - 1))
    message = refusal(None, environ)
    assert environ[CONFIG_FILE_VARIABLE] in message
    assert f"larger than {MAX_FILE_BYTES:,} bytes" in message
    assert load_config(None, config_file("{}" + " " * (MAX_FILE_BYTES - 2))) == MInferenceConfig()


@pytest.mark.parametrize("text", ["[1, 2]", "7", "null"])
def test_a_file_must_hold_an_object(config_file, text: str) -> None:
    environ = config_file(text)
    message = refusal(None, environ)
    assert environ[CONFIG_FILE_VARIABLE] in message
    assert "must hold a JSON object" in message


def test_a_file_in_another_encoding_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes('{"method": "größe"}'.encode("latin-1"))
    assert str(path) in refusal(None, {CONFIG_FILE_VARIABLE: str(path)})


def test_an_unreadable_file_is_refused_by_its_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        message = refusal(None, {CONFIG_FILE_VARIABLE: str(path)})
        assert str(path) in message
        assert "cannot be read" in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, None),
        ({"another": {"min_seq_len": 3}}, None),
        ({"minference": {}, "min_seq_len": 3}, None),
        ({"MInference": {"min_seq_len": 3}}, 'has "MInference", which is not read: write "minference".'),
        ({"min_seq_len": 3}, 'has "min_seq_len" where it is not read: write {"minference": {"min_seq_len": …}}.'),
    ],
)
def test_settings_that_stand_where_nobody_reads_them_are_told(
    given: dict[str, object] | None, said: str | None
) -> None:
    assert misplaced(given) == (said and f"--additional-config {said}")
