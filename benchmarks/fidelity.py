# SPDX-License-Identifier: Apache-2.0
"""What sparse prefill does to a model's next tokens: the real engine, dense against each method on the same prompts.

    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz pydoc.txt.xz stdlib \
        --out benchmarks/results/h100-fidelity.json

The last tokens of each prompt are scored over the whole vocabulary, from the hidden states after the last layer.

A method is given by its name alone, by the sizes of vertical_slash, or by a name and settings in JSON:

    --methods block 1000:6096 'vertical_slash:{"vertical_size": 1000, "slash_size": 1000, "probe_rows": "spread"}' \
        'vertical_slash:{"share": 0.95}' 'vertical_slash:{"share": 0.95, "probe_rows": "spread"}'

A control keeps every key, so that it differs by rounding only: 'block:{"local_tokens": 1048576}'.

Prompts longer than the model was trained for, its positions stretched by YaRN to 131,072 tokens:

    --tokens 28672 61440 126976 --context 131072 --chunks 16384

In parts by length, chunk or method, on several cards, and then merged. All parts need the same texts, which are pooled:

    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz stdlib --tokens 28672 --out a.json
    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz stdlib --tokens 4096 8192 --out b.json
    python -m benchmarks.fidelity --merge a.json b.json --out benchmarks/results/h100-fidelity.json
"""

import argparse
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    SparseWork,
    argument_parser,
    context,
    facts,
    haystack,
    load_engine,
    parse_method,
    resolved,
    results,
    rows,
    sparse_work,
)
from benchmarks.processes import EngineProcess, is_first_rank, on_gpus, serve_requests
from minference_vllm.evals import material
from minference_vllm.search.prompts import load_library

SCORED_TEXT = 2048  # tokens at the text's end, in addition to all questions and answers
ROWS_AT_ONCE = 512
GATE = {"min_seq_len": 3072, "min_chunk": 512}
TINY_GATE = {"min_seq_len": 512, "min_chunk": 64}
STDLIB = "stdlib"  # given in place of a file, it stands for Python's library as installed here
ROW = ("tokens", "text", "method", "chunk")  # what tells one row from another
MEMORY = 0.4  # of a GPU, for each of two engines
SPARE = 2048  # tokens by which max_model_len exceeds the prompts' lengths


def load_text(name: str) -> str:
    """A plain text, one compressed by xz, or the sources of Python's library, in alphabetical order."""
    if name == STDLIB:
        return load_library()
    return material.load_text(Path(name), option="the text")


def start_engine(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine, as a function that scores a prompt with it."""
    return scorer(kind, load_engine(kind, spec))


def scorer(kind: str, llm: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that scores a prompt with an engine: {"tokens", "scored", "text_end", "answers", "file"}.

    The dense engine leaves its hidden states in the file; a sparse one compares its own with them.
    """
    import torch
    from vllm import SamplingParams

    model = llm.apply_model(lambda model: model)[0]
    one = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    steps: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        steps.append((output[0] if isinstance(output, tuple) else output).clone())

    model.model.norm.register_forward_hook(keep)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        steps.clear()
        before = sparse_work() if kind == SPARSE else None
        llm.generate([{"prompt_token_ids": request["tokens"]}], one, use_tqdm=False)
        states = torch.cat(steps)
        if len(states) != len(request["tokens"]):
            raise SystemExit(f"{len(states)} hidden states of a prompt of {len(request['tokens'])} tokens")
        # The state before a token predicts it.
        states = states[request["scored"] - 1 : -1]
        if before is None:
            if is_first_rank():
                torch.save(states.cpu(), request["file"])
            return {}
        work = sparse_work().since(before)
        dense = torch.load(request["file"]).to(states.device)
        return {**compare(model, dense, states, request), **described(work)}

    return answer


def described(work: SparseWork) -> dict[str, Any]:
    """What ran sparse for a request."""
    return {name: getattr(work, name) for name in ("density", "recall", "redone", "sparse_tokens")}


def compare(model: Any, dense: Any, sparse: Any, request: dict[str, Any]) -> dict[str, float]:
    """Losses and agreement over the scored tokens.

    Args:
        model: vLLM's, which turns hidden states into logits.
        dense, sparse: [scored tokens, hidden size] hidden states.
        request: the prompt.
    """
    import torch

    scored = request["scored"]
    wanted = torch.tensor(request["tokens"][scored:], device=dense.device)
    is_answer = torch.zeros(len(wanted), dtype=torch.bool, device=dense.device)
    is_answer[torch.tensor(request["answers"], device=dense.device) - scored] = True
    is_text = torch.arange(len(wanted), device=dense.device) < request["text_end"] - scored
    divergences, agreements = [], []
    losses: dict[str, list[Any]] = {DENSE: [], SPARSE: []}
    hits: dict[str, list[Any]] = {DENSE: [], SPARSE: []}
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logs = {
            kind: model.compute_logits(states[rows]).float().log_softmax(-1)
            for kind, states in ((DENSE, dense), (SPARSE, sparse))
        }
        divergences.append((logs[DENSE].exp() * (logs[DENSE] - logs[SPARSE])).sum(-1))
        agreements.append(logs[DENSE].argmax(-1) == logs[SPARSE].argmax(-1))
        for kind, log in logs.items():
            losses[kind].append(-log.gather(1, wanted[rows, None])[:, 0])
            hits[kind].append(log.argmax(-1) == wanted[rows])
    found = {"kl": torch.cat(divergences).mean().item(), "agreement": torch.cat(agreements).float().mean().item()}
    for kind in (DENSE, SPARSE):
        loss = torch.cat(losses[kind])
        found[f"answers_{kind}"] = torch.cat(hits[kind])[is_answer].float().mean().item()
        found[f"answer_loss_{kind}"] = loss[is_answer].mean().item()
        found[f"text_loss_{kind}"] = loss[is_text].mean().item()
    return found


def make_requests(options: argparse.Namespace, directory: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The requests, by length and text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    requests: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name in options.texts:
        text = load_text(name)
        for tokens in options.tokens:
            for number in range(options.prompts):
                prompt = facts.make_prompt(tokenizer, text, tokens, options.seed + number)
                file = Path(directory, f"{Path(name).name}-{tokens}-{number}.pt")
                requests.setdefault((tokens, Path(name).name), []).append(make_request(prompt, file))
    return requests


def make_request(prompt: facts.FactPrompt, file: Path) -> dict[str, Any]:
    """What both engines are asked; the dense one leaves its hidden states in the file."""
    return {**prompt._asdict(), "scored": max(1, prompt.text_end - SCORED_TEXT), "file": str(file)}


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "short prompts, the gate at 512 tokens")
    parser.add_argument("--model", help="a model directory; its final norm must be `model.norm`")
    parser.add_argument("--texts", nargs="+", help=f"files, or {STDLIB!r} for Python's own library")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 28672], help="prompt lengths")
    context.add_argument(parser)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a text and length")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of both engines, for example fp8")
    parser.add_argument("--gpus", type=int, default=1, help="tensor-parallel GPUs of each engine")
    parser.add_argument("--memory", type=float, default=MEMORY, help="part of a GPU's memory that each engine takes")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 2048], help="max_num_batched_tokens")
    parser.add_argument(
        "--methods", nargs="+", default=["block", "1000:6096", "1000:1000", "200:400"],
        help='`block`, `vertical_slash:{"share": 0.95}`, or the sizes of vertical_slash',
    )  # fmt: skip
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, but merge the rows of these files")
    options = parser.parse_args()
    if not options.merge and not (options.model and options.texts):
        parser.error("--model and --texts say what to measure, --merge what to put together")
    return options


def make_spec(options: argparse.Namespace, chunk: int, method: dict[str, Any]) -> dict[str, Any]:
    gate = TINY_GATE if options.tiny else GATE
    return {
        "engine": {
            **engine_options(options.model, max(options.tokens), chunk, options.memory),
            **context.stretched(options.model, options.context),
            "kv_cache_dtype": options.kv_cache_dtype,
            **on_gpus(options.gpus),
        },
        "dense_backend": options.dense_backend,
        "minference": {**gate, "method": method},
    }


def engine_options(model: str, tokens: int, chunk: int, memory: float = MEMORY) -> dict[str, Any]:
    """Options of an engine that reads one prompt of about `tokens` tokens at a time, in chunks.

    Args:
        memory: the part of a GPU's memory that the engine takes.
    """
    return {
        "model": model, "dtype": "bfloat16", "max_model_len": tokens + SPARE,
        "max_num_batched_tokens": chunk, "max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": memory, "disable_log_stats": True,
    }  # fmt: skip


def describe(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result file. Each engine's come under "sparse" when it is started."""
    texts = {Path(name).name: sha256(load_text(name).encode()).hexdigest() for name in options.texts}
    return {
        "prompts": "twenty facts hidden in a text, all asked for at its end, the answers given (benchmarks.facts); one "
        f"request at a time. Scored are the text's last {SCORED_TEXT} tokens, the questions and the answers, over the "
        "whole vocabulary. answers: share of the answers' tokens that are the model's first choice",
        "model": haystack.identify_model(options.model),
        "seed": options.seed,
        "texts_sha256": texts,
        # Parts of one result may read prompts of other lengths.
        "engine": {
            **{key: value for key, value in spec["engine"].items() if key != "model"},
            "max_model_len": f"tokens of the longest prompts of a run + {SPARE}",
        },
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND},
        "recall, redone": "held-out rows' attention on the keys kept, mean over layers, heads and chunks, before the "
        "guard acted; share of those heads that the guard then had attend to all keys (density counts both)",
        "tokens": "that prompts are to have; they have some 440 fewer, all of which sparse_tokens counts",
        "answers_low, answers_high, answer_loss_low, answer_loss_high": rows.INTERVALS,
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, written after each engine."""
    results.describe_run(options.tiny)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fidelity-") as directory:
        requests = make_requests(options, directory)
        spec = make_spec(options, options.chunks[0], {})
        settings = describe(options, spec)
        with EngineProcess("benchmarks.fidelity", DENSE, spec, options.gpus) as dense:
            for request in [request for some in requests.values() for request in some]:
                dense.ask(request)
        for text in options.methods:
            for chunk in options.chunks:
                spec = make_spec(options, chunk, parse_method(text))
                settings["sparse"][f"{text}, chunks of {chunk}"] = resolved(spec["minference"])
                with EngineProcess("benchmarks.fidelity", SPARSE, spec, options.gpus) as sparse:
                    found = {key: [sparse.ask(request) for request in some] for key, some in requests.items()}
                measured += rows.make_rows({"method": text, "chunk": chunk}, found)
                print(results.table(measured), flush=True)
                # Written after each engine, so that a run that is cut off keeps what it has measured.
                results.write(options.out, measured, options.tiny, settings=settings)
    return measured


def merge(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of several result files, put together in one.

    Raises:
        SystemExit: the files do not fit, or are of different texts: rows of "all" texts would then be of some only.
    """
    merged = results.merge_or_exit(options.merge, ROW)
    texts = merged.run["settings"]["texts_sha256"]
    for part in options.merge:
        if lacking := texts.keys() - results.read(part)["settings"]["texts_sha256"].keys():
            raise SystemExit(f"{part} lacks texts that another part has: {', '.join(sorted(lacking))}")
    return merged.write(options.out)


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    print(results.table(merge(options) if options.merge else measure(options)))


if __name__ == "__main__":
    main()
