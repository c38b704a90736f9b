# SPDX-License-Identifier: Apache-2.0
"""In the place of `vllm`: takes the arguments of `vllm bench serve` and writes a result as its client does.

What it is to answer stands in the file that FAKE_BENCH names: by server, the time to the first token of a prompt and,
of some requests, an error. The server gets what is sent, and counts it.
"""

import argparse
import json
import os
import sys
import urllib.request
from pathlib import Path


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="vllm bench serve", allow_abbrev=False)
    for option in ("base-url", "model", "served-model-name", "tokenizer", "dataset-name", "dataset-path", "result-dir"):
        parser.add_argument(f"--{option}")
    for option in ("seed", "num-prompts", "input-len", "output-len", "max-concurrency"):
        parser.add_argument(f"--{option}", type=int)
    for option in ("result-filename", "extra-body", "header", "temperature", "request-rate"):
        parser.add_argument(f"--{option}")
    for option in ("save-result", "save-detailed", "disable-tqdm", "skip-chat-template", "ignore-eos"):
        parser.add_argument(f"--{option}", action="store_true")
    options = parser.parse_args(arguments)
    plan = json.loads(Path(os.environ["FAKE_BENCH"]).read_text())
    with Path(plan["asked"]).open("a") as asked:
        asked.write(json.dumps(vars(options)) + "\n")
    Path(options.result_dir, options.result_filename).write_text(json.dumps(result(options, plan)))


def result(options: argparse.Namespace, plan: dict) -> dict:
    read, written = options.input_len or 100, options.output_len or 4
    ttft, failing = plan["ttft"][options.base_url], plan["failing"].get(options.base_url, {})
    requests = [str(number) for number in range(options.num_prompts)]
    for number in requests:
        if number not in failing:
            body = json.dumps({"prompt": [0] * read, "model": options.model}).encode()
            urllib.request.urlopen(urllib.request.Request(f"{options.base_url}/v1/completions", body)).read()
    # Each request is a little slower than the one before it, on both servers alike.
    times = [0.0 if number in failing else ttft * (1 + int(number) / 100) for number in requests]
    gaps = [[] if number in failing else [0.01] * (written - 1) for number in requests]
    return {
        "duration": sum(times) + 0.25,
        "completed": len(requests) - len(failing),
        "input_lens": [read] * len(requests),
        "output_lens": [0 if number in failing else written for number in requests],
        "ttfts": times,
        "itls": gaps,
        "latencies": [time + sum(between) for time, between in zip(times, gaps, strict=True)],
        "errors": [failing.get(number, "") for number in requests],
        "generated_texts": ["a secret"] * len(requests),
        "mean_ttft_ms": float("nan"),
    }


if __name__ == "__main__":
    assert sys.argv[1:3] == ["bench", "serve"]
    main(sys.argv[3:])
