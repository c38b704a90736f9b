# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm plot`: draws what each head of a model kept for a prompt."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minference_vllm.cli.arguments import count, count_to, json_object
from minference_vllm.cli.status import FAILED
from minference_vllm.evals.material import load_text
from minference_vllm.files import refuse_unwritable, write_file

if TYPE_CHECKING:
    from minference_vllm.plots.prompt import PromptChoice

MOST_LAYERS = 10_000
NUMBERS = "choice.json"

PLOT = f"""\
Starts vLLM in this process, has it read a text once, and draws which keys were chosen. The figure `model` shows density
and recall of each head, `layer-N` which keys each head of layer N kept for which rows. Figures are PNG and SVG, and
choice.json has the numbers. Density counts the keys that were chosen, not those that the guard had heads attend to
again; recall is measured before the guard acts. Layers are the plugin's, counted from 0. Settings are those of
MINFERENCE_CONFIG, but all of the text goes sparse.
Exit status: 0 drawn, {FAILED} not."""


def plot(options: argparse.Namespace) -> int:
    """Read, draw, write."""
    from minference_vllm.plots.figures import need_matplotlib

    need_matplotlib()
    text = load_text(options.prompt, option="--prompt")
    settings = {} if options.method is None else {"method": _method(options.method)}
    engine = {"max_num_batched_tokens": options.chunk, **json_object("--engine", options.engine)}
    refuse_unwritable(options.out / NUMBERS, str(options.out / NUMBERS))
    from minference_vllm.plots.prompt import read_prompt, refuse_layers, tokens_of

    if options.layers:
        refuse_layers(options.model, options.layers)
    tokens = tokens_of(options.model, text, options.tokens)
    choice = read_prompt(options.model, tokens, settings, engine, options.layers)
    for path in draw(choice, Path(options.model).name, options.out):
        print(path)
    for layer in set(options.layers or ()) - choice.capture.layers.keys():
        print(f"Layer {layer} runs dense: it has no figure.")
    return 0


def draw(choice: "PromptChoice", model: str, folder: Path) -> list[Path]:
    """Write all figures, and the numbers that the model's figure shows."""
    from minference_vllm.plots.figures import draw_heads, draw_model, save

    density, recall = choice.tables()
    of, by = f"{model}, {choice.capture.num_tokens:,} tokens", choice.method
    paths = save(draw_model(density, recall, f"{of}\n{by}"), folder, "model")
    for position, layer in sorted(choice.capture.layers.items()):
        if layer.kept is not None:
            title = f"{of}, layer {position}\n{by}"
            figure = draw_heads(choice.capture, position, choice.recall_of(position), title)
            paths += save(figure, folder, f"layer-{position:02d}")
    numbers = folder / NUMBERS
    write_file(numbers, json.dumps({"model": model, **choice.numbers()}, indent=1) + "\n", str(numbers))
    return [*paths, numbers]


def _method(text: str) -> Any:
    return json_object("--method", text) if text.lstrip().startswith("{") else text


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("plot", description=PLOT, help="draw what each head of a model keeps for a text")
    command.set_defaults(run=plot)
    command.add_argument("model", help="directory, or name on the hub")
    command.add_argument("--prompt", type=Path, required=True, help="a file of text, plain or .xz")
    command.add_argument("--out", type=Path, required=True, help="the folder of the figures")
    command.add_argument("--tokens", type=count, help="read at most this many tokens of the text")
    command.add_argument(
        "--layers", type=count_to(MOST_LAYERS, least=0), nargs="+", help="layers to draw; default: six, evenly spread"
    )
    command.add_argument("--method", help="a method's name, or a JSON object of its settings")
    command.add_argument("--chunk", type=count, default=8192, help="the engine's max_num_batched_tokens")
    command.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, a JSON object")
