# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm bench` against servers and a sender that a test holds: what it sends, writes and takes for proof."""

import json
from pathlib import Path

import pytest

from minference_vllm.bench import load, sender
from minference_vllm.bench.request import read_result
from minference_vllm.cli.status import FAILED, INCOMPLETE, NOT_SPARSE
from minference_vllm.errors import ConfigError
from minference_vllm.evals import serve
from minference_vllm.evals.extras import need
from tests.unit.bench.conftest import REQUESTS, Bench
from tests.unit.evals.fake_openai import DENSITY, RECALL, VERSION, fake_server

ONE_POINT = ("--input-len", "64", "--output-len", "5")


# What is sent


def test_every_length_is_sent_at_every_load_to_both_servers(bench: Bench) -> None:
    loads = ("--rate", "2", "0.5", "--concurrency", "1")
    assert bench.run("--input-len", "64", "32", "--output-len", "5", *loads) == 0
    measured = [each for each in bench.asked if each["num_prompts"] == REQUESTS]
    points = [
        (each["input_len"], each["output_len"], each["request_rate"], each["max_concurrency"]) for each in measured
    ]
    expected = [(read, 5, *load) for read in (32, 64) for load in (("0.5", None), ("2.0", None), (None, 1))]
    assert points == expected * 2
    assert [each["base_url"] for each in measured] == [bench.dense.url] * 6 + [bench.sparse.url] * 6


def test_both_servers_get_the_same_requests_and_no_run_finds_pages_of_another(bench: Bench) -> None:
    assert bench.run(*ONE_POINT, "--concurrency", "1", "2") == 0
    same = ("seed", "dataset_name", "tokenizer", "temperature")
    assert len({tuple(each[name] for name in same) for each in bench.asked}) == 1
    assert bench.asked[0]["dataset_name"] == "random"
    salts = [json.loads(each["extra_body"])["cache_salt"] for each in bench.asked]
    assert len(set(salts)) == len(salts) == 6


def test_each_length_is_warmed_up_once_a_server_and_not_measured(bench: Bench) -> None:
    assert bench.run(*ONE_POINT, "--concurrency", "1", "2") == 0
    assert [each["num_prompts"] for each in bench.asked] == [2, REQUESTS, REQUESTS] * 2
    # Warm-ups ran sparse too: they are in no row.
    assert {row["sparse_tokens"] for row in bench.report["rows"]} == {64 * REQUESTS}


def test_prompts_are_cut_from_a_text(
    bench: Bench, pandas: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        """A tokenizer of single letters."""

        def __init__(self, name: str) -> None:
            self.encode, self.decode = list, "".join

    monkeypatch.setattr(load, "Tokenizer", Letters)
    text = "".join(chr(ord("a") + number % 26) for number in range(1000))
    (tmp_path / "novel.txt").write_text(text)
    assert bench.run(*ONE_POINT, "--text", str(tmp_path / "novel.txt")) == 0
    [path] = {each["dataset_path"] for each in bench.asked}
    prompts = [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
    assert len(prompts) == REQUESTS
    assert all(len(prompt) == 64 and prompt in text for prompt in prompts)
    assert len(set(prompts)) > 1
    assert all(each["ignore_eos"] and each["dataset_name"] == "custom" for each in bench.asked)


def test_another_data_set_has_lengths_of_its_own(bench: Bench) -> None:
    assert bench.run("--bench", "--dataset-name sonnet") == 0
    assert {(each["dataset_name"], each["input_len"], each["output_len"]) for each in bench.asked} == {
        ("sonnet", None, None)
    }
    [row] = bench.report["rows"]
    assert (row["input_len"], row["output_len"], row["load"]) == (None, None, "1 in flight")


# What is written


def test_the_faster_server_is_said_to_be_so(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(*ONE_POINT) == 0
    [row] = bench.report["rows"]
    assert (row["requests"], row["dense_failed"], row["sparse_failed"]) == (REQUESTS, 0, 0)
    assert (row["ttft_dense"], row["ttft_sparse"]) == (410.0, 102.5)  # the median is between the third and the fourth
    assert (row["ttft_speedup"], row["ttft_low"], row["ttft_high"]) == (4, 4, 4)
    assert (row["itl_speedup"], row["tpot_speedup"]) == (1, 1)
    assert row["e2e_speedup"] == pytest.approx((410 + 40) / (102.5 + 40), abs=1e-4)
    assert (row["density"], row["recall"], row["sparse_share"]) == (DENSITY, RECALL, 1)
    [rate] = [rate for rate in bench.report["rates"] if rate["rate"] == "requests a second"]
    assert rate["dense"] == pytest.approx(REQUESTS / (0.4 * 6.15 + 0.25), abs=1e-4)
    assert row["throughput"] == pytest.approx(rate["ratio"], abs=1e-4)
    assert bench.report["settings"]["sparse"]["vllm"] == [VERSION]
    assert "4.000" in capsys.readouterr().out


def test_no_answer_is_written_down(bench: Bench) -> None:
    assert bench.run(*ONE_POINT) == 0
    assert all("a secret" not in file.read_text() for file in bench.out.iterdir())


def test_requests_that_fail_are_counted_named_and_in_no_time(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    traceback = 'Traceback (most recent call last):\n  File "x"\nClientError: gone\n'
    bench.answer(failing={bench.sparse.url: {"0": traceback}, bench.dense.url: {"5": "Bad Request"}})
    assert bench.run(*ONE_POINT, "--warmups", "0") == INCOMPLETE
    [row] = bench.report["rows"]
    assert (row["requests"], row["dense_failed"], row["sparse_failed"]) == (REQUESTS - 2, 1, 1)
    assert row["ttft_dense"] == 410.0  # of the second to the fifth request
    errors = {(error["server"], error["request"], error["error"]) for error in bench.report["errors"]}
    assert errors == {("dense", 5, "Bad Request"), ("sparse", 0, "ClientError: gone")}
    assert "2 requests failed" in capsys.readouterr().out


def test_a_point_with_failures_is_measured_again_and_the_others_are_not(bench: Bench) -> None:
    bench.answer(failing={bench.sparse.url: {"0": "Bad Request"}})
    assert bench.run(*ONE_POINT, "--warmups", "0") == INCOMPLETE
    bench.answer()
    assert bench.run(*ONE_POINT, "--warmups", "0") == 0
    assert [each["base_url"] for each in bench.asked] == [bench.dense.url, bench.sparse.url, bench.sparse.url]
    assert bench.report["errors"] == []


def test_measurements_of_another_load_are_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(*ONE_POINT) == 0
    assert bench.run(*ONE_POINT, "--seed", "1") == FAILED
    assert "was made with other settings" in capsys.readouterr().err


def test_answers_of_different_length_are_noted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.run(*ONE_POINT) == 0
    assert ["named by their URLs" in note for note in bench.report["notes"]] == [True]
    file = bench.out / "sparse.jsonl"
    file.write_text(file.read_text().replace('"output_tokens":5', '"output_tokens":4', 1))
    assert bench.run(*ONE_POINT) == 0
    assert "answers of different length" in bench.report["notes"][1]


def test_a_key_in_a_header_is_written_down_nowhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--bench", "--header Authorization=a-key"]
    monkeypatch.setattr("sys.argv", ["minference-vllm", "bench", *more])
    assert bench.run(*ONE_POINT, *more) == 0
    assert {each["header"] for each in bench.asked} == {"Authorization=a-key"}
    assert "--header '***'" in bench.report["settings"]["options"]
    assert all("a-key" not in file.read_text() for file in bench.out.iterdir())


def test_a_data_set_that_changed_between_the_servers_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run(*ONE_POINT) == 0
    file = bench.out / "sparse.jsonl"
    origin, measured = file.read_text().splitlines()
    fewer = json.loads(measured)
    del fewer["requests"][0]
    file.write_text(f"{origin}\n{json.dumps(fewer)}\n")
    assert bench.run(*ONE_POINT) == FAILED
    assert f"sent {REQUESTS} requests at 1 in flight, the sparse one {REQUESTS - 1}" in capsys.readouterr().err


# Proof that the sparse path ran


@pytest.mark.parametrize("path", ["dense", None], ids=["all tokens dense", "no metrics"])
def test_a_sparse_server_that_runs_dense_is_no_success(path: str | None, bench: Bench) -> None:
    with fake_server(path, lambda request: "text") as bench.sparse:
        bench.answer()
        assert bench.run(*ONE_POINT) == NOT_SPARSE
    assert "No prompt token ran sparse" in bench.report["warnings"][0]
    assert '<p class="warning">No prompt token ran sparse' in (bench.out / "report.html").read_text()


def test_a_dense_server_that_runs_sparse_is_refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server("sparse", lambda request: "text") as bench.dense:
        bench.answer()
        assert bench.run(*ONE_POINT) == FAILED
    assert "is to be the dense server" in capsys.readouterr().err


# When it does not work


def test_a_server_that_gives_errors_only_ends_the_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.answer(failing={bench.dense.url: {str(number): "Not Found" for number in range(REQUESTS)}})
    assert bench.run(*ONE_POINT, "--warmups", "0") == FAILED
    assert f"gave errors only, to {REQUESTS} requests. The first: Not Found" in capsys.readouterr().err


def test_the_sender_is_a_process_of_this_environments_vllm(bench: Bench, processes: None) -> None:
    assert bench.run(*ONE_POINT, "--warmups", "0") == 0
    assert [each["base_url"] for each in bench.asked] == [bench.dense.url, bench.sparse.url]


def test_a_sender_that_fails_shows_its_words(bench: Bench, processes: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(*ONE_POINT, "--bench", "--no-such-option 1") == FAILED
    assert "unrecognized arguments: --no-such-option 1" in capsys.readouterr().err


def test_a_sender_that_hangs_is_stopped(
    bench: Bench, processes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "VLLM", ("sh", "-c", "sleep 600"))
    assert bench.run(*ONE_POINT, "--timeout", "1") == FAILED
    assert "had not ended after 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    "result",
    ["", "{}", '{"completed": 1}', json.dumps({"duration": 1, "completed": 1} | {
        name: [] for name in ("input_lens", "output_lens", "ttfts", "itls", "latencies", "errors")
    })],
    ids=["empty", "nothing in it", "incomplete", "fewer answers than it says"],
)  # fmt: skip
def test_a_result_that_is_none_is_refused(result: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(ConfigError, match=r"result\.json"):
        read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--bench", "--seed 4"], "--bench may not hold --seed"),
        (["--bench=--max_concurrency=4"], "--bench may not hold --max-concurrency"),
        (["--bench", "'"], "is read as a shell does"),
        (["--bench", "--dataset-name sonnet", "--text", "novel.txt"], "both name prompts"),
        (["--serve", "--max-model-len 9"], "Give --dense and --sparse, or --serve"),
        (["--text", "no such file"], "--text no such file cannot be read"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    more: list[str], said: str, bench: Bench, pandas: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert bench.run(*ONE_POINT, *more) == FAILED
    assert said in capsys.readouterr().err
    assert not list(bench.out.glob("*.jsonl"))


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "x", "1e9"])
def test_a_rate_is_a_number(rate: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run("--rate", rate)


def test_without_vllm_nothing_is_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "has_vllm", lambda: False)
    assert bench.run(*ONE_POINT) == FAILED
    assert "vLLM is not installed beside this command" in capsys.readouterr().err


def test_what_vllm_reads_prompts_with_is_asked_for_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sender, "need", lambda module, extra: need(f"{module}_is_missing", extra))
    assert bench.run(*ONE_POINT, "--text", "novel.txt") == FAILED
    assert "pip install 'minference-vllm[bench]'" in capsys.readouterr().err
