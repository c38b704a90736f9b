# SPDX-License-Identifier: Apache-2.0
"""With a budget that keeps every key, the sparse path must give what dense attention gives: greedy tokens, logprobs.

    python -m benchmarks.greedy --model Qwen/Qwen2.5-Coder-0.5B-Instruct --haystack novel.txt \
        --out benchmarks/results/h100-greedy.json

Another dense backend of vLLM's runs beside them as the control. Two correct kernels differ by rounding, so the sparse
path cannot be expected to differ less than the control does.
"""

import argparse
import math
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

CONTROL, CONTROL_BACKEND = "control", "TRITON_ATTN"
ANSWER_TOKENS = 32
CUE_TOKENS = 64
LOGPROBS = 20
SETTINGS = {"min_seq_len": 0, "min_chunk": 16, "method": vertical_slash(40000, 40000)}
ENDINGS = {
    "echo": f"{CUE_TOKENS} tokens that repeat a passage of the prompt: the model goes on with the rest of the passage",
    "open": "wherever the excerpt ends",
}


def worker(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The greedy tokens of every prompt, and the alternatives to its first token."""
    from vllm import SamplingParams

    llm = load_engine(kind, {**spec, "dense_backend": spec["control_backend"]} if kind == CONTROL else spec)
    greedy = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=LOGPROBS, detokenize=False
    )
    tokens, first_logprobs = [], []
    for prompt in spec["prompts"]:
        [output] = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        answer = output.outputs[0]
        tokens.append(list(answer.token_ids))
        first_logprobs.append({str(token): entry.logprob for token, entry in answer.logprobs[0].items()})
    found: dict[str, Any] = {"tokens": tokens, "first_logprobs": first_logprobs}
    if kind == SPARSE:
        work = sparse_work()
        found.update(sparse_tokens=work.sparse_tokens, density=work.density)
    return found


def equal_prefix(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(one))


def logprob_diff(dense: dict[str, float], other: dict[str, float]) -> float:
    """The difference between the two runs in the logprob of the dense run's likeliest first token."""
    top = max(dense, key=dense.__getitem__)
    if top not in other:
        raise ValueError(f"first token {top} is not among the {LOGPROBS} likeliest of the other run: it is wrong.")
    return abs(dense[top] - other[top])


def make_rows(prompts: list[list[int]], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each prompt."""

    def compare(kind: str, at: int) -> tuple[int, float]:
        dense, other = found[DENSE], found[kind]
        diff = logprob_diff(dense["first_logprobs"][at], other["first_logprobs"][at])
        return equal_prefix(dense["tokens"][at], other["tokens"][at]), round(diff, 5)

    rows = []
    for at, prompt in enumerate(prompts):
        equal_tokens, diff = compare(SPARSE, at)
        noise_equal, noise_diff = compare(CONTROL, at)
        rows.append(
            {
                "tokens": len(prompt),
                "equal_tokens": equal_tokens,
                "logprob_diff": diff,
                "control_equal_tokens": noise_equal,
                "control_logprob_diff": noise_diff,
                "dense_top_probability": round(math.exp(max(found[DENSE]["first_logprobs"][at].values())), 4),
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all prompts; those of the control begin with `control_`."""
    return {
        "prompts": len(rows),
        **{
            f"{name}all_equal": sum(row[f"{name}equal_tokens"] == ANSWER_TOKENS for row in rows)
            for name in ("", "control_")
        },
        **{f"{name}max_logprob_diff": max(row[f"{name}logprob_diff"] for row in rows) for name in ("", "control_")},
    }


def make_spec(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(options.seed)
    source = haystack.load(options)
    low, high = options.tokens
    lengths = [low + (high - low) * at // max(options.samples - 1, 1) for at in range(options.samples)]
    prompts = [source.echo(n, CUE_TOKENS, rng) if options.ending == "echo" else source.passage(n, rng) for n in lengths]
    engine = {
        "model": options.model, "dtype": "bfloat16", "max_model_len": high + ANSWER_TOKENS + 16, "max_num_seqs": 8,
        "max_num_batched_tokens": options.chunk, "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.8, "max_logprobs": LOGPROBS, "disable_log_stats": True,
    }  # fmt: skip
    return {
        "engine": engine,
        "minference": SETTINGS,
        "dense_backend": options.dense_backend,
        "control_backend": options.control_backend,
        "prompts": prompts,
    }


def main() -> None:
    if serve_worker(worker):
        return
    parser = argument_parser(__doc__, "nothing else changes, so ask for few and short prompts")
    haystack.add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs=2, default=[4096, 30000], help="shortest and longest prompt")
    parser.add_argument("--samples", type=int, default=20, help="prompts")
    parser.add_argument("--ending", choices=ENDINGS, default="echo", help="; ".join(map(": ".join, ENDINGS.items())))
    parser.add_argument("--control-backend", default=CONTROL_BACKEND, help="another dense backend")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    options = parser.parse_args()
    results.describe_run(options.tiny)
    spec = make_spec(options)
    found = measure("benchmarks.greedy", spec, (DENSE, SPARSE, CONTROL))
    rows = make_rows(spec["prompts"], found)
    settings = {
        "task": f"{ANSWER_TOKENS} greedy tokens, one prompt at a time; logprob_diff is that of dense's first token",
        "prompts": f"excerpts from random places; they end with {ENDINGS[options.ending]}",
        **haystack.identify(options),
        "engine": spec["engine"],
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND, "minference": resolved(spec["minference"])},
        "control": {"attention_backend": options.control_backend},
    }
    work = {key: found[SPARSE][key] for key in ("sparse_tokens", "density")}
    summary = {**summarize(rows), **work}
    results.write(options.out, rows, options.tiny, settings=settings, summary=summary)
    print(results.table(rows))
    print(summary)


if __name__ == "__main__":
    main()
