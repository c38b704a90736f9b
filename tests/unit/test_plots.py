# SPDX-License-Identifier: Apache-2.0
"""The pictures of a choice: what is counted is what is attended to, and every cell lies where its keys are."""

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_vllm import offline
from minference_vllm.attention import prefill
from minference_vllm.chunk import Chunk
from minference_vllm.cli import main, plot
from minference_vllm.errors import ConfigError
from minference_vllm.evals.material import Tokenizer
from minference_vllm.layers import SparseLayer
from minference_vllm.methods import Block, Method
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.patterns import Pattern, Resolved
from minference_vllm.patterns.file import parse_pattern
from minference_vllm.plots import capture as capture_module
from minference_vllm.plots import prompt
from minference_vllm.plots.capture import Capture, halves, own_pairs
from minference_vllm.plots.prompt import PromptChoice, by_position, described, spread, tokens_of, wanted
from minference_vllm.recall import LayerRecall
from tests.kernels.cases import Case, make_chunk, make_state
from tests.unit.evals.tokenizer import save_tokenizer
from tests.unit.test_patterns import content

CPU = torch.device("cpu")
CASE = Case("plotted", num_rows=500, context_len=0, num_qo_heads=4, num_kv_heads=2, vertical_size=8, slash_size=20)
METHODS: dict[str, Method] = {
    "vertical_slash": CASE.vertical_slash(Kernel.REFERENCE),
    "block": Block(BlockSettings(share=0.3, sink_tokens=16, local_tokens=16, long_from=0), Kernel.REFERENCE),
}


def read(method: Method, chunks: list[int], mapped: list[int] = [0]) -> tuple[Capture, Any]:  # noqa: B006
    """A prompt read in chunks of so many rows; what was seen, and the state whose kept pairs were counted."""
    whole = make_chunk(CASE, CPU)
    capture, state, start = Capture(CASE.num_rows, mapped), make_state(CASE, method, CPU), 0
    for rows in chunks:
        q, out = whole.q[start : start + rows], whole.out[start : start + rows]
        prefill(Chunk(q, out, whole.kv, start, whole.scale), method, state, capture)
        start += rows
    assert start == CASE.num_rows
    return capture, state


CHUNKS = pytest.mark.parametrize("chunks", [[500], [200, 300], [1, 63, 129, 307]], ids=str)


@CHUNKS
@pytest.mark.parametrize("name", METHODS)
def test_every_pair_that_is_attended_to_is_counted_once(name: str, chunks: list[int]) -> None:
    capture, state = read(METHODS[name], chunks)
    layer = capture.layers[0]
    causal = CASE.num_rows * (CASE.num_rows + 1) // 2
    assert layer.kept_pairs.sum() == state.attend.kept_pairs.item()
    assert layer.causal_pairs == causal == layer.causal.sum()
    assert layer.kept is not None
    assert torch.equal(layer.kept.sum((1, 2)).double(), layer.kept_pairs)
    assert torch.allclose(layer.density, layer.kept_pairs / causal)
    assert (layer.density < 1).all()


@CHUNKS
def test_what_is_always_kept_lies_where_it_is(chunks: list[int]) -> None:
    capture, _ = read(METHODS["block"], chunks)
    shares = capture.layers[0].shares(0)
    assert capture.size == (4, 32)
    assert (shares[:, 0] == 1).all(), "the first 16 keys"
    for row in range(4):
        assert (shares[row, 8 * row : 8 * row + 7] == 1).all(), "the tile's own keys"
        assert shares[row, 8 * row + 8 :].isnan().all(), "keys after the row"


def test_one_tile_is_looked_at_of_several_where_a_prompt_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "MAX_CELLS", 2)
    capture, _ = read(METHODS["block"], [500])
    layer = capture.layers[0]
    assert (capture.tile_step, capture.cell, capture.size) == (2, (256, 256), (2, 2))
    # Tiles 0 and 2, of 128 rows each.
    assert layer.causal_pairs == 128 * 129 // 2 + 128 * 256 + 128 * 129 // 2


def test_a_map_is_kept_of_the_layers_asked_for_alone() -> None:
    capture, _ = read(METHODS["block"], [500], mapped=[3])
    assert capture.layers[0].kept is None
    assert capture.layers[0].density.isfinite().all()


def test_halves_and_their_own_pairs_cover_a_chunk() -> None:
    chunk = make_chunk(replace(CASE, num_rows=211, context_len=307), CPU)
    found = list(halves(chunk))
    assert [row for *_, rows in found for row in rows] == [*range(307, 518)]
    assert {(tile, half) for tile, half, _ in found} == {(2, 0), (2, 1), (3, 0), (3, 1), (4, 0)}
    for tile, _, rows in found:
        pairs = [[max(0, min(16, row - (tile * 128 + 16 * group) + 1)) for group in range(8)] for row in rows]
        assert own_pairs(tile, rows).tolist() == torch.tensor(pairs).sum(0).tolist()


def test_layers_are_spread_evenly() -> None:
    assert spread(30) == [0, 6, 12, 17, 23, 29]
    assert spread(3) == [0, 1, 2]
    assert spread(1) == [0]


def test_a_layer_that_the_model_has_not_is_refused() -> None:
    assert wanted(None, 3) == [0, 1, 2]
    assert wanted([2, 0], 3) == [2, 0]
    for layer in (3, -1):
        with pytest.raises(ConfigError, match=f"Layer {layer} is none of the plugin's: they are 0 to 2"):
            wanted([0, layer], 3)


def test_recall_is_taken_by_the_layers_positions() -> None:
    # The first layer of this model holds a state, the second attends, the third is kept dense.
    sparse, dense = SparseLayer(), SparseLayer()
    sparse.position, sparse.number, dense.position = 0, 1, 1
    measured = LayerRecall(1, (1.0,), (1.0,))
    assert by_position([sparse, dense], {1: measured}) == {0: measured}


def test_a_method_is_described_in_one_line() -> None:
    pattern = Pattern(parse_pattern(json.dumps(content()), "x"), "some.json", 0)
    assert described(Resolved(BlockSettings())).startswith("block: rows_per_half 32, share 0.835, ")
    assert described(Resolved(pattern.file.settings, pattern)) == "vertical_slash, sizes of some.json"


# Figures


@pytest.fixture
def choice() -> PromptChoice:
    capture, _ = read(METHODS["vertical_slash"], [500])
    return PromptChoice("vertical_slash", 3, capture, {0: LayerRecall(2, (2.0, 1.8, 1.0, 0.5), (0.9,) * 4)})


def test_figures_and_numbers_are_written(choice: PromptChoice, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plot.draw(choice, "a model", tmp_path)
    names = ["model.png", "model.svg", "layer-00.png", "layer-00.svg", "choice.json"]
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size > 0 for path in paths)
    assert (tmp_path / "layer-00.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "layer-00.svg").read_text()
    density = choice.capture.layers[0].density
    assert all(f"head {head}   density {density[head]:.2f}   recall" in svg for head in range(4))
    numbers = json.loads((tmp_path / "choice.json").read_text())
    assert numbers["recall"] == {"0": [1.0, 0.9, 0.5, 0.25]}
    assert numbers["density"]["0"] == density.tolist()
    assert (numbers["model"], numbers["method"], numbers["tokens"]) == ("a model", "vertical_slash", 500)


def test_a_figure_is_the_same_when_made_anew(choice: PromptChoice, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from minference_vllm.plots.figures import draw_model, save

    first, second = (
        [path.read_bytes() for path in save(draw_model(*choice.tables(), "a title"), tmp_path, "model")] for _ in "12"
    )
    assert first == second


def test_layers_that_ran_dense_have_no_numbers(choice: PromptChoice) -> None:
    density, recall = choice.tables()
    assert density.shape == recall.shape == (3, 4)
    assert density[1:].isnan().all()
    assert recall[1:].isnan().all()
    assert torch.equal(density[0].double(), choice.capture.layers[0].density.float().double())


# The command


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prompt", "/no/such"], "--prompt /no/such cannot be read: No such file"),
        (["--engine", "{"], "--engine is not valid JSON"),
        (["--engine", "[1]"], "--engine must be a JSON object, and is list"),
        (["--method", "{" * 100_000], "--method is not valid JSON"),
        (["--out", "/dev/null/x"], "/dev/null/x/choice.json cannot be written: /dev/null is no folder"),
    ],
)
def test_what_does_not_fit_is_said_before_an_engine_starts(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompt.txt").write_text("A text.")
    plain = ["--prompt", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "out")]
    assert main(["plot", "a model", *plain, *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_figure_that_cannot_be_written_is_named(choice: PromptChoice, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "model.png").mkdir()
    with pytest.raises(ConfigError, match=r"model\.png cannot be written: Is a directory"):
        plot.draw(choice, "a model", tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with a configuration of three layers, and a tokenizer."""
    pytest.importorskip("vllm")
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "model")


def test_a_layer_beyond_the_model_s_is_refused_before_an_engine_starts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "prompt.txt").write_text("A text.")
    given = ["--prompt", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "out"), "--layers", "0", "3"]
    assert main(["plot", model, *given]) == 2
    assert "Layer 3 is none of the plugin's: they are 0 to 2." in capsys.readouterr().err


def test_settings_are_refused_before_an_engine_starts(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    started: list[Any] = []
    monkeypatch.setattr(offline.engines, "offline_engine", lambda *given: started.append(given))
    (tmp_path / "prompt.txt").write_text("A text.")
    given = ["--prompt", str(tmp_path / "prompt.txt"), "--out", str(tmp_path / "out"), "--method", "blocks"]
    assert main(["plot", model, *given]) == 2
    assert "minference.method='blocks' is not allowed" in capsys.readouterr().err
    assert started == []


def test_the_first_tokens_of_a_novel_are_taken_without_reading_it_all(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer, read = AutoTokenizer.from_pretrained(model), []
    encode = tokenizer.encode

    def noting(text: str) -> list[int]:
        read.append(len(text))
        return encode(text)

    tokenizer.encode = noting
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    text = "A novel goes on and on. " * 200_000
    assert tokens_of(model, text, 1000) == encode(text[:1000])
    assert sum(read) < 100_000
    assert len(tokens_of(model, "A text.", 1000)) == 7


@pytest.mark.parametrize("packed", [True, False], ids=["xz", "plain"])
def test_a_prompt_may_be_a_novel_compressed_or_not(
    packed: bool, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: PromptChoice
) -> None:
    pytest.importorskip("matplotlib")
    novel = ("größer und " * 400_000).encode()
    path = tmp_path / ("novel.txt.xz" if packed else "novel.txt")
    path.write_bytes(lzma.compress(novel, preset=0) if packed else novel)
    asked = []

    def read(model: str, tokens: list[int], *_: Any) -> PromptChoice:
        asked.append(Tokenizer(model).decode(tokens))
        return choice

    monkeypatch.setattr(prompt, "read_prompt", read)
    monkeypatch.setattr(plot, "draw", lambda *_: [])
    given = ["--prompt", str(path), "--out", str(tmp_path / "out"), "--tokens", "60"]
    assert main(["plot", model, *given]) == 0
    assert asked[0].startswith("größer und größer und ")


def test_without_matplotlib_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "a model", "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "pip install 'minference-vllm[plot]'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"The tokenizer of .* cannot be read"):
        tokens_of(str(tmp_path), "A text.", None)
