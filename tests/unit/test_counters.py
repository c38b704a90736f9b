# SPDX-License-Identifier: Apache-2.0
"""What a step leaves to count is counted once, in order, whoever asks when."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from minference_vllm.metrics import counters as counters_module
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.snapshot import Snapshot, Times
from minference_vllm.recall import LayerRecall, Recall


def make_counters(tally) -> Counters:
    return Counters(0, tally, read=Snapshot)


def test_threads_lose_no_tokens():
    counters = make_counters(tally=dict)

    def serve() -> None:
        for _ in range(500):
            counters.defer({("dense", "short_chunk"): (3, 1, 0)})
            counters.snapshot()

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(serve) for _ in range(8)]:
            done.result()
    assert counters.snapshot() == Snapshot(
        Counter({("dense", "short_chunk"): 8 * 500 * 3}), Counter({("dense", "short_chunk"): 8 * 500})
    )


def test_steps_are_tallied_in_their_order_when_somebody_asks():
    steps = []
    counters = make_counters(tally=lambda step: steps.append(step) or {})
    for step in ("a", "b", "a"):
        counters.defer(step)
    assert steps == []
    counters.snapshot()
    assert steps == ["a", "b", "a"]


def test_a_step_does_no_more_than_append():
    counters = make_counters(tally=dict)
    assert counters.defer == counters._deferred.append


def test_what_is_left_to_count_is_bounded_and_a_loss_reported_once(monkeypatch, log_lines):
    monkeypatch.setattr(counters_module, "MOST_DEFERRED", 3)
    counters = make_counters(tally=lambda step: {("dense", "x"): (step, 1, 0)})
    for total in (4 + 5 + 6, 2 * (4 + 5 + 6)):
        for step in range(1, 7):
            counters.defer(step)
        assert counters.snapshot().tokens["dense", "x"] == total
    assert [level for level, line in log_lines if "missing" in line] == ["WARNING"]


def test_a_step_that_cannot_be_tallied_is_reported_and_the_next_is_counted(log_lines):
    counters = make_counters(tally=lambda tokens: {("dense", "x"): (12 // tokens, 1, 0)})
    for tokens in (0, 4):
        counters.defer(tokens)
    assert counters.snapshot().tokens["dense", "x"] == 3
    [(level, line)] = log_lines
    assert level == "ERROR" and "could not count a step" in line


def test_a_snapshot_is_a_value_of_its_time():
    counters = make_counters(tally=dict)
    before = counters.snapshot()
    counters.defer({("dense", "x"): (3, 1, 0)})
    assert counters.snapshot().tokens["dense", "x"] == 3
    assert before == Snapshot()


def test_snapshot_survives_json_and_arithmetic():
    recall = Recall(
        tuple(range(10)), 3, {0: LayerRecall(9, (8.25, 7.5), (0.5, 0.25)), 4: LayerRecall(9, (9.0,), (1.0,))}
    )
    tokens, chunks = Counter({("sparse", "gate_open"): 7}), Counter({("sparse", "gate_open"): 1})
    engines, times = Counter({("block", "cuda"): 1}), Times(3, 0.5, 0.25)
    one = Snapshot(tokens, chunks, 2**63, 2**65, recall, 2**35, engines, times, faults=4, broken_ranks=1)
    assert Snapshot.from_json(one.to_json()) == one
    assert one + one - one == one
    assert one - one == Snapshot()
    assert (one.density, Snapshot().density) == (0.25, None)


def test_summary_reads_as_documented():
    tokens = Counter(
        {("sparse", "gate_open"): 12288, ("dense", "short_chunk"): 12, ("dense", "below_min_seq_len"): 800}
    )
    assert Snapshot(tokens, Counter(), 142, 1000).summary(seconds=10.3) == (
        "MInference: 12,288 prompt tokens sparse, 812 dense (below_min_seq_len 800, short_chunk 12) in 10 s;"
        " density 14.2%"
    )
    guarded = Recall((5, 0, 0, 0, 0, 0, 0, 0, 0, 1000), 5)
    assert (
        Snapshot(tokens, Counter(), 142, 1000, guarded)
        .summary(seconds=10.3)
        .endswith("; density 14.2%; 5 of 1,005 heads again dense")
    )
    assert Snapshot(Counter({("sparse", "gate_open"): 5})).summary(seconds=1) == (
        "MInference: 5 prompt tokens sparse, 0 dense in 1 s; density not read yet"
    )
