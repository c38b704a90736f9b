# SPDX-License-Identifier: Apache-2.0
"""The length from which sparse prefill wins: what `minference-vllm tune` measures, as a result on record.

    python -m benchmarks.gate --chunks 16384 8192 --out benchmarks/results/h100-gate-block.json
    python -m benchmarks.gate --method 1000:6096 --chunks 16384 8192 --out benchmarks/results/h100-gate.json

The default of min_seq_len comes from here.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import parse_method, results
from minference_vllm.cli.tune import LENGTHS
from minference_vllm.config import MInferenceConfig
from minference_vllm.tuning import timing
from minference_vllm.tuning.gate import Timing, crossover
from minference_vllm.tuning.heads import Heads

MEASURED = (
    "one layer's attention for the last chunk of a prompt of so many tokens, through pages of 16, choosing included; "
    "median; drawn key sets, as benchmarks.ttft draws them; recall is measured, and the guard looks for heads below "
    "the lowest floor, of which there are none; dense is vLLM's FlashAttention"
)


def make_row(chunk: int, measured: Timing) -> dict[str, float]:
    """A row of one length's times."""
    return {
        "chunk": chunk,
        "tokens": measured.tokens,
        "dense_ms": round(measured.dense_ms, 4),
        "sparse_ms": round(measured.sparse_ms, 4),
        "speedup": round(measured.speedup, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16384, 8192], help="max_num_batched_tokens")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="query heads, KV heads, head_dim")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt lengths")
    parser.add_argument("--cache", choices=["bf16", "fp8"], default="bf16", help="of keys and values")
    parser.add_argument("--method", default="block", help="or vertical_slash by its sizes: 1000:6096")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    results.describe_run()
    heads = Heads(*options.heads)
    config = MInferenceConfig.model_validate({"method": parse_method(options.method)})
    settings = {
        "measured": MEASURED,
        "heads": heads._asdict(),
        "cache": options.cache,
        "minference": config.model_dump(),
    }
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, float]] = []
    gates: dict[str, int | None] = {}
    lengths, has_fp8_kv = sorted(options.lengths), options.cache == "fp8"
    for chunk in options.chunks:
        timings = list(timing.measure(heads, config, device, lengths, chunk, options.repeats, has_fp8_kv))
        rows += [make_row(chunk, one) for one in timings]
        gates[f"chunks of {chunk}"] = crossover(timings)
    results.write(options.out, rows, settings=settings, min_seq_len=gates)
    print(results.table(rows))
    print(gates)


if __name__ == "__main__":
    main()
