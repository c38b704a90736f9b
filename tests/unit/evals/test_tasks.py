# SPDX-License-Identifier: Apache-2.0
"""The prompts of `minference-vllm eval`: they fit, hold what is asked for, and are the same for the same seed."""

import json
import lzma
import re
from pathlib import Path

import pytest

from minference_vllm.errors import ConfigError
from minference_vllm.evals import tasks
from minference_vllm.evals.material import Material, Tokenizer, load_prompts, load_text
from minference_vllm.evals.sample import Kind, Sample
from minference_vllm.evals.tasks import agreement
from tests.unit.evals.runs import SENTENCE

TOKENS = 6144  # of a byte each: twenty facts with their questions take 4,400


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
