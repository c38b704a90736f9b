# SPDX-License-Identifier: Apache-2.0
"""Time to first token, dense and sparse, on the shape of Llama-3.1-8B with made-up weights.

    python -m benchmarks.ttft --sizes 1000:6096 512:2048 --out benchmarks/results/h100-ttft.json

Time to first token is the wall time of `LLM.generate` for one prompt and one token, on an idle engine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    argument_parser,
    load_engine,
    measure,
    resolved,
    results,
    serve_worker,
    sparse_work,
    synthetic,
)

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}
TINY_SETTINGS = {"min_seq_len": 256, "min_chunk": 16}
LONG = 65536  # tokens; from here on two timed requests are enough, and time is short
SHORT = 32768
MOST_FOR_SHORT = 4


class Sizes(NamedTuple):
    """How many columns and diagonals each head keeps."""

    vertical: int
    slash: int

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        vertical, slash = text.split(":")
        return cls(int(vertical), int(slash))

    def __str__(self) -> str:
        return f"{self.vertical}:{self.slash}"


NATURAL = "natural: the plugin chooses by itself; made-up weights have no pattern, so the density means nothing."


def num_timed(tokens: int, repeats: int) -> int:
    """Timed requests: fewer of the long ones, which differ little, more of the short ones, which are cheap."""
    if tokens >= LONG:
        return min(repeats, 2)
    return repeats * min(max(SHORT // tokens, 1), MOST_FOR_SHORT)


def write_model(directory: str, shape: dict[str, int], layers: int, max_len: int) -> None:
    """A model without weights or tokenizer: its config.json."""
    model = dict(
        **shape, architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=layers, hidden_act="silu",
        max_position_embeddings=max_len, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Path(directory, "config.json").write_text(json.dumps(model))


def worker(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Times, sparse tokens and density by prompt length."""
    from vllm import SamplingParams

    if kind == SPARSE and not spec["natural"]:
        synthetic.install(spec["seed"])
    llm = load_engine(kind, spec)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def seconds(prompt: dict[str, Any]) -> float:
        start = time.perf_counter()
        llm.generate([prompt], one, use_tqdm=False)
        return time.perf_counter() - start

    random = np.random.default_rng(spec["seed"])
    prompts = {n: {"prompt_token_ids": random.integers(10, spec["vocab_size"], n).tolist()} for n in spec["tokens"]}
    found: dict[str, dict[str, Any]] = {}
    for n, prompt in prompts.items():
        before = sparse_work(llm) if kind == SPARSE else None
        print(f"    {n} tokens, warm-up: {seconds(prompt):.3f} s", flush=True)
        delta = sparse_work(llm).since(before) if before else None
        found[str(n)] = {"sparse_tokens": delta.sparse_tokens, "density": delta.density} if delta else {}
    for n, prompt in prompts.items():
        times = [seconds(prompt) for _ in range(num_timed(n, spec["repeats"]))]
        print(f"    {n} tokens: {' '.join(f'{t:.3f}' for t in times)} s", flush=True)
        found[str(n)]["seconds"] = [round(t, 4) for t in times]
    return found


def make_rows(
    sizes: Sizes, layers: int, dense_found: dict[str, Any], sparse_found: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each prompt length of what the two workers found."""
    rows = []
    for n, dense in dense_found.items():
        sparse = sparse_found[n]
        dense_s, sparse_s = statistics.median(dense["seconds"]), statistics.median(sparse["seconds"])
        rows.append(
            {
                "tokens": int(n),
                **sizes._asdict(),
                "layers": layers,
                "dense_ttft_s": round(dense_s, 4),
                "sparse_ttft_s": round(sparse_s, 4),
                "speedup": round(dense_s / sparse_s, 4),
                "sparse_tokens": sparse["sparse_tokens"],
                "density": sparse["density"],
                "timed_requests": len(sparse["seconds"]),
            }
        )
    return rows


def make_spec(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    max_len = max(options.tokens) + 16
    shape = TINY if options.tiny else LLAMA_8B
    write_model(directory, shape, options.layers, max_len)
    engine = {
        "model": directory, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
        "max_model_len": max_len, "max_num_batched_tokens": options.chunk, "max_num_seqs": 8, "enforce_eager": True,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.9, "disable_log_stats": True,
    }  # fmt: skip
    return {
        "engine": engine,
        "dense_backend": options.dense_backend,
        "vocab_size": shape["vocab_size"],
        **{name: getattr(options, name) for name in ("tokens", "repeats", "seed", "natural")},
    }


def main() -> None:
    if serve_worker(worker):
        return
    parser = argument_parser(__doc__, "a few layers of a toy shape, the gate at 256 tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="prompt lengths")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="timed requests, if neither very long nor very short")
    parser.add_argument("--chunk", type=int, default=16384, help="max_num_batched_tokens")
    parser.add_argument("--sizes", type=Sizes.parse, nargs="+", default=[Sizes(1000, 6096)], help="vertical:slash")
    parser.add_argument("--natural", action="store_true", help="let the plugin choose by itself")
    options = parser.parse_args()
    results.describe_run(options.tiny)
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        spec = make_spec(options, directory)
        found = measure("benchmarks.ttft", spec, [DENSE])
        rows, settings_of = [], {}
        for sizes in options.sizes:
            minference = {**(TINY_SETTINGS if options.tiny else {}), "vertical_size": sizes.vertical}
            minference["slash_size"] = sizes.slash
            of_sizes = measure("benchmarks.ttft", {**spec, "minference": minference}, [SPARSE])[SPARSE]
            rows += make_rows(sizes, options.layers, found[DENSE], of_sizes)
            found[f"{SPARSE} {sizes}"] = of_sizes
            settings_of[str(sizes)] = resolved(minference)
    engine = {key: value for key, value in spec["engine"].items() if key != "model"}
    settings = {
        "ttft": "wall time of LLM.generate for one prompt and one token, without detokenization, on an idle engine in "
        "the caller's process; the median of the timed requests, after one of every length to warm up",
        "model": {"shape": TINY if options.tiny else LLAMA_8B, "layers": options.layers, "weights": "dummy"},
        "prompts": "random token ids",
        "engine": engine,
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND, "minference": settings_of},
        "selection": NATURAL if options.natural else synthetic.DESCRIPTION,
    }
    seconds = {kind: {n: of["seconds"] for n, of in by_length.items()} for kind, by_length in found.items()}
    results.write(options.out, rows, options.tiny, settings=settings, seconds=seconds)
    print(results.table(rows))


if __name__ == "__main__":
    main()
