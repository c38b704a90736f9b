# SPDX-License-Identifier: Apache-2.0
"""Pattern files: what one may hold, the sentence that refuses everything else, and which of them is a model's."""

import json
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.config import MAX_TOKENS
from minference_vllm.errors import ConfigError
from minference_vllm.files import MAX_FILE_BYTES
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.patterns import Geometry, read_pattern, shipped
from minference_vllm.patterns.file import parse_pattern
from minference_vllm.patterns.importer import write
from minference_vllm.patterns.shared import PatternShares

GEOMETRY = {"num_layers": 2, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
HEADS = [[1000, 6096], [30, 800], ["a_shape", 100, 800], [3500, 100]]
LONGEST_MESSAGE = 2000  # characters


def content(**changes: Any) -> dict[str, Any]:
    """A file of two layers, one of them dense."""
    plain = {
        "version": 1,
        "models": ["org/Model-1M"],
        "geometry": GEOMETRY,
        "provenance": {"source": "these tests"},
        "layers": [HEADS, "dense"],
    }
    return {**plain, **changes}


def refusal(text: str | bytes) -> str:
    """The message that refuses a file; on one line, and short whatever it holds."""
    with pytest.raises(ConfigError) as caught:
        parse_pattern(text, "some.json")
    message = str(caught.value)
    assert message.startswith("The pattern file some.json cannot be used. ")
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < LONGEST_MESSAGE
    return message


def test_a_file_says_what_each_head_keeps() -> None:
    file = parse_pattern(json.dumps(content()), "some.json")
    assert [file.budget(head) for head in file.layers[0]] == [
        (1000, 6096, 30, 100),
        (30, 800, 30, 100),
        (100, 800, 100, 800),  # all of it forced
        (3500, 100, 30, 100),
    ]
    assert file.dense_layers == {1}
    assert file.settings == VerticalSlashSettings(vertical_size=3500, slash_size=6096)


def test_what_all_heads_share_are_settings_of_the_method() -> None:
    method = {"name": "vertical_slash", "probe_rows": "spread", "sink_tokens": 0, "local_tokens": 7}
    file = parse_pattern(json.dumps(content(method=method)), "some.json")
    assert file.method.probe_rows == "spread"
    assert file.budget((50, 60)) == (50, 60, 0, 7)


def test_a_file_may_keep_every_layer_dense() -> None:
    file = parse_pattern(json.dumps(content(layers=["dense", "dense"])), "some.json")
    assert file.dense_layers == {0, 1}
    assert file.settings == VerticalSlashSettings(vertical_size=1, slash_size=1)


def test_a_file_may_give_shares_of_block() -> None:
    method = {"name": "block", "rows_per_half": 16, "local_tokens": 64}
    file = parse_pattern(json.dumps(content(method=method, layers=[[0.5, 1, 0.84, 0.05], "dense"])), "some.json")
    assert [file.budget(head) for head in file.layers[0]] == [0.5, 1.0, 0.84, 0.05]
    assert file.settings == BlockSettings(share=1.0, rows_per_half=16, local_tokens=64)
    assert parse_pattern(write(file), "written.json") == file


def test_settings_of_block_are_those_of_its_files_but_the_share() -> None:
    known = {name: field.default for name, field in BlockSettings.model_fields.items() if name not in ("name", "share")}
    assert {name: field.default for name, field in PatternShares.model_fields.items() if name != "name"} == known


def with_head(head: Any) -> dict[str, Any]:
    return content(layers=[[*HEADS[:3], head], "dense"])


@pytest.mark.parametrize(
    "head",
    [
        *([0, 100], [100, 0], [100, MAX_TOKENS + 1], [10**30, 1], [1.0, 2], [True, 2], ["30", 800], [30], [1, 2, 3]),
        *(
            ["a_shape", 100],
            ["a_shape", 0, 1],
            ["stream_llm", 1, 2],
            ["vertical_slash", 1, 2],
            [],
            {},
            "dense",
            None,
            7,
        ),
    ],
    ids=str,
)
def test_a_head_is_refused_by_its_place_and_what_is_allowed(head: Any) -> None:
    message = refusal(json.dumps(with_head(head)))
    assert "layers.0.3=" in message
    assert f'a head is [columns, diagonals] or ["a_shape", first keys, nearest keys], each 1 to {MAX_TOKENS}' in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version=2: input should be 1"),
        ({"layers": [HEADS]}, "geometry.num_layers is 2, and layers are 1"),
        ({"layers": [HEADS, HEADS[:3]]}, "geometry.num_qo_heads is 4, and layer 1 has 3"),
        ({"layers": [HEADS, "sparse"]}, "layers.1='sparse': input should be 'dense'"),
        ({"layers": [HEADS, None]}, "layers.1=None: "),
        ({"layers": []}, "layers=[]: "),
        ({"geometry": {**GEOMETRY, "num_kv_heads": 3}}, "4 query heads are no multiple of 3 KV heads"),
        ({"geometry": {**GEOMETRY, "num_qo_heads": 10**30}}, f"geometry.num_qo_heads={10**30}: input should be less"),
        ({"models": ["x" * 1000]}, "models.0='xxx"),
        ({"models": ["x"] * 1000}, "models="),
        ({"provenance": {}}, "provenance.source is missing"),
        ({"method": {"name": "block"}}, "heads of block are shares, and layer 0 has another"),
        ({"layers": [[0.5, 0.5, 0.5, 0.5], "dense"]}, "heads of vertical_slash are sizes, and layer 0 has another"),
        ({"method": {"name": "tri_shape"}}, "it takes the name vertical_slash or the name block"),
        ({"method": {"share": 0.9}}, "method.share is no field"),
        ({"heads": 7}, "heads is no field of a pattern file"),
    ],
)
def test_a_fault_is_named_with_what_was_given(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(json.dumps(content(**changes)))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("[" * 200_000, id="brackets"),
        pytest.param('{"layers": ' * 50_000, id="objects"),
        pytest.param('{"version": ' + "9" * 5000 + "}", id="a long number"),
        pytest.param("[1, 2]", id="no object"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(json.dumps(content(layers=[[[0, 0]] * 1000] * 50)), id="many faults"),
        pytest.param(json.dumps({"x" * 10**5: 1}), id="a long key"),
        pytest.param(json.dumps(content(layers="x" * 10**5)), id="a long value"),
    ],
)
def test_whatever_a_file_holds_the_answer_is_a_sentence(text: str | bytes) -> None:
    refusal(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The pattern file .*none.json cannot be read: No such file"):
        read_pattern(tmp_path / "none.json")
    (tmp_path / "large.json").write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"large.json is larger than 1,048,576 bytes"):
        read_pattern(tmp_path / "large.json")


def test_geometries_differ_with_both_numbers() -> None:
    file, model = Geometry(**GEOMETRY), Geometry(**{**GEOMETRY, "num_layers": 28, "head_dim": 128})
    assert file.differences(model) == ["num_layers 2, not 28", "head_dim 64, not 128"]
    assert file.differences(file) == []


# The files that come with the package


def test_every_shipped_file_can_be_read_and_says_where_it_is_from() -> None:
    files = {name: parse_pattern(text, name) for name, text in shipped.shipped().items()}
    assert len(files) == 14
    assert sum(len(file.models) for file in files.values()) == 18
    for name, file in files.items():
        assert file.provenance.source == "minference==0.1.6.0", name
        assert file.provenance.licence.startswith("MIT"), name
        assert file.provenance.sha256, name


def test_no_model_has_two_files() -> None:
    names = [shipped.plain(model) for text in shipped.shipped().values() for model in json.loads(text)["models"]]
    # Two of MInference's names for one model differ by the organisation's habit alone, in one file.
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name",
    [
        "gradientai/Llama-3-8B-Instruct-262k",
        "gradientai/llama-3-8b-instruct-262K",
        "Llama-3-8B-Instruct-262k",
        "another/Llama-3-8B-Instruct-262k",
        "/models/Llama-3-8B-Instruct-262k/",
        "/cache/hub/models--gradientai--Llama-3-8B-Instruct-262k/snapshots/0123abcd",
        "/cache/hub/models--gradientai--Llama-3-8B-Instruct-262k/snapshots/0123abcd/",
    ],
)
def test_a_model_is_found_by_its_name(name: str) -> None:
    found = shipped.find(["an alias", name])
    assert found is not None
    assert found[0] == "llama-3-8b-instruct-262k.json"
    assert found[1].geometry == Geometry(num_layers=32, num_qo_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize("name", ["Llama-3-8B-Instruct", "Llama-3-8B-Instruct-262k-GGUF", "262k", "", "/", "a/b/c"])
def test_no_other_model_is_found(name: str) -> None:
    assert shipped.find([name]) is None
