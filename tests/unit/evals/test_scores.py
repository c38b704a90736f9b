# SPDX-License-Identifier: Apache-2.0
"""What `minference-vllm eval` makes of replies: scores, intervals, tests, divergences, counts of the sparse path."""

import itertools
import math
from collections import Counter

import numpy
import pytest

from minference_vllm.errors import ConfigError
from minference_vllm.evals import extras, paired, work
from minference_vllm.evals.paired import compare, sign_test
from minference_vllm.evals.sample import Kind, Reply, Sample, Step
from minference_vllm.evals.scores import Scores, least_kl, score
from minference_vllm.evals.work import Work, parse, settled
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.recall import NUM_BUCKETS, LayerRecall, Recall
from tests.unit.evals.fake_openai import exposed, one_prompt


def sample(kind: Kind, *references: str) -> Sample:
    return Sample(task="a", tokens=1, index=0, kind=kind, prompt="", max_tokens=1, references=references)


def reply(text: str = "", steps: str = "", **found: tuple[float, ...]) -> Reply:
    return Reply(
        id="a/1/0", text=text, steps=tuple(Step(token=token, likeliest={token: -0.1}) for token in steps), **found
    )


# Scores


@pytest.mark.parametrize(
    ("kind", "dense", "sparse", "expected"),
    [
        pytest.param(Kind.ALL, reply("Oslo and ROME"), reply("Rome"), (1, 0.5), id="share of the references"),
        pytest.param(Kind.ANY, reply("rome"), reply("Lima"), (1, 0), id="any of them"),
        pytest.param(
            Kind.FIRST_CHOICE,
            reply(first_choices=(True, True)),
            reply(first_choices=(True, False)),
            (1, 0.5),
            id="first choices",
        ),
        pytest.param(Kind.LOGPROB, reply(logprobs=(-1, -2)), reply(logprobs=(-2, -2)), (-1.5, -2), id="logprobs"),
    ],
)
def test_each_kind_has_its_score(kind: Kind, dense: Reply, sparse: Reply, expected: tuple[float, float]) -> None:
    assert score(sample(kind, "oslo", "Rome"), dense, sparse) == Scores(*expected)


@pytest.mark.parametrize(
    ("dense", "sparse", "agreement"),
    [
        ("abcd", "abcd", 1.0),
        ("abcd", "abxd", 0.5),
        ("abcd", "ab", 0.5),
        ("ab", "abcd", 1.0),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_agreement_ends_at_the_first_token_that_differs(dense: str, sparse: str, agreement: float) -> None:
    found = score(sample(Kind.AGREEMENT), reply(steps=dense), reply(steps=sparse))
    assert (found.dense, found.sparse) == (1.0, agreement)


def test_the_divergence_is_never_above_the_true_one_and_is_it_where_all_is_listed() -> None:
    lots = numpy.random.default_rng(0)
    for _ in range(50):
        p, q = lots.dirichlet(numpy.ones(30) / 3), lots.dirichlet(numpy.ones(30) / 3)
        true = float((p * numpy.log(p / q)).sum())

        def listed(distribution: numpy.ndarray, number: int) -> dict[str, float]:
            likeliest = numpy.argsort(-distribution)[:number]
            return {str(token): math.log(distribution[token]) for token in likeliest}

        assert 0 <= least_kl(listed(p, 20), listed(q, 20)) <= true + 1e-9
        assert least_kl(listed(p, 30), listed(q, 30)) == pytest.approx(true)


# Paired statistics


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (6, 0, 2 / 2**6), (10, 2, 2 * (1 + 12 + 66) / 2**12), (2, 10, 158 / 2**12)],
)  # fmt: skip
def test_the_sign_test_is_exact(lost: int, gained: int, expected: float) -> None:
    assert sign_test(lost, gained) == expected


def test_the_sign_test_counts_all_outcomes() -> None:
    changes = list(itertools.product((0, 1), repeat=9))
    at_most_two_or_at_least_seven = sum(sum(change) <= 2 or sum(change) >= 7 for change in changes)
    assert sign_test(7, 2) == at_most_two_or_at_least_seven / len(changes)


def test_samples_are_compared_with_themselves() -> None:
    dense = [0.0, 1.0] * 50
    found = compare([(dense, dense)], seed=0)
    assert found == (0.0, 0.0, 0.0, 0, 0, 1.0)  # their own spread is no noise
    worse = compare([(dense, [max(value - 0.1, 0.0) for value in dense])], seed=0)
    assert (worse.lost, worse.gained) == (50, 0)
    assert worse.loss == pytest.approx(0.05)
    assert 0.03 < worse.low < worse.loss < worse.high < 0.07
    assert worse == compare([(dense, [max(value - 0.1, 0.0) for value in dense])], seed=0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    lots = numpy.random.default_rng(1)
    held = 0
    for _ in range(60):
        found = compare([(lots.normal(0.3, 1.0, 40), numpy.zeros(40))], seed=0)
        held += found.low <= 0.3 <= found.high
    assert held >= 51  # 57 are expected, and fewer than 51 once in two hundred


def test_draws_are_made_in_parts_of_bounded_size_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = numpy.random.default_rng(2).normal(0.3, 1.0, 70)
    whole = compare([(differences, numpy.zeros(70))], seed=3)
    make, sizes = numpy.random.default_rng, []

    class Lots:
        def __init__(self, seed: int) -> None:
            self.lots = make(seed)

        def integers(self, low: int, high: int, shape: tuple[int, int]) -> numpy.ndarray:
            sizes.append(shape[0] * shape[1])
            return self.lots.integers(low, high, shape)

    monkeypatch.setattr(numpy.random, "default_rng", Lots)
    monkeypatch.setattr(paired, "MOST_AT_ONCE", 7001)
    assert compare([(differences, numpy.zeros(70))], seed=3) == whole
    assert max(sizes) <= 7001
    assert sum(sizes) == 70 * paired.RESAMPLES


def test_one_sample_has_no_interval() -> None:
    assert compare([([1.0], [0.0])], seed=0)[:3] == (1.0, None, None)


def test_groups_count_the_same_however_many_samples_they_have() -> None:
    lots = numpy.random.default_rng(5)
    many, few = lots.normal(0.0, 1.0, 900), lots.normal(1.0, 1.0, 100)
    found = compare([(many, numpy.zeros(900)), (few, numpy.zeros(100))], seed=0)
    assert found.loss == pytest.approx((many.mean() + few.mean()) / 2)
    # The standard error of half the sum of two independent means.
    error = math.hypot(many.std() / 30, few.std() / 10) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.lost, found.gained) == (sum(many > 0) + sum(few > 0), sum(many < 0) + sum(few < 0))
    assert compare([(many, many), ([1.0], [0.0])], seed=0)[:3] == (0.5, None, None)


# What the sparse path did


def test_counts_of_the_page_are_those_of_the_plugin() -> None:
    total = one_prompt("sparse", 100) + one_prompt("sparse", 50) + one_prompt("dense", 7)
    found = parse(exposed(total))
    assert (found.sparse_tokens, found.dense_tokens, found.exported) == (150, 7, True)
    assert (found.density, found.recall, found.redone) == (0.25, pytest.approx(0.9), 0.5)
    assert parse("# HELP other Nothing.\n") == Work()


def test_a_window_has_its_own_density_and_recall() -> None:
    before = one_prompt("sparse", 100)
    buckets = [0] * NUM_BUCKETS
    buckets[2] = 2  # from .5 to .6
    recall = Recall(tuple(buckets), 0, {0: LayerRecall(1, (0.5, 0.6), (0.5, 0.6))})
    later = Snapshot(Counter({("sparse", "gate_open"): 10}), Counter({("sparse", "gate_open"): 1}), 10, 100, recall)
    window = parse(exposed(before + later)) - parse(exposed(before))
    assert (window.sparse_tokens, window.density, window.redone) == (10, 0.1, 0)
    assert window.recall == pytest.approx(0.55)


def test_means_of_heads_are_not_asked_for() -> None:
    page = exposed(one_prompt("sparse", 100))
    old = page.replace(
        'minference_recall_mean{head="0",layer="0"} 0.9', 'minference_recall_mean{head="0",layer="0"} 0.1'
    )
    assert old != page
    assert parse(old).recall == pytest.approx(0.9)


@pytest.mark.parametrize("said", ["0.1", "NaN", "+Inf", None])
def test_a_sum_that_contradicts_the_histogram_or_is_missing_is_no_recall(said: str | None) -> None:
    lines = exposed(one_prompt("sparse", 100)).splitlines(keepends=True)
    at = [line.startswith("minference_recall_sum_total") for line in lines].index(True)
    lines[at] = f"minference_recall_sum_total {said}\n" if said else ""
    found = parse("".join(lines))
    assert found.recall is None
    assert Work.model_validate_json(found.model_dump_json()) == found


def test_counts_are_read_once_they_hold_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "STILL_S", 0.02)
    monkeypatch.setattr(work, "POLL_S", 0.001)
    pages = iter([0, 0, 60, 198, 198])  # a last token each may count as decode
    late = settled(lambda: Work(sparse_tokens=next(pages, 198), exported=True), Work(exported=True), 200, 2)
    assert late.sparse_tokens == 198
    monkeypatch.setattr(work, "LONGEST_WAIT_S", 0.05)
    never = settled(lambda: Work(sparse_tokens=50, exported=True), Work(exported=True), 200, 2)
    assert never.sparse_tokens == 50


def test_a_package_that_is_missing_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"No module named 'nowhere'.*pip install 'minference-vllm\[plot\]'"):
        extras.need("nowhere", "plot")
