# SPDX-License-Identifier: Apache-2.0
"""Files of an evaluation that are none, were changed, or belong to someone else; and secrets that stay secret."""

import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli.status import FAILED
from minference_vllm.errors import ConfigError
from minference_vllm.evals import material, prepare, private, serve, work
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.journal import Batch, Journal, Origin
from minference_vllm.evals.material import load_prompts, load_text
from minference_vllm.evals.sample import Kind, Reply, Sample
from minference_vllm.evals.work import Work
from tests.unit.evals.fake_openai import FakeServer
from tests.unit.evals.runs import run

ORIGIN = Origin(samples="0", model="m", server="http://one")
CANARY = "canary-7f3a"


# Replies


@pytest.mark.parametrize("content", ["my notes", "\0", "[1]\n[2"])
def test_a_file_of_someone_else_s_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    (tmp_path / "dense.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"dense.jsonl"):
        Journal(tmp_path / "dense.jsonl", ORIGIN)
    assert (tmp_path / "dense.jsonl").read_text() == content


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_file_whose_first_line_was_cut_off_is_begun_anew(length: int, tmp_path: Path) -> None:
    whole = f"{ORIGIN.model_dump_json()}\n"
    (tmp_path / "dense.jsonl").write_text(whole[:length])
    Journal(tmp_path / "dense.jsonl", ORIGIN)
    assert (tmp_path / "dense.jsonl").read_text() == whole


def test_a_file_that_another_run_writes_is_refused_and_kept(tmp_path: Path) -> None:
    first = Journal(tmp_path / "dense.jsonl", ORIGIN)
    with pytest.raises(ConfigError, match=r"dense\.jsonl is in use by another run"):
        Journal(tmp_path / "dense.jsonl", ORIGIN)
    del first
    Journal(tmp_path / "dense.jsonl", ORIGIN)
    assert (tmp_path / "dense.jsonl").read_text() == f"{ORIGIN.model_dump_json()}\n"


def batch(**changes: Any) -> dict[str, Any]:
    plain = Batch(task="needle", tokens=64, vllm="0", replies=(Reply(id="needle/64/0"),), work=Work())
    return {**plain.model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    "line",
    [
        batch(tokens=True),
        batch(tokens="64"),
        batch(tokens=10**400),
        batch(work=Work(kept_pairs=10**400).model_dump()),
        batch(replies=[{"id": "a", "logprobs": [1000.0]}]),
        batch(replies=[{"id": "a", "steps": [{"token": "b", "likeliest": {"b": 1000.0}}]}]),
        batch(replies=[{"id": "a", "text": CANARY, "logprobs": CANARY}]),
    ],
)
def test_a_reply_that_no_server_gives_is_refused_by_its_line_alone(line: Any, tmp_path: Path) -> None:
    file = tmp_path / "dense.jsonl"
    file.write_text(f"{ORIGIN.model_dump_json()}\n{json.dumps(line)}\n")
    with pytest.raises(
        ConfigError, match=r"dense.jsonl, line 2 is no line of a file of replies of this version: "
    ) as caught:
        Journal(file, ORIGIN)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("kind", [Kind.FIRST_CHOICE, Kind.LOGPROB])
def test_a_reply_that_is_none_to_its_sample_is_refused_before_anything_is_asked(kind: Kind, tmp_path: Path) -> None:
    file = tmp_path / "dense.jsonl"
    file.write_text(f"{ORIGIN.model_dump_json()}\n{json.dumps(batch())}\n")
    sample = Sample(task="needle", tokens=64, index=0, kind=kind, prompt=(1, 2), max_tokens=1, answers=(1,))
    with pytest.raises(ConfigError, match="a reply to needle/64/0 that is none to it"):
        Journal(file, ORIGIN).refuse_misfits([sample])


def test_a_probability_above_1_is_the_server_s_error(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    sparse.step_logprob = 1000.0  # whose exponential no float holds
    run(dense, sparse, prepared, tmp_path)
    errors = json.loads((tmp_path / "report.json").read_text())["errors"]
    assert {error["id"].partition("/")[0] for error in errors} == {"agreement"}


# Samples


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "first_choice", "answers": [0]}, "answers: they must be positions in the prompt"),
        ({"kind": "first_choice", "answers": [3]}, "answers: they must be positions in the prompt"),
        ({"kind": "first_choice", "answers": []}, "answers: they must be positions in the prompt"),
        ({"kind": "logprob", "prompt": "a text"}, "two or more token ids"),
        ({"kind": "all", "references": []}, "references: an answer in text needs some"),
        ({"tokens": "64"}, "tokens: "),
        ({"prompt": CANARY, "tokens": True}, "tokens: "),
    ],
)
def test_a_sample_that_cannot_be_scored_is_refused_when_it_is_read(
    changes: dict[str, Any], said: str, prepared: Path, tmp_path: Path
) -> None:
    header, *_ = (prepared / prepare.FILE).read_text().splitlines()
    plain = {"task": "a", "tokens": 64, "index": 0, "kind": "agreement", "prompt": [1, 2, 3], "max_tokens": 1}
    (tmp_path / prepare.FILE).write_text(f"{header}\n{json.dumps(plain | changes)}\n")
    with pytest.raises(ConfigError, match=f"line 2.*{said}") as caught:
        prepare.load(tmp_path)
    assert CANARY not in str(caught.value)


def test_a_seed_that_nothing_can_be_drawn_with_is_refused_when_it_is_read(prepared: Path, tmp_path: Path) -> None:
    text = (prepared / prepare.FILE).read_text()
    (tmp_path / prepare.FILE).write_text(text.replace('"seed":0', '"seed":-1', 1))
    with pytest.raises(ConfigError, match=r"line 1 is no line of a file of samples .*: settings.seed: "):
        prepare.load(tmp_path)


# The user's text and prompts


def test_a_prompt_may_hold_what_some_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    given = [{"prompt": "one\u2028two\x85three"}, {"prompt": "four"}]
    lines = "\r\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in given)
    (tmp_path / "prompts.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert list(load_prompts(tmp_path / "prompts.jsonl")) == given


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"prompt": "a", "n": ' + "9" * 5000 + "}",
        '{"prompt": "a", "messages": 5}',
        '{"messages": []}',
        '{"messages": ["hello"]}',
        '{"messages": [{"role": 7, "content": "a"}]}',
        '{"prompt": "\\ud800"}',
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"prompts.jsonl, line 2 "):
        load_prompts(tmp_path / "prompts.jsonl")


def test_a_packed_text_is_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "text.xz").write_bytes(lzma.compress(b"a" * 1000) + lzma.compress(b"a"))
    with pytest.raises(ConfigError, match="unpacked larger than 1,000 bytes"):
        load_text(tmp_path / "text.xz")


@pytest.mark.parametrize("load", [load_text, load_prompts])
def test_a_file_that_changed_since_its_fingerprint_is_refused(load: Callable[..., object], tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text('{"prompt": "a"}')
    told = material.fingerprint(file)
    assert load(file, told)
    file.write_text('{"prompt": "b"}')
    with pytest.raises(ConfigError, match="has changed while it was read"):
        load(file, told)
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(file, told)


# Servers


@pytest.mark.parametrize("page", ["<html>", "minference_kept_pairs_total NaN", "minference_kept_pairs_total +Inf"])
def test_a_page_that_is_none_of_metrics_is_the_server_s_fault(page: str) -> None:
    with pytest.raises(ServerError, match="/metrics cannot be read"):
        work.parse(page)


def test_options_that_no_shell_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        serve.arguments("m", "--max-model-len '4096", is_dense=False)


def test_a_url_that_is_none_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers = ["--dense", "http://[::1", "--sparse", "http://[::1]:1", "--model", "m"]
    assert cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(tmp_path)]) == FAILED
    assert "http://[::1 is no URL" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["127.0.0.1:1", f"user:{CANARY}@127.0.0.1:1", f"ftp://user:{CANARY}@127.0.0.1:1"])
def test_a_url_of_no_server_is_refused_without_its_password(
    given: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = ["--dense", given, "--sparse", "http://127.0.0.1:2", "--model", "m"]
    assert cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(tmp_path)]) == FAILED
    said = capsys.readouterr().err
    assert "127.0.0.1:1 is no URL of a server: write http://HOST:PORT." in said
    assert CANARY not in said


def test_an_output_folder_that_is_none_is_refused(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(dense, sparse, prepared, tmp_path / "file") == FAILED
    assert "cannot be " in capsys.readouterr().err


# Secrets


@pytest.mark.parametrize(
    "given",
    [
        ["serve", "m", "--api-key", CANARY, CANARY, "--port", "1"],
        ["serve", "m", f"--api-key={CANARY}", "--port", "1"],
        ["eval", "--serve", f"--hf-token {CANARY} --port 1"],
        ["eval", "--serve", f"--max-model-len 1 --api-key={CANARY}"],
        ["eval", "--dense", f"http://me:{CANARY}@host:8000/v1"],
        ["eval", "--serve", f"--api-key '{CANARY} unclosed"],
    ],
)
def test_keys_and_passwords_are_withheld(given: list[str]) -> None:
    shown = private.without_secrets(given)
    assert CANARY not in " ".join(shown)
    assert "***" in " ".join(shown)
    assert shown[:2] == given[:2]


def test_what_has_no_secret_is_shown_as_it_is() -> None:
    given = ["eval", "--serve", "--max-model-len 131072 -tp 2", "--dense", "http://host:8000", "--text", "a@b"]
    assert private.without_secrets(given) == given


def test_no_secret_is_in_what_an_evaluation_says_or_writes(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}-key")
    sparse.path = None  # without the plugin's metrics, which is worth a warning
    urls = [server.url.replace("http://", f"http://me:{CANARY}-password@") for server in (dense, sparse)]
    command = ["eval", "--dense", urls[0], "--sparse", urls[1], "--model", "a-model", "--prepared", str(prepared)]
    monkeypatch.setattr("sys.argv", ["minference-vllm", *command])
    with caplog.at_level(logging.DEBUG, logger="vllm"):
        cli.main([*command, "--out", str(tmp_path)])
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("vllm")]
    assert any("has no metrics of minference_vllm" in line for line in logged)
    said = capsys.readouterr()
    written = [file.read_text() for file in tmp_path.iterdir()]
    assert len(written) == 4
    assert not [text for text in (said.out, said.err, *logged, *written) if CANARY in text]
