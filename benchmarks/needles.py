# SPDX-License-Identifier: Apache-2.0
"""Is a fact hidden in a long text still found when the text is read sparsely? One fact a prompt, at all depths.

    python -m benchmarks.needles --model Qwen/Qwen2.5-Coder-0.5B-Instruct --haystack novel.txt --tokens 30000 \
        --out benchmarks/results/h100-needles.json
"""

import argparse
import random
from typing import Any

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    argument_parser,
    haystack,
    load_engine,
    resolved,
    results,
    sparse_work,
    vertical_slash,
)
from benchmarks.processes import measure, serve_worker

ANSWER_TOKENS = 24
SETTINGS = {"min_seq_len": 4096, "min_chunk": 1024}
TINY_SETTINGS = {"min_seq_len": 256, "min_chunk": 64, "method": vertical_slash(400, 800)}


def worker(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """For each concurrency, which prompts' facts were found, and the density with which the prompts were read."""
    from vllm import SamplingParams

    llm = load_engine(kind, spec)
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    prompts = [{"prompt_token_ids": needle["prompt"]} for needle in spec["needles"]]
    answers = [needle["answer"] for needle in spec["needles"]]
    found = {}
    for concurrency in spec["concurrency"]:
        before = sparse_work() if kind == SPARSE else None
        outputs = []
        for first in range(0, len(prompts), concurrency):
            outputs += llm.generate(prompts[first : first + concurrency], greedy, use_tqdm=False)
        delta = sparse_work().since(before) if before else None
        texts = [output.outputs[0].text for output in outputs]
        hits = [answer in text for answer, text in zip(answers, texts, strict=True)]
        print(f"    {concurrency} at a time: {sum(hits)} of {len(hits)}", flush=True)
        found[str(concurrency)] = {
            "hits": hits,
            "answers": texts,
            **({"sparse_tokens": delta.sparse_tokens, "density": delta.density} if delta else {}),
        }
    return found


def make_rows(tokens: int, concurrency: list[int], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each concurrency. `lost`: facts found densely, but not sparsely; `same_hits`: as in the first row."""
    first = found[SPARSE][str(concurrency[0])]["hits"]
    rows = []
    for number in concurrency:
        dense, sparse = found[DENSE][str(number)], found[SPARSE][str(number)]
        rows.append(
            {
                "tokens": tokens,
                "samples": len(sparse["hits"]),
                "dense_hits": sum(dense["hits"]),
                "sparse_hits": sum(sparse["hits"]),
                "lost": sum(d and not s for d, s in zip(dense["hits"], sparse["hits"], strict=True)),
                "density": sparse["density"],
                "concurrency": number,
                "same_hits": sparse["hits"] == first,
                "sparse_tokens": sparse["sparse_tokens"],
            }
        )
    return rows


def make_spec(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    source = haystack.load(options)
    depths = [(sample + 0.5) / options.samples for sample in range(options.samples)]
    max_len = options.tokens + 64 if options.tiny else max(32768, options.tokens + ANSWER_TOKENS)
    engine = {
        "model": options.model, "dtype": "bfloat16", "max_model_len": max_len, "max_num_batched_tokens": options.chunk,
        "max_num_seqs": max(options.concurrency), "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.8, "disable_log_stats": True,
    }  # fmt: skip
    return {
        "engine": engine,
        "minference": TINY_SETTINGS if options.tiny else SETTINGS,
        "dense_backend": options.dense_backend,
        "concurrency": options.concurrency,
        "needles": [source.needle(options.tokens, depth, rng)._asdict() for depth in depths],
    }


def main() -> None:
    if serve_worker(worker):
        return
    parser = argument_parser(__doc__, "the gate at 256 tokens, small budgets")
    haystack.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=30000, help="length of a prompt")
    parser.add_argument("--samples", type=int, default=50, help="prompts")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="prompts sent at a time")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    options = parser.parse_args()
    results.describe_run(options.tiny)
    spec = make_spec(options)
    found = measure("benchmarks.needles", spec)
    rows = make_rows(options.tokens, options.concurrency, found)
    settings = {
        "task": "the fact is one sentence, in a different place of the text and at another depth in every prompt; "
        f"greedy, {ANSWER_TOKENS} tokens; a hit when they hold the number",
        "needle": haystack.NEEDLE,
        "question": haystack.QUESTION,
        **haystack.identify(options),
        "engine": spec["engine"],
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND, "minference": resolved(spec["minference"])},
    }
    depths = [round(needle["depth"], 4) for needle in spec["needles"]]
    prompts = {"depth": depths, "answer": [needle["answer"] for needle in spec["needles"]], **found}
    results.write(options.out, rows, options.tiny, settings=settings, prompts=prompts)
    print(results.table(rows))


if __name__ == "__main__":
    main()
