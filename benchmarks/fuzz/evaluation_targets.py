# SPDX-License-Identifier: Apache-2.0
"""What an evaluation reads: its samples, the replies of a run that was cut off, the user's text and prompts."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client.parser  # noqa: F401  it reads /proc while it is imported: not under the watch
from hypothesis import strategies as some

from benchmarks.fuzz.target import Target, Trial
from benchmarks.fuzz.values import SECRET, documents, mutated, spoilt, text_of, values
from minference_vllm.evals import prepare
from minference_vllm.evals.journal import Batch, Journal, Origin
from minference_vllm.evals.material import Material, load_prompts, load_text
from minference_vllm.evals.prepare import Header, Settings
from minference_vllm.evals.report import make_report
from minference_vllm.evals.sample import POSITIONS, Kind, Reply, Sample, Step
from minference_vllm.evals.tasks import agreement
from minference_vllm.evals.work import Work, parse

SETTINGS = Settings(
    tokenizer="none",
    tasks=("needle",),
    tokens=(64,),
    samples=1,
    seed=0,
    chat=False,
    text=None,
    prompts=None,
    ruler=None,
)
PLACE: dict[str, Any] = {"tokens": 64, "index": 0, "max_tokens": 4}
SAMPLES = (
    Sample(task="needle", kind=Kind.ALL, prompt=SECRET, references=("1",), depth=0.5, **PLACE),
    Sample(task="facts", kind=Kind.FIRST_CHOICE, prompt=tuple(range(40)), answers=(7, 9), **PLACE),
    Sample(task="position", kind=Kind.LOGPROB, prompt=tuple(range(40)), **PLACE),
    Sample(task="agreement", kind=Kind.AGREEMENT, prompt=SECRET, **PLACE),
)
REPLIES = (
    Reply(id="needle/64/0", prompt_tokens=40, text="1"),
    Reply(id="facts/64/0", prompt_tokens=40, first_choices=(True, False)),
    Reply(id="position/64/0", prompt_tokens=40, logprobs=(-1.0,) * POSITIONS),
    Reply(id="agreement/64/0", prompt_tokens=40, steps=(Step(token="a", likeliest={"a": -0.1, "b": -3.0}),)),
)
WORK = Work(
    sparse_tokens=40, kept_pairs=2, causal_pairs=8, measured_heads=2, recalls=1.8, most_recalls=2, exported=True
)
HEADER = Header(settings=SETTINGS, left_out={})
ORIGIN = Origin(samples="0" * 64, model="m", server="http://127.0.0.1:1")


def _batch(sample: Sample, reply: Reply) -> Batch:
    return Batch(task=sample.task, tokens=sample.tokens, vllm="0", replies=(reply,), work=WORK)


BATCHES = [_batch(sample, reply) for sample, reply in zip(SAMPLES, REPLIES, strict=True)]
SAMPLE_LINES = [line.model_dump(mode="json") for line in (HEADER, *SAMPLES)]
JOURNAL_LINES = [line.model_dump(mode="json") for line in (ORIGIN, *BATCHES)]
METRICS = """# TYPE minference_prefill_tokens counter
minference_prefill_tokens_total{path="sparse",reason="gate_open"} 40
minference_kept_pairs_total 2
minference_causal_pairs_total 8
minference_recall_heads_total{le="+Inf"} 2
minference_recall_sum_total 1.8
"""


@some.composite
def lines(draw: Callable[..., Any], good: list[Any]) -> bytes:
    """A file of JSON lines in which at most one line is wrong."""
    at = draw(some.integers(0, len(good) - 1))
    texts = [text_of(line).encode(errors="surrogatepass") for line in good]
    texts[at] = draw(documents(mutated(good[at])))
    order = draw(some.sampled_from((texts, texts[::-1], texts[1:], texts * 2)))
    return draw(spoilt(draw(some.sampled_from((b"\n", b"\n", b"\n", b"\r\n", b"\n\n"))).join([*order, b""])))


def samples(folder: Path, case: bytes) -> Trial:
    file = folder / prepare.FILE
    file.write_bytes(case)
    return lambda: prepare.load(folder), [file]


def replies(folder: Path, case: bytes) -> Trial:
    """A run that was cut off and goes on, up to its report."""
    file, whole = folder / "sparse.jsonl", folder / "dense.jsonl"
    file.write_bytes(case)
    whole.write_text("".join(f"{json.dumps(line)}\n" for line in JOURNAL_LINES))
    prepared = prepare.Prepared(HEADER, list(SAMPLES), ORIGIN.samples)

    def act() -> object:
        journals = Journal(whole, ORIGIN), Journal(file, ORIGIN)
        for journal in journals:
            journal.refuse_misfits(prepared.samples)
        if any(journal.left(prepared.samples) for journal in journals):
            return None  # the server would be asked for the other replies
        return json.dumps(make_report(prepared, *journals), allow_nan=False)

    return act, [file, whole]


class Letters:
    """A tokenizer with one token for each letter, and a chat template like those of models."""

    def ask(self, question: str) -> dict[str, Any]:
        return {"prompt": question, "add_special_tokens": True}

    def converse(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "prompt": "".join(f"<{each['role']}>{each.get('content')}" for each in messages),
            "add_special_tokens": False,
        }

    def length(self, asked: dict[str, Any]) -> int:
        return len(asked["prompt"].encode())


def prompts(folder: Path, case: bytes) -> Trial:
    file = folder / "prompts.jsonl"
    file.write_bytes(case)
    tokenizer: Any = Letters()

    def act() -> object:
        made = agreement.make_all(Material(tokenizer, "letters", prompts=load_prompts(file)))
        return [sample.model_dump_json() for sample in made]

    return act, [file]


def text(folder: Path, case: bytes) -> Trial:
    file = folder / ("text.xz" if case.startswith(PACKED[:6]) else "text.txt")
    file.write_bytes(case)
    return lambda: load_text(file), [file]


def metrics(_: Path, case: bytes) -> Trial:
    return lambda: parse(case.decode(errors="replace")), ()


OWN = [{"prompt": SECRET}, {"messages": [{"role": "user", "content": SECRET}]}]
PACKED = lzma.compress(SECRET.encode())
numbers = some.sampled_from(("NaN", "+Inf", "-Inf", "1e400", "9" * 400, "x", "")).map(
    lambda number: METRICS.replace(" 40", f" {number}").replace(" 2\n", f" {number}\n").encode()
)
TARGETS = (
    Target("samples of eval", lines(SAMPLE_LINES), samples),
    Target("replies of eval", lines(JOURNAL_LINES), replies),
    Target("prompts of eval", lines(OWN) | documents(values), prompts),
    Target("text of eval", some.sampled_from((PACKED, SECRET.encode())).flatmap(spoilt), text),
    Target("metrics that eval reads", numbers | spoilt(METRICS.encode()), metrics),
)
