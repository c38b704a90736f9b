# SPDX-License-Identifier: Apache-2.0
"""What a user may configure, in which order it is read, and the sentence that refuses everything else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from minference_vllm.config import CONFIG_FILE_VARIABLE, PROBE_GROUP, ConfigError, MInferenceConfig, load_config

# Smallest value allowed and largest one refused; there is no upper bound.
LOWER_BOUNDS = {
    "min_seq_len": (0, -1),
    "min_chunk": (1, 0),
    "vertical_size": (1, 0),
    "slash_size": (1, 0),
    "sink_tokens": (0, -1),
    "local_tokens": (1, 0),
    "dense_layers": (0, -1),
    "log_every": (0.0, -0.5),
}
CHOICES = {
    "method": ["vertical_slash"],
    "probe_rows": ["last", "spread", "both"],
    "kernel": ["auto", "cuda", "triton", "reference"],
}
# What JSON can say and the field's type is not; no string is read as a number, no number as a choice.
WRONG_TYPES: dict[str, list[Any]] = {
    **{field: ["7", 7.5, True, None, [7], {"of": 7}] for field in LOWER_BOUNDS},
    **{field: [7, True, None, ["auto"]] for field in CHOICES},
    "log_every": ["7", True, None, [7.0]],
}


def load(**settings: Any) -> MInferenceConfig:
    return load_config({"minference": settings}, {})


def refusal(additional_config: Any, environ: dict[str, str] | None = None) -> str:
    """The message that stops a start; one sentence, on one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(additional_config, environ or {})
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.fixture
def config_file(tmp_path: Path):
    """Writes a configuration file; gives the environment that names it."""

    def write(text: str) -> dict[str, str]:
        path = tmp_path / "settings.json"
        path.write_text(text)
        return {CONFIG_FILE_VARIABLE: str(path)}

    return write


def test_every_field_has_its_bounds_tested() -> None:
    assert {*LOWER_BOUNDS, *CHOICES} == set(MInferenceConfig.model_fields)


@pytest.mark.parametrize("field", MInferenceConfig.model_fields)
def test_every_field_is_documented(field: str) -> None:
    assert MInferenceConfig.model_fields[field].description


@pytest.mark.parametrize("additional_config", [None, {}, {"minference": {}}, {"another_plugin": {"x": 1}}])
def test_nothing_configured_means_the_defaults(additional_config: dict[str, Any] | None) -> None:
    assert load_config(additional_config, {}) == MInferenceConfig()


@pytest.mark.parametrize("field", LOWER_BOUNDS)
def test_numbers_are_taken_from_their_lower_bound_on(field: str) -> None:
    lowest, below = LOWER_BOUNDS[field]
    for value in (lowest, lowest + 1, 10**7):
        assert getattr(load(**{field: value}), field) == value
    message = refusal({"minference": {field: below}})
    assert f"minference.{field}={below!r}" in message
    assert f"greater than or equal to {lowest:g}" in message


@pytest.mark.parametrize("field", CHOICES)
def test_choices_are_taken_and_the_refusal_lists_them(field: str) -> None:
    for value in CHOICES[field]:
        assert getattr(load(**{field: value}), field) == value
    message = refusal({"minference": {field: "fastest"}})
    assert f"minference.{field}='fastest'" in message
    assert all(choice in message for choice in CHOICES[field])


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG_TYPES.items() for value in values]
)
def test_a_wrong_type_is_refused_by_field_and_value(field: str, value: Any) -> None:
    assert f"minference.{field}={value!r}" in refusal({"minference": {field: value}})


def test_a_whole_number_of_seconds_is_taken() -> None:
    assert load(log_every=30).log_every == 30.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_seconds_are_finite(value: float) -> None:
    # Python's JSON parser reads Infinity and NaN.
    assert "minference.log_every" in refusal({"minference": json.loads(json.dumps({"log_every": value}))})


def test_an_unknown_key_is_refused_and_the_settings_are_listed() -> None:
    message = refusal({"minference": {"vertical_sizes": 7}})
    assert "minference.vertical_sizes is not a setting" in message
    assert all(field in message for field in MInferenceConfig.model_fields)


def test_every_fault_is_named_at_once() -> None:
    message = refusal({"minference": {"vertical_size": -1, "kernel": 3, "typo": 1}})
    assert all(f"minference.{field}" in message for field in ("vertical_size", "kernel", "typo"))


@pytest.mark.parametrize("value", [None, 7, "min_seq_len=7", ["min_seq_len"], True])
def test_the_inline_settings_must_be_an_object(value: Any) -> None:
    message = refusal({"minference": value})
    assert '"minference"' in message
    assert "JSON object" in message


def test_a_file_is_read_and_inline_settings_win_over_it(config_file) -> None:
    environ = config_file('{"min_seq_len": 4096, "vertical_size": 500}')
    config = load_config({"minference": {"vertical_size": 700}}, environ)
    assert config == MInferenceConfig(min_seq_len=4096, vertical_size=700)


def test_the_file_alone_is_enough(config_file) -> None:
    assert load_config(None, config_file('{"probe_rows": "both"}')).probe_rows == "both"


def test_an_empty_variable_names_no_file() -> None:
    assert load_config(None, {CONFIG_FILE_VARIABLE: ""}) == MInferenceConfig()


def test_the_environment_of_the_process_is_read_by_default(config_file, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in config_file('{"min_chunk": 77}').items():
        monkeypatch.setenv(name, value)
    assert load_config(None).min_chunk == 77


def test_a_bad_value_in_a_file_is_refused_by_field(config_file) -> None:
    assert "minference.slash_size=-3" in refusal(None, config_file('{"slash_size": -3}'))


@pytest.mark.parametrize("text", ['{"min_seq_len": 4096', "", "min_seq_len: 4096"])
def test_a_broken_file_is_refused_by_its_name(config_file, text: str) -> None:
    environ = config_file(text)
    message = refusal(None, environ)
    assert environ[CONFIG_FILE_VARIABLE] in message
    assert "not valid JSON" in message


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


@pytest.mark.parametrize("field", MInferenceConfig.model_fields)
def test_the_configuration_is_frozen(field: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(MInferenceConfig(), field, getattr(MInferenceConfig(), field))


@pytest.mark.parametrize(
    ("probe_rows", "counts"),
    [("last", (PROBE_GROUP, 0)), ("spread", (0, PROBE_GROUP)), ("both", (PROBE_GROUP, PROBE_GROUP))],
)
def test_probe_counts_follow_probe_rows(probe_rows: str, counts: tuple[int, int]) -> None:
    assert load(probe_rows=probe_rows).probe_counts == counts
