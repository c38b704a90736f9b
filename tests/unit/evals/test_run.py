# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval` against servers that say what a test wants: what it asks, writes and takes for proof."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli import evaluate
from minference_vllm.cli.status import FAILED
from tests.unit.evals.fake_openai import DENSITY, MODEL, RECALL, VERSION, FakeServer, Refusal, fake_server
from tests.unit.evals.runs import SAMPLES, report, rows, run, samples

# What is written


def test_servers_that_say_the_same_lose_nothing(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = rows(tmp_path)
    assert {task: (row["dense_score"], row["sparse_score"]) for task, row in found.items()} == {
        "needle": (1, 1), "facts": (1, 1), "position": (-1, -1), "agreement": (1, 1),
    }  # fmt: skip
    assert {(row["loss"], row["low"], row["high"], row["density"], row["recall"]) for row in found.values()} == {
        (0, 0, 0, DENSITY, RECALL)
    }
    assert {row["samples"] for row in found.values()} == {SAMPLES}
    assert found["needle"]["redone"] == 0.5
    assert report(tmp_path)["settings"]["sparse"]["vllm"] == [VERSION]
    assert report(tmp_path)["warnings"] == []
    (note,) = report(tmp_path)["notes"]
    assert note.startswith("Both servers were named by their URLs, so nothing has checked that")
    assert note in (tmp_path / "report.html").read_text()
    said = capsys.readouterr().out
    assert note in said
    assert str(tmp_path / "report.html") in said


def test_what_sparse_loses_is_in_its_rows(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    knows = sparse.answer
    sparse.answer = lambda request: "no idea" if request["prompt"] in needles[:2] else knows(request)
    sparse.logprob, sparse.step_tokens, sparse.step_logprob = -2.0, (1, 2, 7, 4), -1.0
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = rows(tmp_path)
    needle = found["needle"]
    assert (needle["sparse_score"], needle["lost"], needle["gained"]) == (0.66667, 2, 0)
    assert needle["low"] < needle["loss"] < needle["high"]
    assert needle["p_value"] == 0.5  # two lost of two that changed
    assert (found["facts"]["sparse_score"], found["facts"]["loss"]) == (0, 1)
    assert (found["position"]["sparse_score"], found["position"]["loss"]) == (-2, 1)
    assert (found["agreement"]["sparse_score"], found["agreement"]["p_value"]) == (0.5, None)
    # Two tokens of probabilities e^-.5 and e^-1.5 in dense, of e^-1 and e^-1.5 in sparse; of the third both list one.
    rests = 1 - math.exp(-0.5) - math.exp(-1.5), 1 - math.exp(-1) - math.exp(-1.5)
    kl = math.exp(-0.5) * 0.5 + rests[0] * math.log(rests[0] / rests[1])
    assert found["agreement"]["kl"] == pytest.approx(2 / 3 * kl, abs=1e-5)
    assert {cell["sparse"] for cell in report(tmp_path)["depths"] if cell["task"] == "needle"} == {0.0, 1.0}
    assert {point["sparse"] - point["dense"] for point in report(tmp_path)["positions"]} == {1.0}


def test_both_servers_are_asked_the_same_greedily_and_reuse_no_pages(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0

    def asked(server: FakeServer) -> list[str]:
        return sorted(json.dumps({k: v for k, v in request.items() if k != "cache_salt"}) for request in server.asked)

    assert asked(dense) == asked(sparse)
    assert len(dense.asked) == len(samples(prepared))
    assert {request["temperature"] for request in dense.asked} == {0}
    assert len({request["cache_salt"] for request in dense.asked}) == len(dense.asked)


def test_one_request_at_a_time_gives_each_prompt_its_density(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    assert run(dense, sparse, prepared, tmp_path, "--concurrency", "1") == 0
    found = report(tmp_path)["prompts"]
    assert {(prompt["density"], prompt["recall"], prompt["batch"]) for prompt in found} == {(DENSITY, RECALL, 1)}


def test_prompts_that_are_answered_together_have_the_density_of_their_batch(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    knows = sparse.answer

    def refuse_one(request: dict[str, Any]) -> str:
        if request["prompt"] == needles[2]:
            raise Refusal("not now")
        return knows(request)

    sparse.answer = refuse_one
    run(dense, sparse, prepared, tmp_path)
    sparse.answer = knows
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = report(tmp_path)["prompts"]
    assert {(prompt["density"], prompt["recall"]) for prompt in found} == {(DENSITY, RECALL)}
    batches = [prompt["batch"] for prompt in found if prompt["task"] == "needle"]
    assert batches == [6, 6, 1, 6, 6, 6]  # the one that was asked again, alone
    assert {prompt["batch"] for prompt in found if prompt["task"] == "facts"} == {6}


def test_samples_that_lost_are_in_a_table_of_the_page(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    needles = [sample for sample in samples(prepared) if sample.task == "needle"]
    knows = sparse.answer
    sparse.answer = lambda request: "no idea" if request["prompt"] == needles[4].prompt else knows(request)
    assert run(dense, sparse, prepared, tmp_path) == 0
    table = (tmp_path / "report.html").read_text().partition("Samples that lost")[2].partition("</table>")[0]
    assert table.count("<tr>") == 2
    cells = re.findall("<td>(.*?)</td>", table)
    assert cells == ["needle", "64", "needle/64/4", "1.000", "0.000", "0.250", "0.900", "6"]


# Proof that the sparse path ran


@pytest.mark.parametrize("path", ["dense", None], ids=["all tokens dense", "no metrics"])
def test_a_sparse_server_that_runs_dense_is_no_success(
    path: str | None, dense: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(path, dense.answer) as sparse:
        assert run(dense, sparse, prepared, tmp_path) == evaluate.NOT_SPARSE
    assert "No prompt token ran sparse" in report(tmp_path)["warnings"][0]
    assert '<p class="warning">No prompt token ran sparse' in (tmp_path / "report.html").read_text()
    assert "WARNING: No prompt token ran sparse" in capsys.readouterr().out


@pytest.mark.parametrize("good_prompts", [0, 5])
def test_an_evaluation_ends_where_sparse_attention_has_failed(
    good_prompts: int, dense: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server("sparse", dense.answer) as sparse:
        sparse.prompts_until_broken = good_prompts
        assert run(dense, sparse, prepared, tmp_path) == FAILED
        # The batch that was being asked is asked to its end.
        assert good_prompts <= len(sparse.asked) < len(dense.asked)
    assert f"Sparse attention has failed on {sparse.url}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_dense_server_that_ran_sparse_is_refused(
    sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server("sparse", sparse.answer) as dense:
        dense.count({"prompt": "earlier"})
        assert run(dense, sparse, prepared, tmp_path) == FAILED
        assert "7 prompt tokens ran sparse on it" in capsys.readouterr().err
        assert len(dense.asked) == 1  # nothing of ours


def test_a_dense_server_that_begins_to_run_sparse_is_refused(
    sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server("sparse", sparse.answer) as dense:
        assert run(dense, sparse, prepared, tmp_path) == FAILED
    assert "is to be the dense server" in capsys.readouterr().err


def test_one_server_is_not_two(dense: FakeServer, prepared: Path, tmp_path: Path) -> None:
    servers = ["--dense", dense.url, "--sparse", f"{dense.url}/", "--model", MODEL]
    assert cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(tmp_path)]) == FAILED


def test_evaluation_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, minference_vllm.evals.run; sys.stdout.write(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "minference_vllm.evals.client" in loaded
    assert {"torch", "vllm", "transformers"}.isdisjoint(loaded)
