# SPDX-License-Identifier: Apache-2.0
"""Records the tile lists that `block` chooses on a real prompt, in some layers of the real engine.

    python -m benchmarks.record --model /tmp/qwen --text austen.txt.xz --tokens 28672 --out lists.npz
    python -m benchmarks.block --lists lists.npz --out benchmarks/results/h100-block-lists.json

The last tiles of the prompt are recorded, whatever the chunks in which it was read.
"""

import argparse
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks import SPARSE, argument_parser, load_engine, resolved, results, runtime
from benchmarks.fidelity import GATE, TINY_GATE, engine_options
from benchmarks.lists import Lists
from benchmarks.made_up import TINY, write_model
from benchmarks.processes import EngineProcess, serve_requests
from benchmarks.ttft import make_tokens
from minference_vllm.attention import LayerState, choose
from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE, SparseIndex, TileIndex
from minference_vllm.methods import Method

TINY_LAYERS = 3


class Recorder:
    """A chooser that lets the method choose, and keeps a copy of what it chose on the host.

    Args:
        positions: of the layers to record, see LayerState.
    """

    def __init__(self, positions: Collection[int]) -> None:
        self._tiles: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {at: {} for at in positions}
        self._heads: dict[str, int] = {}

    def __call__(self, method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        """See attention.Chooser."""
        index = choose(method, chunk, layer)
        if layer.position in self._tiles:
            if not isinstance(index, TileIndex) or chunk.context_len % TILE:
                raise ValueError(f"after {chunk.context_len} tokens {type(method).__name__} lists no whole tiles")
            self._heads = {"num_kv_heads": chunk.kv.num_kv_heads, "head_dim": chunk.head_dim}
            groups, counts = index.groups.cpu(), index.counts.cpu()
            of_layer = self._tiles[layer.position]
            of_layer |= {chunk.first_tile + at: (groups[:, at], counts[:, at]) for at in range(chunk.num_tiles)}
        return index

    def lists(self, rows: int, about: dict[str, Any]) -> Lists:
        """What was chosen for the last rows.

        Raises:
            SystemExit: not all of them ran sparse.
        """
        last = max(max(of_layer, default=-1) for of_layer in self._tiles.values())
        wanted = range(last + 1 - -(-rows // TILE), last + 1)
        if any(not of_layer.keys() >= {*wanted} for of_layer in self._tiles.values()):
            raise SystemExit(f"not all of the last {rows} rows ran sparse in the layers {sorted(self._tiles)}")
        tiles = [[of_layer[tile] for tile in wanted] for of_layer in self._tiles.values()]
        longest = max(groups.shape[-1] for of_layer in tiles for groups, _ in of_layer)
        groups = torch.stack([torch.stack([_padded(part, longest) for part, _ in of], 1) for of in tiles])
        counts = torch.stack([torch.stack([part for _, part in of_layer], 1) for of_layer in tiles])
        return Lists(groups, counts, wanted.start, {**about, **self._heads, "layers": list(self._tiles)})


def _padded(groups: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(groups, (0, length - groups.shape[-1]))


def spread(num_layers: int, count: int) -> list[int]:
    """Positions of `count` layers, evenly spread, without the first and the last."""
    return sorted({(2 * number + 1) * num_layers // (2 * count) for number in range(count)})


def start_engine(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """An engine, as a function that has it read the prompt, and writes the lists."""
    from vllm import SamplingParams

    llm = load_engine(kind, spec)
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        num_layers = llm.llm_engine.vllm_config.model_config.hf_text_config.num_hidden_layers
        recorder = runtime().chooser = Recorder(spread(num_layers, request["layers"]))
        llm.generate([{"prompt_token_ids": make_tokens(spec, request["tokens"])}], one, use_tqdm=False)
        lists = recorder.lists(request["rows"], request["about"])
        lists.save(Path(request["out"]))
        return {name: lists.about[name] for name in ("layers", "num_kv_heads", "head_dim")}

    return answer


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "a toy model with made-up weights, the gate at 512 tokens", compares=False)
    parser.add_argument("--model", help="a model directory")
    parser.add_argument("--text", help="a file, as for benchmarks.fidelity, that the prompt is cut from")
    parser.add_argument("--tokens", type=int, default=28672, help="prompt length")
    parser.add_argument("--rows", type=int, default=8192, help="number of last rows whose lists are recorded")
    parser.add_argument("--layers", type=int, default=4, help="number of layers, spread over the model")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    options = parser.parse_args()
    if not (options.tiny or (options.model and options.text)):
        parser.error("--model and --text say what to record")
    return options


def make_spec(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    if not options.model:
        write_model(directory, TINY, TINY_LAYERS, options.tokens + TILE)
    engine = engine_options(options.model or directory, options.tokens, options.chunk)
    if not options.model:
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": options.tokens + TILE}
    minference = {**(TINY_GATE if options.tiny else GATE), "method": {"name": "block"}}
    more = {"text": options.text, "seed": options.seed, "vocab_size": TINY["vocab_size"]}
    return {"engine": engine, "minference": minference, **more}


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    run = results.describe_run(options.tiny)
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        spec = make_spec(options, directory)
        about = {
            **run,
            "model": Path(options.model).name if options.model else "made up",
            "text": Path(options.text).name if options.text else "random tokens",
            "tokens": options.tokens,
            "chunk": options.chunk,
            "minference": resolved(spec["minference"]),
        }
        request = {name: getattr(options, name) for name in ("tokens", "rows", "layers")}
        with EngineProcess("benchmarks.record", SPARSE, spec) as engine:
            found = engine.ask({**request, "about": about, "out": str(options.out)})
    print(f"{options.out}: {found}, {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
