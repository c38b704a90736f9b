# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.soak draws, judges and merges. None starts a server."""

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import DENSE, SPARSE
from benchmarks.soak import limits
from benchmarks.soak.client import Sent
from benchmarks.soak.found import Found
from benchmarks.soak.growth import Growth
from benchmarks.soak.latencies import STEP, Latencies
from benchmarks.soak.merge import MergeError, details, make_rows, merge
from benchmarks.soak.schedule import Fate, Mix, Request, requests

MIX = Mix(rate=8.0, short_tokens=(10, 20), long_tokens=(100, 200), answer_tokens=(4, 8))
RUN = {name: name for name in ("gpu", "driver", "vllm", "torch", "triton", "commit", "command", "date")}


def drawn(seed: int, client: int, count: int = 2000) -> list[Request]:
    return list(itertools.islice(requests(MIX, seed, client, clients=4), count))


# the schedule


def test_a_seed_gives_the_same_requests_at_the_same_times() -> None:
    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)


def test_requests_are_drawn_in_the_shares_and_bounds_of_the_mix() -> None:
    some = [request for client in range(4) for request in drawn(0, client)]
    share = {fate: count / len(some) for fate, count in Counter(request.fate for request in some).items()}
    wanted = {Fate.CANCELLED: 0.05, Fate.DROPPED: 0.05, Fate.INVALID: 0.02, Fate.ANSWERED: 0.88}
    assert share == pytest.approx(wanted, abs=0.015)
    long = [request.prompt_tokens for request in some if request.is_long]
    assert len(long) / len(some) == pytest.approx(0.2, abs=0.02)
    assert (min(long), max(long)) == (100, 200)
    assert {request.answer_tokens for request in some} == {4, 5, 6, 7, 8}
    assert 4 * 2000 / max(request.at_s for request in some) == pytest.approx(MIX.rate, rel=0.1)


# latencies


def test_quantiles_are_those_of_the_times() -> None:
    rng = random.Random(0)
    times = [rng.lognormvariate(-4, 1) for _ in range(1000)]
    found = Latencies()
    found.extend(times)
    for share in (0.5, 0.99):
        exact = sorted(times)[math.ceil(share * len(times)) - 1]
        assert found.quantile(share) == pytest.approx(exact, rel=STEP - 1)
    assert Latencies().quantile(0.5) is None


def test_latencies_of_two_runs_are_added() -> None:
    one, other = Latencies(), Latencies()
    one.extend([0.001] * 3)
    other.extend([1.0])
    both = Latencies.from_json(json.loads(json.dumps((one + other).to_json())))
    assert (both.total, both.quantile(0.75), both.quantile(0.76)) == (
        4, pytest.approx(0.001, rel=1e-3), pytest.approx(1.0, rel=1e-3),
    )  # fmt: skip


# what is found of a server


def make_found(backend: str, itl_s: float = 0.01, **counts: int) -> Found:
    found = Found(backend, growth={"host": Growth(1.0, 0.5, 1.5), "gpu": Growth(0.0, 0.0, 0.0)})
    found.take(Sent(Fate.ANSWERED, ttft_s=0.1, gaps_s=[itl_s] * 100), is_long=False, late_s=0.0)
    found.take(Sent(Fate.CANCELLED, ttft_s=2.0, gaps_s=[0.5]), is_long=True, late_s=1.0)
    found.take(Sent(Fate.DROPPED), is_long=False, late_s=0.0)
    found.take(Sent(Fate.INVALID), is_long=False, late_s=0.0)
    sparse = {"sparse_tokens": 100, "kept_pairs": 1, "causal_pairs": 4} if backend == SPARSE else {}
    found.counts.update({**sparse, **counts})
    return found


def test_requests_are_counted_by_how_they_ended() -> None:
    found = make_found(SPARSE)
    found.take(Sent(Fate.ANSWERED, error="HTTP 500", ttft_s=9.0, gaps_s=[9.0]), is_long=False, late_s=0.0)
    row = found.row()
    expected = {
        "answered_short": 1, "answered_long": 0, "cancelled": 1, "dropped": 1, "refused": 1, "errors": 1,
        "density": 0.25, "late_p99_ms": pytest.approx(1000, rel=1e-3), "host_mib_per_hour_low": 0.5,
        "itl_short_p99_ms": pytest.approx(10, rel=1e-3), "ttft_long_p50_ms": pytest.approx(2000, rel=1e-3),
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert found.errors == {"HTTP 500": 1}


def test_a_row_and_its_details_are_all_that_was_found() -> None:
    found = make_found(SPARSE, errors=1)
    row, rest = json.loads(json.dumps([found.row(), found.details()]))
    assert Found.from_row(row, rest).row() == found.row()


# limits


def test_a_server_within_the_limits_exceeds_none() -> None:
    found = {DENSE: make_found(DENSE), SPARSE: make_found(SPARSE, itl_s=0.01 * limits.MOST_ITL_RATIO * 0.99)}
    assert limits.exceeded(found, ("host", "gpu")) == []


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        (make_found(SPARSE, errors=1), "sparse: 1 errors"),
        (make_found(SPARSE, restarts=2), "sparse: 2 restarts"),
        (make_found(SPARSE, left_requests=3), "sparse: 3 left_requests"),
        (make_found(SPARSE, itl_s=0.01 * limits.MOST_ITL_RATIO * 1.01), "p99 inter-token latency"),
        (make_found(SPARSE, sparse_tokens=0), "nothing ran sparse"),
        (replace(make_found(SPARSE), times=Found(SPARSE).times), "cannot be compared"),
        (replace(make_found(SPARSE), growth={"host": None, "gpu": None}), "too few samples of host"),
        (replace(make_found(SPARSE), growth={"host": Growth(999, 258, 2000), "gpu": None}), "host memory grows by 257"),
        (replace(make_found(SPARSE), growth={"host": Growth(1, 0, 2), "gpu": Growth(17, 17, 17)}), "gpu memory grows"),
    ],
)
def test_each_limit_can_be_exceeded(sparse: Found, said: str) -> None:
    faults = limits.exceeded({DENSE: make_found(DENSE), SPARSE: sparse}, ("host",))
    assert len(faults) == 1 and said in faults[0]


def test_a_dense_server_must_not_fail_either() -> None:
    assert limits.exceeded({DENSE: make_found(DENSE, restarts=1), SPARSE: make_found(SPARSE)}, ()) == [
        "dense: 1 restarts"
    ]


def test_a_dense_server_that_runs_sparse_is_none() -> None:
    [fault] = limits.exceeded({DENSE: make_found(DENSE, sparse_tokens=1), SPARSE: make_found(SPARSE)}, ())
    assert "on the dense server" in fault


def test_growth_that_noise_explains_is_none() -> None:
    noisy = replace(make_found(SPARSE), growth={"host": Growth(9000, -100, 18000), "gpu": None})
    assert limits.exceeded({DENSE: make_found(DENSE), SPARSE: noisy}, ("host",)) == []


@pytest.mark.parametrize(("dense", "fails"), [(-50, True), (0, True), (43, True), (45, False)])
def test_what_the_dense_server_grows_by_too_is_none(dense: float, fails: bool) -> None:
    stock = replace(make_found(DENSE), growth={"host": Growth(dense, dense, dense), "gpu": None})
    sparse = replace(make_found(SPARSE), growth={"host": Growth(999, 300, 2000), "gpu": None})
    faults = limits.exceeded({DENSE: stock, SPARSE: sparse}, ("host",))
    assert len(faults) == fails
    assert all("more than dense's; 256 are allowed" in fault for fault in faults)


def with_host(backend: str, level: float, step: float) -> Found:
    return replace(make_found(backend), growth={"host": Growth(0, -9, 9, level, step), "gpu": None})


@pytest.mark.parametrize(
    ("level", "dense", "sparse", "fails"),
    [
        (2000, 0, 31, False),
        (2000, 0, 33, True),
        (20_000, 0, 99, False),
        (20_000, 0, 101, True),
        (2000, 50, 80, False),
        (2000, 50, 83, True),
        (2000, -50, 31, False),
    ],
)
def test_a_step_beyond_denses_may_be_small(level: float, dense: float, sparse: float, fails: bool) -> None:
    found = {DENSE: with_host(DENSE, level, dense), SPARSE: with_host(SPARSE, level, sparse)}
    faults = limits.exceeded(found, ("host",))
    assert faults == (
        [f"host memory is {sparse - max(dense, 0)} MiB higher in the last third than in the second"] * fails
    )


def test_of_several_stretches_the_steepest_and_the_highest_count() -> None:
    one, other = with_host(SPARSE, 100, 5), with_host(SPARSE, 90, 7)
    assert (one + other).growth["host"] == Growth(0, -9, 9, 90, 7)
    assert (one + replace(other, growth=dict.fromkeys(other.growth))).growth["host"] == one.growth["host"]


# merging


def write_stretch(path: Path, seed: int, found: dict[str, Found], **changes: Any) -> Path:
    record = {
        **RUN, "settings": {"clients": 4}, "limits": limits.as_json(), "watched": ["host"], "seed": seed,
        "rows": make_rows(found, 1), "details": details(found), **changes,
    }  # fmt: skip
    path.write_text(json.dumps(record))
    return path


def test_stretches_are_pooled(tmp_path: Path) -> None:
    grows = replace(make_found(SPARSE, itl_s=0.5), growth={"host": Growth(400, 300, 500), "gpu": None})
    paths = [
        write_stretch(tmp_path / "1.json", 1, {DENSE: make_found(DENSE), SPARSE: make_found(SPARSE)}),
        write_stretch(tmp_path / "2.json", 2, {DENSE: make_found(DENSE, itl_s=0.5), SPARSE: grows}),
    ]
    [fault] = merge(paths, tmp_path / "all.json")
    assert fault == f"{paths[1]}: host memory grows by 299 MiB an hour more than dense's; 256 are allowed"
    merged = json.loads((tmp_path / "all.json").read_text())
    assert [(row["stretch"], row["backend"]) for row in merged["rows"]] == [
        (1, DENSE), (1, SPARSE), (2, DENSE), (2, SPARSE), ("all", DENSE), ("all", SPARSE),
    ]  # fmt: skip
    pooled = merged["rows"][-1]
    assert (pooled["answered_short"], pooled["sparse_tokens"], pooled["density"]) == (2, 200, 0.25)
    assert pooled["itl_short_p99_ms"] == pytest.approx(500, rel=1e-3)
    assert merged["exceeded"] and merged["gpu"] == "gpu"


def test_memory_is_judged_stretch_by_stretch(tmp_path: Path) -> None:
    steps = ((1, 40, 0), (2, 0, 40))  # dense's step in one does not excuse sparse's in the other
    paths = [
        write_stretch(
            tmp_path / f"{seed}.json",
            seed,
            {DENSE: with_host(DENSE, 2000, dense), SPARSE: with_host(SPARSE, 2000, sparse)},
        )
        for seed, dense, sparse in steps
    ]
    [fault] = merge(paths, tmp_path / "all.json")
    assert fault == f"{paths[1]}: host memory is 40 MiB higher in the last third than in the second"
    unwatched = replace(make_found(SPARSE), growth={"host": None, "gpu": None})
    write_stretch(paths[1], 2, {DENSE: make_found(DENSE), SPARSE: unwatched})
    [fault] = merge(paths, tmp_path / "all.json")
    assert fault == f"{paths[1]}: too few samples of host memory: let the traffic run longer"


def test_a_stretch_that_ran_nothing_sparse_is_not_hidden_by_another(tmp_path: Path) -> None:
    good, null = ({DENSE: make_found(DENSE), SPARSE: make_found(SPARSE, sparse_tokens=some)} for some in (100, 0))
    paths = [write_stretch(tmp_path / f"{seed}.json", seed, found) for seed, found in ((1, good), (2, null))]
    [fault] = merge(paths, tmp_path / "all.json")
    assert fault == f"{paths[1]}: nothing ran sparse: the traffic shows nothing"
    assert json.loads((tmp_path / "all.json").read_text())["exceeded"] == [fault]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"seed": 1}, "same seed"),
        ({"seed": 2, "commit": "other"}, "differ in commit"),
        ({"seed": 2, "settings": {}}, "differ in settings"),
        ({"seed": 2, "rows": []}, "one dense and one sparse row"),
    ],
)
def test_what_are_no_stretches_of_one_run_are_refused(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    found = {DENSE: make_found(DENSE), SPARSE: make_found(SPARSE)}
    paths = [
        write_stretch(tmp_path / "1.json", 1, found),
        write_stretch(tmp_path / "2.json", **{"seed": 2, "found": found, **second}),
    ]
    with pytest.raises(MergeError, match=said):
        merge(paths, tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()
