# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic: what they draw, hide, compare and write. None starts an engine."""

import argparse
import json
import random
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest

import benchmarks
from benchmarks import greedy, needles, processes, results, synthetic, ttft
from benchmarks.haystack import CITIES, Haystack, identify
from minference_vllm.config import MInferenceConfig
from minference_vllm.metrics.snapshot import Snapshot
from tests.conftest import import_or_skip

RUN = {"gpu": "a card", "driver": "1", "commit": "abc"}


class WordTokenizer:
    """A token a word."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        words = text.split() or ["<break>"]
        self.words += sorted(set(words) - set(self.words))
        return [self.words.index(word) for word in words]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt and not tokenize
        return f"<user> {messages[0]['content']} <assistant>"


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def haystack(tokenizer) -> Haystack:
    return Haystack(tokenizer, " ".join(f"word{at}{'.' if at % 10 == 0 else ''}" for at in range(2000)))


# results


def test_a_result_is_one_object_with_flat_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    rows = [{"tokens": 1, "density": None}, {"tokens": 2, "density": 0.5}]
    results.write(tmp_path / "new" / "a.json", rows, settings={"chunk": {"rows": 3}}, note="x")
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert written == {**RUN, "settings": {"chunk": {"rows": 3}}, "note": "x", "rows": rows}


@pytest.mark.parametrize(
    ("rows", "extra"),
    [([], {}), ([{"a": [1]}], {}), ([{"a": {}}], {}), ([{"a": float("nan")}], {}), ([{"a": 1}], {"gpu": "mine"})],
)
def test_a_malformed_result_is_not_written(tmp_path, monkeypatch, rows, extra):
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    with pytest.raises(ValueError):
        results.write(tmp_path / "a.json", rows, **extra)
    assert not (tmp_path / "a.json").exists()


def test_the_commit_says_when_the_tree_differs_from_it(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(results, "ROOT", tmp_path)
    git("init")
    (tmp_path / "code").write_text("1")
    git("add", "code")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert results._commit() == commit
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/a.json").write_text("{}")
    assert results._commit() == commit
    (tmp_path / "code").write_text("2")
    assert results._commit() == f"{commit}+dirty"


def test_without_history_the_commit_comes_from_the_environment_or_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(results.COMMIT_VARIABLE, "abc")
    assert results._commit() == "abc"
    monkeypatch.delenv(results.COMMIT_VARIABLE)
    with pytest.raises(results.ResultError, match=results.COMMIT_VARIABLE):
        results._commit()


def test_a_card_that_cannot_be_named_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(results.ResultError, match="nvidia-smi"):
        results._card()


def test_a_benchmark_that_needs_no_card_says_so_and_names_none(monkeypatch):
    import_or_skip("vllm")
    monkeypatch.setattr(results, "_card", lambda: pytest.fail("nobody asked for the card"))
    found = results.describe_run(needs_gpu=False)
    assert (found["gpu"], found["driver"]) == ("none needed", "none needed")


@pytest.mark.parametrize(
    ("argument", "left"),
    [
        ("/root/out/x.json", "x.json"),
        ("/tmp/qwen/", "qwen"),
        ("/tmp/my models/a, b.json", "'a, b.json'"),
        ("--out=/root/out/x.json", "--out=x.json"),
        ("out/x.json", "out/x.json"),
        ("../x.json", "../x.json"),
        ("1024/*/8", "'1024/*/8'"),
        ("http://127.0.0.1:8000/v1/models", "http://127.0.0.1:8000/v1/models"),
        ("--seed 1 --chat-template /root/t.jinja --x a/b", "'--seed 1 --chat-template t.jinja --x a/b'"),
        ("/root/a.txt /root/b.txt", "'a.txt b.txt'"),
        ('auto:{"pattern_file":"/root/p.json","x":1}', """'auto:{"pattern_file":"p.json","x":1}'"""),
        ("/", "/"),
    ],
)
def test_a_command_names_no_folder_of_the_machine(argument, left):
    command = results._command(["-m", "benchmarks.it", argument, "--tiny"])
    assert command == f"python -m benchmarks.it {left} --tiny"


# workers


def test_each_worker_has_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "import os\n"
        "from benchmarks.processes import serve_worker\n"
        "assert serve_worker(lambda kind, spec: {'kind': kind, 'n': spec['n'], 'pid': os.getpid()})\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    found = processes.measure("toy", {"n": 3})
    assert {kind: (of["kind"], of["n"]) for kind, of in found.items()} == {
        "dense": ("dense", 3),
        "sparse": ("sparse", 3),
    }
    assert found["dense"]["pid"] != found["sparse"]["pid"]


def test_a_worker_that_fails_stops_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    with pytest.raises(SystemExit, match="sparse engine of toy ended with status 3"):
        processes.measure("toy", {})


# the plugin in this process


def test_what_ran_sparse_is_read_from_the_engine_of_this_process(monkeypatch):
    import_or_skip("vllm")
    from minference_vllm import impl

    tokens = Counter({("sparse", "gate_open"): 70, ("dense", "short_chunk"): 5})
    counted = SimpleNamespace(snapshot=lambda: Snapshot(tokens, kept_pairs=2, causal_pairs=8))
    monkeypatch.setattr(impl, "_runtimes", {"only": SimpleNamespace(counters=counted)})
    work = benchmarks.sparse_work()
    assert (work.sparse_tokens, work.density) == (70, 0.25)
    assert work.since(work).density is None


def test_an_engine_in_which_sparse_attention_cannot_run_is_not_measured(monkeypatch):
    import_or_skip("vllm")
    monkeypatch.setattr("vllm.LLM", lambda **engine: object())
    monkeypatch.setattr("minference_vllm.plugin.register", lambda: None)
    monkeypatch.setattr(benchmarks, "runtime", lambda: SimpleNamespace(is_broken=True))
    spec = {"engine": {}, "minference": {}, "dense_backend": "FLASH_ATTN"}
    with pytest.raises(SystemExit, match="Sparse attention cannot run in this engine"):
        benchmarks.load_engine(benchmarks.SPARSE, spec)
    assert benchmarks.load_engine(benchmarks.DENSE, spec)


@pytest.mark.parametrize(
    "settings",
    [
        *(greedy.SETTINGS, needles.SETTINGS, needles.TINY_SETTINGS, ttft.TINY_SETTINGS),
        *(synthetic.LOWEST_FLOORS, {"method": "block"}),
    ],
)
def test_what_the_benchmarks_set_is_taken_and_recorded_in_full(settings):
    recorded = benchmarks.resolved(settings)
    assert recorded.keys() == MInferenceConfig.model_fields.keys()
    assert MInferenceConfig.model_validate(recorded) == MInferenceConfig.model_validate(settings)
    json.dumps(recorded)


# prompts


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth_in_a_prompt_of_the_asked_length(haystack, tokenizer, depth):
    needle = haystack.needle(500, depth, random.Random(0))
    words = tokenizer.decode(needle.prompt).split()
    assert len(words) == 500
    at = words.index(f"{needle.answer}.")
    assert abs(at / 500 - depth) < 0.08
    [city] = set(CITIES) & {word.strip(".?") for word in words}
    assert words[at - 2] == city
    assert words[0] == "<user>" and words[-1] == "<assistant>"


def test_a_needle_does_not_cut_a_sentence(haystack, tokenizer):
    words = tokenizer.decode(haystack.needle(500, 0.5, random.Random(0)).prompt).split()
    assert words[words.index("special") - 2].endswith(".")


def test_an_echo_repeats_a_passage_that_goes_on(haystack):
    prompt = haystack.echo(400, 16, random.Random(2))
    assert len(prompt) == 400
    cue = prompt[-16:]
    [at] = [at for at in range(384) if prompt[at : at + 16] == cue]
    assert at + 16 + greedy.ANSWER_TOKENS < 384


def test_text_and_model_are_told_by_what_they_hold(tmp_path):
    (tmp_path / "text").write_bytes(b"abc")
    options = argparse.Namespace(haystack=tmp_path / "text", model=str(tmp_path))
    told = {"haystack": "text", "haystack_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert identify(options) == told
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert identify(options) == told | {"model": {"hidden_size": 8}}


def test_a_text_that_is_too_short_is_refused(haystack):
    with pytest.raises(ValueError, match="2001 tokens of a text that has 2000"):
        haystack.passage(2001, random.Random(0))
    with pytest.raises(ValueError, match="80 tokens is too short to repeat 16"):
        haystack.echo(80, 16, random.Random(0))


# rows


def test_needle_rows_count_what_only_dense_attention_found():
    dense = {str(n): {"hits": [True, True, False]} for n in (1, 8)}
    sparse = {
        "1": {"hits": [True, False, True], "density": 0.5, "sparse_tokens": 9},
        "8": {"hits": [True, True, False], "density": 0.5, "sparse_tokens": 9},
    }
    one, eight = needles.make_rows(3, [1, 8], {"dense": dense, "sparse": sparse})
    assert (one["dense_hits"], one["sparse_hits"], one["lost"], one["same_hits"]) == (2, 2, 1, True)
    assert (eight["concurrency"], eight["lost"], eight["same_hits"]) == (8, 0, False)


def test_greedy_rows_compare_with_dense():
    tokens = list(range(greedy.ANSWER_TOKENS))
    dense = {"tokens": [tokens], "first_logprobs": [{"4": -0.1, "5": -3.0}]}
    sparse = {"tokens": [[*tokens[:30], 7, 7]], "first_logprobs": [{"4": -0.15, "9": -3.0}]}
    rows = greedy.make_rows([[1, 2, 3]], {"dense": dense, "sparse": sparse, "control": dense})
    assert (rows[0]["tokens"], rows[0]["equal_tokens"], rows[0]["logprob_diff"]) == (3, 30, 0.05)
    assert (rows[0]["control_equal_tokens"], rows[0]["control_logprob_diff"]) == (greedy.ANSWER_TOKENS, 0)
    summary = greedy.summarize(rows)
    assert (summary["all_equal"], summary["control_all_equal"], summary["max_logprob_diff"]) == (0, 1, 0.05)


def test_a_first_token_that_the_other_run_rules_out_is_an_error():
    with pytest.raises(ValueError, match="first token 4"):
        greedy.logprob_diff({"4": -0.1}, {"5": -0.1})
