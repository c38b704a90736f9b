# SPDX-License-Identifier: Apache-2.0
"""MInference's lists become pattern files; what has no equal is refused, or mapped and said so in the file."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.cli import main
from minference_vllm.errors import ConfigError
from minference_vllm.patterns import Geometry, read_pattern, shipped
from minference_vllm.patterns.file import PatternFile, Provenance, parse_pattern
from minference_vllm.patterns.importer import import_list, write
from minference_vllm.patterns.published import GEOMETRIES, published

GEOMETRY = Geometry(num_layers=2, num_qo_heads=3, num_kv_heads=1, head_dim=64)
SOURCE = Provenance(source="these tests")
SPARSE = ["vertical_and_slash", 500, 700, 0.97]


def layers(*heads: Any) -> list[dict[str, Any]]:
    """A list whose second layer holds these heads."""
    return [{str(head): SPARSE for head in range(3)}, {str(at): head for at, head in enumerate(heads)}]


def imported(content: Any) -> PatternFile:
    return import_list(json.dumps(content).encode(), "some.json", GEOMETRY, ["org/model"], SOURCE)


def refusal(content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        import_list(content if isinstance(content, bytes) else json.dumps(content).encode(), "x", GEOMETRY, [], SOURCE)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_heads_keep_what_their_list_says() -> None:
    content = layers(["vertical_and_slash", 30, 800, 1], SPARSE, ["vertical_and_slash", 22032, 24528, 0])
    file = imported(content)
    assert file.layers == (((500, 700),) * 3, ((30, 800), (500, 700), (22032, 24528)))
    assert (file.models, file.geometry) == (("org/model",), GEOMETRY)
    assert file.provenance.sha256 == sha256(json.dumps(content).encode()).hexdigest()
    assert file.provenance.notes == ()


@pytest.mark.parametrize(
    ("head", "kept", "note"),
    [
        (["stream_llm", 100, 800, 1], ("a_shape", 100, 800), "1 heads of stream_llm are a_shape"),
        (["block_sparse", 8, 0, 1], (1000, 6096), "1 heads of block_sparse keep 1000 / 6096, as MInference's search"),
        (["vertical_and_slash", 1, 2, 1], (30, 50), "1 heads keep at least 30 / 50, as in MInference"),
    ],
)
def test_what_is_otherwise_here_stands_in_the_notes(head: list[Any], kept: tuple[Any, ...], note: str) -> None:
    file = imported(layers(SPARSE, head, SPARSE))
    assert file.layers[1][1] == kept
    assert len(file.provenance.notes) == 1
    assert file.provenance.notes[0].startswith(note)


def test_heads_that_a_list_leaves_out_keep_what_minference_gives_them() -> None:
    file = imported(layers(SPARSE))
    assert file.layers[1] == ((500, 700), (1000, 6096), (1000, 6096))
    assert file.provenance.notes == ("2 heads that the list leaves out keep 1000 / 6096, as in MInference",)


@pytest.mark.parametrize("key", ["dual_chunk_attention_config", None])
def test_a_checkpoint_holds_its_list_alone_or_in_its_configuration(key: str | None) -> None:
    plain = layers(SPARSE, SPARSE, SPARSE)
    content = {key: {"chunk_size": 262144, "sparse_attention_config": plain}} if key else plain
    assert imported(content).layers == imported(plain).layers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (layers(SPARSE)[:1], "has 1 layers, and the model 2"),
        ([7, 7], "layer 0 is 7"),
        ([{"0": SPARSE, "3": SPARSE}, {}], "layer 0 has a head 3, and the model's heads are 0 to 2"),
        ([{"0": SPARSE, "1": SPARSE}] * 2, "x names heads up to 1, and the model's are 0 to 2: it is another model's"),
        ([{}, {}], "x names no heads, and the model's are 0 to 2: it is another model's"),
        (
            layers(["dilated", 1, 2, 3]),
            "layer 1, head 0 has the pattern 'dilated': only vertical_and_slash, stream_llm",
        ),
        (layers(["vertical_and_slash", "9", 9, 1]), "layer 1, head 0 is "),
        (layers(["vertical_and_slash", True, 9, 1]), "layer 1, head 0 is "),
        (layers(["vertical_and_slash", 9]), "it must be [pattern, columns, diagonals, score]"),
        (layers(["vertical_and_slash", 10**30, 9, 1]), "each 1 to 16777216"),
        (layers("x" * 10**6), "layer 1, head 0 is 'xxx"),
        ({"dual_chunk_attention_config": None}, "holds no list of patterns"),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, "holds no list of patterns"),
        (7, "holds no list of patterns"),
        (b"[" * 200_000, "nested too deeply"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_what_is_no_such_list_is_refused_with_what_was_given(content: Any, said: str) -> None:
    assert said in refusal(content)


def test_a_file_is_written_as_it_is_read_a_layer_a_line() -> None:
    file = imported(layers(SPARSE, ["stream_llm", 1, 2, 0], SPARSE))
    text = write(file)
    assert parse_pattern(text, "x") == file
    assert '    [[500,700],["a_shape",1,2],[500,700]]\n' in text


def test_shipped_files_are_as_the_importer_writes_them() -> None:
    for name, text in shipped.shipped().items():
        assert write(parse_pattern(text, name)) == text, name


# MInference's release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release with one list that is named, and one that is not."""
    folder = tmp_path / "minference" / "configs"
    folder.mkdir(parents=True)
    num_layers, num_heads, *_ = GEOMETRIES["Yi_9B_200k"]
    content = [{str(head): SPARSE for head in range(num_heads)}] * num_layers
    for version in ("", "_v2"):
        (folder / f"Yi_9B_200k_kv_out_v32_fit_o_best_pattern{version}.json").write_text(json.dumps(content))
    names = """
import os, nothing_that_exists
BASE_DIR = os.path.dirname(os.path.abspath(__file__))
MODEL2PATH = {
    "01-ai/Yi": os.path.join(BASE_DIR, "Yi_9B_200k_kv_out_v32_fit_o_best_pattern_v2.json"),
    "02-ai/Yi": os.path.join(
        BASE_DIR, "Yi_9B_200k_kv_out_v32_fit_o_best_pattern_v2.json"
    ),
}
"""
    (folder / "model2path.py").write_text(names)
    return tmp_path


def test_a_release_gives_a_file_for_each_list(release: Path) -> None:
    files = dict(published(release))
    assert {name: file.models for name, file in files.items()} == {
        "yi-9b-200k.json": (),
        "yi-9b-200k-v2.json": ("01-ai/Yi", "02-ai/Yi"),
    }
    assert all(file.geometry.num_kv_heads == 4 for file in files.values())


def test_what_is_no_release_is_refused(release: Path, tmp_path: Path) -> None:
    folder = release / "minference" / "configs"
    with pytest.raises(ConfigError, match=r"model2path.py cannot be read: No such file"):
        list(published(tmp_path / "elsewhere"))
    (folder / "another.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"another.json is no list of minference==0.1.6.0; those are GLM_4_9B"):
        list(published(release))
    (folder / "another.json").unlink()
    (folder / "Yi_9B_200k_kv_out_v32_fit_o_best_pattern_v2.json").unlink()
    with pytest.raises(ConfigError, match="lacks Yi_9B"):
        list(published(release))
    (folder / "model2path.py").write_text("MODEL2PATH = {}")
    with pytest.raises(ConfigError, match="names no models"):
        list(published(release))
    (folder / "model2path.py").write_text("(")
    with pytest.raises(ConfigError, match="cannot be read as Python"):
        list(published(release))


# The command


def test_the_command_makes_a_file_and_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "hidden_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **heads}))
    (tmp_path / "list.json").write_text(json.dumps(layers(SPARSE, ["stream_llm", 1, 2, 0], SPARSE)))
    out = tmp_path / "made" / "pattern.json"
    where = [str(tmp_path / "list.json"), "--model", str(tmp_path / "model"), "--out", str(out)]
    assert main(["patterns", "import", *where, "--name", "org/Name"]) == 0
    assert "1 heads of stream_llm are a_shape" in capsys.readouterr().out
    file = read_pattern(out)
    assert (file.models, file.geometry) == (("org/Name",), GEOMETRY)
    assert main(["patterns", "show", str(out)]) == 0
    assert "for org/Name\n  2 layers; heads: 5 of 500 / 700, 1 of a_shape / 1 / 2" in capsys.readouterr().out
    assert main(["patterns", "show", str(tmp_path / "list.json")]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_the_command_makes_a_release_s_files(release: Path, tmp_path: Path) -> None:
    assert main(["patterns", "published", str(release), "--out", str(tmp_path / "files")]) == 0
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"yi-9b-200k.json", "yi-9b-200k-v2.json"}
