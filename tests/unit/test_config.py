# SPDX-License-Identifier: Apache-2.0
"""What a user may configure, and the sentence that refuses everything else."""

import json
import math
from typing import Any

import pytest
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from minference_vllm.config import METHOD_NAMES, MInferenceConfig, load_config
from minference_vllm.errors import ConfigError
from minference_vllm.methods import MAX_TOKENS, METHODS, MethodSettings, VerticalSlash
from minference_vllm.methods.vertical_slash import PROBE_ROWS, VerticalSlashSettings

# The least and the greatest that a number may be; those of a method's settings are read from its fields.
BOUNDS: dict[str, tuple[float, float]] = {
    "min_seq_len": (0, MAX_TOKENS),
    "min_chunk": (1, MAX_TOKENS),
    "dense_layers": (0, 10_000),
    "recall_floor": (0.0, 1.0),
    "row_recall_floor": (0.0, 1.0),
    "log_every": (0.0, 86_400.0),
}
CHOICES: dict[str, list[Any]] = {
    "method": [*METHOD_NAMES],
    "kernel": ["auto", "cuda", "triton", "reference"],
    "page_salt": ["off", "method", "server"],
    "debug": [True, False],
    "measure_recall": [True, False],
}
# What JSON can say and the field's type is not; no string is read as a number, no number as a choice.
WRONG_TYPES: dict[str, list[Any]] = {
    **{field: ["7", 7.5, True, None, [7], {"of": 7}] for field in BOUNDS},
    "log_every": ["7", True, None, [7.0]],
    "recall_floor": ["0.5", True, None, [0.5]],
    "row_recall_floor": ["0.5", True, None, [0.5]],
    "method": [7, True, None, ["vertical_slash"], {}, {"name": None}, {"name": ["vertical_slash"]}],
    "kernel": [7, True, None, ["auto"]],
    "debug": [1, 0.0, "true", None],
    "measure_recall": [1, 0.0, "true", None],
}
LONGEST_MESSAGE = 2000  # characters


def load(**settings: Any) -> MInferenceConfig:
    return load_config({"minference": settings}, {})


def refusal(additional_config: Any, environ: dict[str, str] | None = None) -> str:
    """The message that stops a start; on one line, and short whatever was given."""
    with pytest.raises(ConfigError) as caught:
        load_config(additional_config, environ or {})
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE
    return message


def name_of(method: type) -> str:
    return method.Settings.model_fields["name"].default


def own_fields(settings: type[BaseModel]) -> set[str]:
    """The settings of a method that others need not have."""
    return settings.model_fields.keys() - MethodSettings.model_fields.keys()


method_fields = pytest.mark.parametrize(
    ("method", "field"), [(method, field) for method in METHODS for field in sorted(own_fields(method.Settings))]
)

# The fields


def test_every_field_has_its_bounds_tested() -> None:
    assert {*BOUNDS, *CHOICES} == set(MInferenceConfig.model_fields)


@pytest.mark.parametrize("settings", [MInferenceConfig, *(method.Settings for method in METHODS)])
def test_every_number_has_an_upper_bound(settings: type[BaseModel]) -> None:
    for name, field in settings.model_fields.items():
        if field.annotation in (int, float):
            assert any(isinstance(limit, Le) for limit in field.metadata), name


@pytest.mark.parametrize("field", MInferenceConfig.model_fields)
def test_every_field_is_documented(field: str) -> None:
    assert MInferenceConfig.model_fields[field].description


@method_fields
def test_every_field_of_a_method_is_documented(method: type, field: str) -> None:
    assert method.Settings.model_fields[field].description


@pytest.mark.parametrize("additional_config", [None, {}, {"minference": {}}, {"another_plugin": {"x": 1}}])
def test_nothing_configured_means_the_defaults(additional_config: dict[str, Any] | None) -> None:
    assert load_config(additional_config, {}) == MInferenceConfig()


@pytest.mark.parametrize("field", BOUNDS)
def test_a_number_is_taken_within_its_bounds(field: str) -> None:
    lowest, highest = BOUNDS[field]
    for value in (lowest, lowest + 1, highest):
        assert getattr(load(**{field: value}), field) == value
    for value in (lowest - 1, highest + 1):
        message = refusal({"minference": {field: value}})
        assert f"minference.{field}={value!r}" in message
        assert f"number from {lowest:g} to {highest:,.0f}." in message


@pytest.mark.parametrize(
    ("method", "field", "lowest", "highest"),
    [
        (method, name, field.metadata[0].ge, field.metadata[1].le)
        for method in METHODS
        for name, field in method.Settings.model_fields.items()
        if [type(bound) for bound in field.metadata] == [Ge, Le]
    ],
)
def test_a_number_of_a_method_is_taken_within_its_bounds(method: type, field: str, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        assert getattr(load(method={"name": name_of(method), field: value}).method, field) == value
    for value in (lowest - 1, highest + 1, 10**30):
        message = refusal({"minference": {"method": {"name": name_of(method), field: value}}})
        assert f"minference.method.{field}={value!r}" in message
        assert f"number from {lowest} to {highest:,}." in message


@pytest.mark.parametrize("field", [field for field in BOUNDS if MInferenceConfig.model_fields[field].annotation is int])
def test_a_number_of_any_size_is_refused_by_field_and_bound(field: str) -> None:
    for value in (10**30, -(10**30), 10**5000):
        message = refusal({"minference": {field: value}})
        assert f"minference.{field}=" in message
        assert f"whole number from {BOUNDS[field][0]} to {BOUNDS[field][1]:,}." in message


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"min_seq_len": "16384"}, "a whole number from 0 to 16,777,216"),
        ({"recall_floor": float("nan")}, "a number from 0 to 1"),
        ({"method": {"name": "block", "share": 84}}, "a number above 0, at most 1"),
        ({"method": {"name": "vertical_slash", "share": 0}}, "a number above 0, at most 1, or null"),
    ],
    ids=str,
)
def test_a_refused_number_is_told_both_ends_of_what_is_allowed(settings: dict[str, Any], allowed: str) -> None:
    assert refusal({"minference": settings}).endswith(f" is not allowed: it takes {allowed}.")


@pytest.mark.parametrize("field", CHOICES)
def test_choices_are_taken(field: str) -> None:
    for value in CHOICES[field]:
        taken = getattr(load(**{field: value}), field)
        assert (taken.name if field == "method" else taken) == value


@pytest.mark.parametrize("field", ["method", "kernel", "page_salt"])
def test_the_refusal_of_a_choice_lists_them(field: str) -> None:
    message = refusal({"minference": {field: "fastest"}})
    assert f"minference.{field}='fastest'" in message
    assert all(repr(choice) in message for choice in CHOICES[field])


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG_TYPES.items() for value in values]
)
def test_a_wrong_type_is_refused_by_field_and_value(field: str, value: Any) -> None:
    assert f"minference.{field}={value!r}" in refusal({"minference": {field: value}})


def test_a_whole_number_of_seconds_is_taken() -> None:
    assert load(log_every=30).log_every == 30.0


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400])
def test_seconds_are_finite(value: float) -> None:
    # Python's JSON parser reads Infinity and NaN.
    assert "minference.log_every" in refusal({"minference": {"log_every": value}})


# The method


@pytest.mark.parametrize("method", METHODS)
def test_a_bare_name_is_the_method_with_its_defaults(method: type) -> None:
    assert load(method=name_of(method)).method == load(method={"name": name_of(method)}).method == method.Settings()


def test_the_settings_of_a_method_are_an_object_of_their_own() -> None:
    config = load(method={"name": "vertical_slash", "vertical_size": 500})
    assert config == MInferenceConfig(method=VerticalSlashSettings(vertical_size=500))
    assert config.method.vertical_size == 500


@method_fields
def test_a_setting_of_a_method_says_where_it_belongs(method: type, field: str) -> None:
    message = refusal({"minference": {field: 500}})
    owners = [name_of(other) for other in METHODS if field in other.Settings.model_fields]
    assert name_of(method) in owners
    assert any(
        f'minference.{field} is a setting of the method {owner}: write "method": {{"name": "{owner}", "{field}": 500}}'
        in message
        for owner in owners
    )


def test_what_a_message_says_to_write_is_json() -> None:
    message = refusal({"minference": {"probe_rows": "both"}})
    written = message.partition("write ")[2].removesuffix(".")
    assert load(**json.loads(f"{{{written}}}")).method == VerticalSlashSettings(probe_rows="both")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_key_of_a_method_is_refused_and_its_settings_are_listed(method: type) -> None:
    message = refusal({"minference": {"method": {"name": name_of(method), "sizes": 7}}})
    assert "minference.method.sizes is not a setting" in message
    assert all(field in message for field in method.Settings.model_fields)


def test_a_wrong_value_of_a_method_is_refused_by_field() -> None:
    message = refusal({"minference": {"method": {"name": "vertical_slash", "probe_rows": "first"}}})
    assert "minference.method.probe_rows='first'" in message
    assert all(choice in message for choice in ("last", "spread", "both"))


@pytest.mark.parametrize(
    ("probe_rows", "counts"),
    [("last", (PROBE_ROWS, 0)), ("spread", (0, PROBE_ROWS)), ("both", (PROBE_ROWS, PROBE_ROWS))],
)
def test_probe_counts_follow_probe_rows(probe_rows: str, counts: tuple[int, int]) -> None:
    assert load(method={"name": name_of(VerticalSlash), "probe_rows": probe_rows}).method.probe_counts == counts


# What is refused


def test_an_unknown_key_is_refused_and_the_settings_are_listed() -> None:
    message = refusal({"minference": {"min_seq_length": 7}})
    assert "minference.min_seq_length is not a setting" in message
    assert all(field in message for field in MInferenceConfig.model_fields)


def test_every_fault_is_named_at_once() -> None:
    wrong = {"min_chunk": -1, "kernel": 3, "typo": 1, "method": {"name": "vertical_slash", "slash_size": 0}}
    message = refusal({"minference": wrong})
    assert all(f"minference.{field}" in message for field in ("min_chunk", "kernel", "typo", "method.slash_size"))


@pytest.mark.parametrize("value", [None, 7, "min_seq_len=7", ["min_seq_len"], True])
def test_the_inline_settings_must_be_an_object(value: Any) -> None:
    message = refusal({"minference": value})
    assert '"minference"' in message
    assert "JSON object" in message


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param("x" * 10**6, id="a string in place of the settings"),
        pytest.param({"kernel": "x" * 10**6}, id="a long value"),
        pytest.param({"kernel": "auto\ncuda"}, id="a value of two lines"),
        pytest.param({"x" * 10**6: 1}, id="a long key"),
        pytest.param({"min_chunk\nmin_seq_len": 1}, id="a key of two lines"),
        pytest.param({"kernel": [10**5000]}, id="a list of a number that Python does not write out"),
        pytest.param({"method": "x" * 10**6}, id="a long name of a method"),
        pytest.param({"method": {"name": "x" * 10**6}}, id="a long name in an object"),
        pytest.param({"vertical_size": 10**5000}, id="a long number where it does not belong"),
        pytest.param({f"key{i}": i for i in range(1000)}, id="many unknown keys"),
    ],
)
def test_a_message_is_short_and_on_one_line_whatever_was_given(settings: Any) -> None:
    assert "minference" in refusal({"minference": settings})


@pytest.mark.parametrize("field", MInferenceConfig.model_fields)
def test_the_configuration_is_frozen(field: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(MInferenceConfig(), field, getattr(MInferenceConfig(), field))


@method_fields
def test_the_settings_of_a_method_are_frozen(method: type, field: str) -> None:
    settings = method.Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, field, getattr(settings, field))
