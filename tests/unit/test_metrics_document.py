# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md names every metric that the package exports, as it is exported, with a query that asks for it."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import import_or_skip
from tests.unit.exported import PREFIX, exported, groupings, selectors

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
SECTION = re.compile(rf"^### ({PREFIX}\w+)\n\n(\w+); (.+?)\. (.+?)\n\n    (.+?)\n\n", re.MULTILINE | re.DOTALL)


class Section(NamedTuple):
    """One metric in the document."""

    name: str
    type: str
    labels: str
    meaning: str
    query: str


SECTIONS = [Section(*found.groups()) for found in SECTION.finditer(DOCUMENT.read_text())]


def test_every_metric_is_documented_with_its_type_and_labels(tmp_path: Path) -> None:
    documented = {
        section.name: (section.type.lower(), set(re.findall(r"`(\w+)`", section.labels))) for section in SECTIONS
    }
    assert documented == exported(tmp_path)


def test_no_other_metric_of_the_package_is_named(tmp_path: Path) -> None:
    assert set(re.findall(rf"\b{PREFIX}\w+", DOCUMENT.read_text())) == set(exported(tmp_path))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_the_example_asks_for_the_metric_and_for_labels_that_it_has(section: Section, tmp_path: Path) -> None:
    import_or_skip("promql_parser")
    labels_of = {name: labels for name, (_, labels) in exported(tmp_path).items()}
    asked = list(selectors(section.query))
    assert section.name in {name for name, _ in asked}
    for name, matched in asked:
        assert set(matched) | groupings(section.query) <= labels_of[name]
