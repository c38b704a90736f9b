# SPDX-License-Identifier: Apache-2.0
"""Compares ways to weigh groups in a real model, before any kernel exists, at the density that `block` reaches.

    minference-vllm eval --prepare /tmp/samples --tokenizer MODEL --tasks ruler:vt ruler:fwe --tokens 8192 --samples 4
    python -m benchmarks.choosing --model /tmp/qwen --prepared /tmp/samples --texts austen.txt.xz \\
        --ways plain squared:250 power:1.5 --out benchmarks/results/h200-choosing.json

All layers are sparse (benchmarks/simulated.py), there is no guard, and nothing is rounded to codes or FP8. For each
prompt and way the bound is searched with which as many pairs are kept as by `block`, to within 1%. Then the KL
divergence of the next token's distribution from dense attention's is compared with that of `block`: at the tokens of
the answers, and at every third of the 1,400 tokens before the question. What a way gains here may be less in service,
where the guard acts on it; benchmarks.fidelity and `minference-vllm eval` measure that once there are kernels.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div

from benchmarks import argument_parser, facts, results
from benchmarks.fidelity import load_text
from benchmarks.simulated import DEFAULT, SETTINGS, Simulation, Way, default_bound
from minference_vllm.evals import prepare

TEXT, TEXT_END, TEXT_STEP = 1500, 100, 3
CLOSE = 0.01  # two densities whose logarithms differ by less are equal
TRIES = 5
SLOPE = 0.15  # by which a density falls, at first, as its bound rises, both in logarithms
ANSWER_TOKENS = 48
NAME = "simulated"


class Prompt(NamedTuple):
    """Attributes:
    label: its kind.
    tokens: of question and answer.
    answers: positions of the answers' tokens.
    """

    label: str
    tokens: list[int]
    answers: list[int]


def read_samples(folder: Path, tokenizer: Any) -> Iterator[Prompt]:
    """Samples of an evaluation that are answered in text, each followed by its references."""
    for sample in prepare.load(folder).samples:
        if sample.references and isinstance(sample.prompt, str):
            prompt = tokenizer.encode(sample.prompt, add_special_tokens=sample.add_special_tokens)
            answer = tokenizer.encode(" " + ", ".join(sample.references), add_special_tokens=False)[:ANSWER_TOKENS]
            answers = range(len(prompt), len(prompt) + len(answer))
            yield Prompt(f"{sample.task}/{sample.tokens}", [*prompt, *answer], list(answers))


def read_facts(texts: list[str], tokens: list[int], prompts: int, tokenizer: Any) -> Iterator[Prompt]:
    """Texts with twenty facts, which are asked for at the end."""
    for name in texts:
        text = load_text(name)
        for length in tokens:
            for seed in range(prompts):
                prompt = facts.make_prompt(tokenizer, text, length, seed)
                yield Prompt(f"{Path(name).name}/{length}", prompt.tokens, prompt.answers)


Logs = tuple[torch.Tensor, torch.Tensor]
"""Logarithms of the next token's probabilities, at positions of the text and at those of the answers."""


class Model:
    """A model of transformers whose attention is simulated.

    Args:
        model: made with NAME as `attn_implementation`, after `register`.
    """

    def __init__(self, model: Any, simulation: Simulation) -> None:
        self.model, self.simulation = model, simulation

    @torch.inference_mode()
    def read(self, prompt: Prompt, way: Way | None, bound: float = 0.0) -> Logs:
        """What the model predicts; without a way it attends to all keys."""
        self.simulation.begin(way, bound)
        tokens = torch.tensor([prompt.tokens], device=self.model.device)
        states = self.model.model(tokens).last_hidden_state[0]
        first = min(prompt.answers)
        text = torch.arange(max(0, first - TEXT), max(1, first - TEXT_END), TEXT_STEP, device=tokens.device)
        answers = torch.tensor(prompt.answers, device=tokens.device) - 1
        text_logs, answer_logs = (self.model.lm_head(states[at]).float().log_softmax(-1) for at in (text, answers))
        return text_logs, answer_logs

    def compare(self, prompt: Prompt, dense: Logs, way: Way, bound: float) -> dict[str, Any]:
        """Fields of a row."""
        text, answers = self.read(prompt, way, bound)
        return {
            "density": round(self.simulation.density, 5),
            "bound": bound,
            "text_kl": kl_div(text, dense[0], reduction="batchmean", log_target=True).item(),
            "answers_kl": kl_div(answers, dense[1], reduction="batchmean", log_target=True).item(),
        }

    def at_density(self, prompt: Prompt, dense: Logs, way: Way, density: float) -> dict[str, Any]:
        """The row of a way with the bound that leads to a density; of the closest one found, after TRIES."""
        found: list[dict[str, Any]] = []
        bound = default_bound(SETTINGS.share)
        for _ in range(TRIES):
            found.append(self.compare(prompt, dense, way, bound))
            found.sort(key=lambda row: abs(math.log(row["density"] / density)))
            off = math.log(found[0]["density"] / density)
            if abs(off) < CLOSE:
                break
            bound = found[0]["bound"] * math.exp(off / slope(found))
        return found[0]


def register() -> Simulation:
    """Let transformers know attention of the name NAME."""
    from transformers import AttentionInterface

    simulation = Simulation()
    AttentionInterface.register(NAME, simulation)
    return simulation


def load(name: str) -> Model:
    from transformers import AutoModelForCausalLM

    simulation, device = register(), "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation=NAME)
    return Model(model.to(device).eval(), simulation)


def slope(rows: list[dict[str, Any]]) -> float:
    """How steeply density falls with the bound, both in logarithms, between the two best rows."""
    if len(rows) < 2 or rows[0]["bound"] == rows[1]["bound"]:
        return SLOPE
    fall = math.log(rows[0]["density"] / rows[1]["density"]) / math.log(rows[1]["bound"] / rows[0]["bound"])
    return min(max(fall, SLOPE / 8), 1.0)


def measure(model: Model, prompt: Prompt, ways: list[Way]) -> Iterator[dict[str, Any]]:
    """A row for the default way, then one for each other."""
    dense = model.read(prompt, None)
    default = model.compare(prompt, dense, Way.parse(DEFAULT), default_bound(SETTINGS.share))
    about = {"prompt": prompt.label, "tokens": len(prompt.tokens)}
    yield about | {"way": DEFAULT} | default
    for way in ways:
        yield about | {"way": way.name} | model.at_density(prompt, dense, way, default["density"])


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each way, the geometric means of its divergences over the default's."""
    default = [row for row in rows if row["way"] == DEFAULT]
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        ratios = {
            f"{name}_ratio": statistics.geometric_mean(
                row[name] / base[name] for row, base in zip(own, default, strict=True)
            )
            for name in ("density", "text_kl", "answers_kl")
        }
        found.append({"way": way, "prompts": len(own)} | {name: round(ratio, 3) for name, ratio in ratios.items()})
    return found


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "takes a machine without a GPU")
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--prepared", type=Path, help="samples that `minference-vllm eval --prepare` made")
    parser.add_argument("--texts", nargs="+", default=[], help="files, for prompts with twenty facts")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384], help="lengths of prompts of the texts")
    parser.add_argument("--prompts", type=int, default=2, help="prompts a text and length")
    parser.add_argument("--ways", type=Way.parse, nargs="+", default=[], help="plain, squared:FACTOR, power:EXPONENT")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results.describe_run(options.tiny)
    from transformers import AutoTokenizer

    model, tokenizer = load(options.model), AutoTokenizer.from_pretrained(options.model)
    prompts = list(read_samples(options.prepared, tokenizer)) if options.prepared else []
    prompts += read_facts(options.texts, options.tokens, options.prompts, tokenizer)
    settings = {"simulated": "all layers, no guard, no kernels: benchmarks/simulated.py", "share": SETTINGS.share}
    # Each way once, and the default way not again.
    ways = list({way.name: way for way in options.ways if way.name != DEFAULT}.values())
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        rows += measure(model, prompt, ways)
        results.write(options.out, rows, options.tiny, settings=settings, ratios=summary(rows))
    print(results.table(summary(rows)))


if __name__ == "__main__":
    main()
