# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md has every message that the package raises or logs as a warning or an error, and no other."""

import re
from pathlib import Path

import pytest

from minference_vllm.plugin import STEPS
from tests.unit.messages import FORWARDING, SAYING, Message, messages

DOCUMENT = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ENTRY = re.compile(r"^- `([^`]+)`$", re.MULTILINE)
MESSAGES = list(messages())
ENTRIES = ENTRY.findall(DOCUMENT.read_text())


def test_the_search_finds_what_is_raised_and_what_is_logged() -> None:
    found = {(message.place, message.constant) for message in MESSAGES}
    assert ("plugin.register", "MInference is registered, but") in found
    assert ("tuning.heads.of_model", "cannot be read from its config.json:") in found
    assert ("cli.tune._heads", "Give --model, or --heads, --kv-heads and --head-dim.") in found
    assert {place for place, _ in found} >= SAYING


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: f"{message.place}: {message.constant}")
def test_a_message_is_explained(message: Message) -> None:
    if not message.constant:
        assert message.place in FORWARDING, "nothing of it is constant: say in messages.py what it passes on"
    else:
        assert any(message.constant in entry for entry in ENTRIES), f"not in {DOCUMENT.name}"


def test_nothing_is_explained_that_is_never_said() -> None:
    constants = [message.constant for message in MESSAGES if message.constant]
    assert [entry for entry in ENTRIES if not any(constant in entry for constant in constants)] == []


def test_what_is_passed_on_is_passed_on_somewhere() -> None:
    assert {message.place for message in MESSAGES if not message.constant} == FORWARDING


@pytest.mark.parametrize("consequence", [consequence for _, consequence in STEPS])
def test_what_is_lost_when_a_step_of_registration_fails_is_explained(consequence: str) -> None:
    assert consequence in " ".join(DOCUMENT.read_text().replace("`", "").split())
