# SPDX-License-Identifier: Apache-2.0
"""A whole search: what it writes is served, costs no more, harms less, and is found again after an interruption."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.errors import ConfigError
from minference_vllm.patterns import DENSE, AutoSettings, ServedModel, resolve
from minference_vllm.patterns.file import Provenance, parse_pattern
from minference_vllm.patterns.importer import write
from minference_vllm.search.candidates import CANDIDATES, DEFAULT, ROUGH
from minference_vllm.search.journal import Journal, Origin
from minference_vllm.search.prompts import Prompts
from minference_vllm.search.run import Found, Search
from minference_vllm.search.verdict import Verdict
from tests.unit.search.model import FakeReader

PROMPTS = Prompts(((1,), (2,)), ((3,), (4,), (5,)))
ORIGIN = Origin(
    version="1", vllm="2", device="cpu", model="org/Model", data=("a",), tokens=(700,), prompts=2, seed=0, cost="pairs",
    engine="{}", candidates=("x",),
)  # fmt: skip


def run(reader: FakeReader, path: Path, methods: tuple[str, ...] = ("block",)) -> tuple[Found, list[str]]:
    """What is found, and what was said on the way."""
    said: list[str] = []
    search = Search(reader, PROMPTS, methods, 0)  # type: ignore[arg-type]
    provenance = Provenance(source="these tests", notes=("a command",))
    found = search.run("org/Model", provenance, Journal(path, ORIGIN), said.append)
    assert len(said) == search.num_steps
    return found, said


@pytest.fixture(scope="module", autouse=True)
def few_candidates(short_prompts_drop_as_much: None) -> Iterator[None]:
    """Enough to choose from, and quick to try."""
    few = {"block": (0.05, ROUGH, 0.75, DEFAULT, 0.92), "vertical_slash": (("a_shape", 32, 64), (30, 200))}
    with pytest.MonkeyPatch.context() as patch:
        for name, heads in few.items():
            patch.setitem(CANDIDATES, name, replace(CANDIDATES[name], heads=heads))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path, int]:
    """A search that nothing interrupted, its journal, and how many prompts it read."""
    reader, path = FakeReader(), tmp_path_factory.mktemp("search") / "journal.jsonl"
    found, _ = run(reader, path)
    return found, path, reader.readings


def test_the_file_harms_less_at_no_more_cost(whole: Any) -> None:
    verdict = whole[0].verdict
    assert verdict.is_better
    assert verdict.cost_ratio <= 1.02
    assert all(new < old for new, old in zip(verdict.file_kl, verdict.default_kl, strict=True))


def test_the_file_says_what_each_head_of_the_whole_model_keeps(whole: Any) -> None:
    file = whole[0].file
    assert file.layers[1] == DENSE, "it can never run sparse"
    heads = {head for layer in (file.layers[0], file.layers[2]) if layer != DENSE for head in layer}
    assert heads <= set(CANDIDATES["block"].heads)
    assert len(heads) > 1
    assert file.provenance.notes == ("a command", whole[0].verdict.sentence())


def test_what_is_written_is_served(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    path.write_text(write(whole[0].file))
    model = ServedModel(("/models/Model",), FakeReader.geometry)
    resolved = resolve(AutoSettings(pattern_file=str(path)), model)
    assert resolved.pattern is not None
    assert resolved.pattern.file == whole[0].file == parse_pattern(path.read_text(), "x")
    assert resolved.settings.name == "block"
    assert "the shares of the pattern file" in resolved.why


def test_an_interrupted_search_goes_on_where_it_stopped(whole: Any, tmp_path: Path) -> None:
    path, readings = tmp_path / "journal.jsonl", 4  # both prompts' candidates, and one layer of the first
    with pytest.raises(KeyboardInterrupt):
        run(FakeReader(fails_after=readings), path)
    reader = FakeReader()
    found, _ = run(reader, path)
    assert found == whole[0]
    # Beside what was lost, no more is read again than the prompt with all keys that others are compared with.
    assert reader.readings <= whole[2] - readings + 1


def test_what_was_measured_is_not_measured_again(whole: Any) -> None:
    reader = FakeReader()
    found, _ = run(reader, whole[1])
    assert found == whole[0]
    # Each fit and each check is.
    assert reader.readings == whole[2] - len(PROMPTS.searching) * (2 + len(reader.ground.indices))


def test_measurements_of_another_search_are_not_gone_on_with(whole: Any) -> None:
    other = ORIGIN.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"seed was 0 and is now 1"):
        Journal(whole[1], other)


def test_a_line_that_was_cut_off_is_measured_again(whole: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(whole[1].read_bytes()[:-10])
    assert len(Journal(path, ORIGIN).kls()) == len(Journal(whole[1], ORIGIN).kls()) - 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_sizes_are_found_too_and_the_better_method_is_written(tmp_path: Path) -> None:
    found, said = run(FakeReader(), tmp_path / "journal.jsonl", ("vertical_slash", "block", "block"))
    assert found.file.method.name in ("block", "vertical_slash")
    fits = [line.split(",")[0] for line in said if "default's cost" in line]
    assert fits == ["fit of vertical_slash", "fit of block"]


@pytest.mark.parametrize(("ratios", "checks"), [((1.25, 1.0), 2), ((1.25, 1.25), 2), ((1.01, 1.25), 1)])
def test_what_costs_more_on_other_prompts_is_fitted_once_more_to_cost_less(
    ratios: tuple[float, ...], checks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    verdicts = [Verdict([1.0, 1.1, 0.9], [0.5, 0.6, 0.4], 100.0, 100 * ratio, "pairs") for ratio in ratios]
    given = iter(verdicts)
    monkeypatch.setattr(Search, "_check", lambda *_: next(given))
    search = Search(FakeReader(), PROMPTS, ("block",), 0)  # type: ignore[arg-type]
    journal = Journal(tmp_path / "journal.jsonl", ORIGIN)
    found = search.run("org/Model", Provenance(source="these tests"), journal, said.append)
    fits = [float(line.split()[3]) for line in said if "default's cost" in line]
    assert len(fits) == checks
    assert 0.9 < fits[0] <= 1.01
    if checks == 2:
        assert 0.7 < fits[1] <= 0.81
    assert found.verdict == verdicts[checks - 1]
    assert found.file.provenance.notes == (found.verdict.sentence(),)


# The verdict


@pytest.mark.parametrize(
    ("default", "file", "costs", "is_better"),
    [
        ([1.0, 1.1, 0.9], [0.5, 0.6, 0.4], (100.0, 100.0), True),
        ([1.0, 1.1, 0.9], [0.5, 0.6, 0.4], (100.0, 101.9), True),
        ([1.0, 1.1, 0.9], [0.5, 0.6, 0.4], (100.0, 103.0), False),
        ([1.0, 1.1, 0.9], [1.0, 1.1, 0.9], (100.0, 50.0), False),
        # Prompts differ by factors, and so does what is gained.
        ([0.01, 0.1, 1.0], [0.008, 0.07, 0.75], (100.0, 100.0), True),
        # One prompt that gains far more than the others does not make their gain uncertain.
        ([1.0, 1.0, 1.0], [0.7, 0.1, 0.001], (100.0, 100.0), True),
        # Less on average, but one prompt says otherwise.
        ([1.0, 1.0, 1.0], [0.2, 0.9, 1.2], (100.0, 100.0), False),
        ([0.5, 0.6, 0.4], [1.0, 1.1, 0.9], (100.0, 100.0), False),
    ],
)
def test_better_is_less_divergence_beyond_noise_at_no_more_cost(
    default: list[float], file: list[float], costs: tuple[float, float], is_better: bool
) -> None:
    verdict = Verdict(default, file, *costs, "ms")
    assert verdict.is_better is is_better
    assert verdict.sentence().startswith("On 3 other prompts KL to dense attention is ")
