# SPDX-License-Identifier: Apache-2.0
"""The share of attention that a method keeps: its bounds, and what it makes of vertical_slash's sizes."""

import json
import math
from typing import Any

import pytest

from minference_vllm.methods import MAX_TOKENS, METHODS
from minference_vllm.methods.vertical_slash import SLASH_SIZE, VERTICAL_SIZE, VerticalSlashSettings
from tests.unit.test_config import load, name_of, refusal


def method_with(**settings: Any) -> dict[str, Any]:
    return {"name": "vertical_slash", **settings}


def test_a_share_is_bounded_by_the_sizes_that_are_given_beside_it() -> None:
    def sizes(**settings: Any) -> tuple[int, int]:
        method = load(method=method_with(**settings)).method
        return method.vertical_size, method.slash_size

    assert sizes() == sizes(share=None) == (VERTICAL_SIZE, SLASH_SIZE)
    assert sizes(share=0.9) == (MAX_TOKENS, MAX_TOKENS)
    assert sizes(share=0.9, vertical_size=1000) == (1000, MAX_TOKENS)
    assert sizes(share=0.9, vertical_size=7, slash_size=8) == (7, 8)
    assert VerticalSlashSettings(share=0.9) == load(method=method_with(share=0.9)).method


@pytest.mark.parametrize("settings", [{}, {"share": 0.9}, {"share": 0.9, "slash_size": 6096}])
def test_settings_that_are_written_out_mean_what_they_meant(settings: dict[str, Any]) -> None:
    method = load(method=method_with(**settings)).method
    written = json.loads(method.model_dump_json())
    assert load(method=written).method == method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0, -0.1, 1.01, 90, math.inf, math.nan, "0.9", [0.9], True])
def test_a_share_is_above_0_and_up_to_1(method: type, value: Any) -> None:
    for share in (0.001, 0.9, 1.0, 1):
        assert load(method={"name": name_of(method), "share": share}).method.share == share
    message = refusal({"minference": {"method": {"name": name_of(method), "share": value}}})
    said = f"minference.method.share={value!r} is not allowed: it takes a number above 0, at most 1"
    assert message in (f"{said}.", f"{said}, or null.")
