# SPDX-License-Identifier: Apache-2.0
"""A program that runs vLLM's real engine on the models of tiny_makers.

`python -m tests.serving.tiny_models FOLDER` writes what came of every job to FOLDER/outcomes.json. All jobs share one
process, because most of a start is imports.
"""

import gc
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.serving.tiny_makers import MAKERS, SAMPLING_RATE, SECONDS_OF_AUDIO

STOCK, OURS = "CPU_ATTN", "minference"
CHUNK = 512
NUM_GENERATED = 8

# The gate is low and the budget larger than any prompt: sparse attention keeps every key.
FULL_BUDGET = {
    "min_seq_len": 256,
    "min_chunk": 64,
    "method": {"name": "vertical_slash", "vertical_size": 10_000, "slash_size": 10_000},
}


@dataclass(frozen=True)
class Job:
    """One engine, which reads the prompts of its model.

    Attributes:
        model, backend: by name.
        cache: type of the KV cache; the model computes in float32.
        settings: of this package, in addition to FULL_BUDGET.
    """

    model: str
    backend: str
    cache: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.backend == OURS


JOBS = {
    "whisper stock": Job("whisper", STOCK),
    "whisper": Job("whisper", OURS, settings={"debug": True}),
    "gpt-oss stock": Job("gpt-oss", STOCK),
    "gpt-oss": Job("gpt-oss", OURS),
    "lfm2 stock": Job("lfm2", STOCK),
    "lfm2": Job("lfm2", OURS),
    "modernbert stock": Job("modernbert", STOCK),
    "modernbert": Job("modernbert", OURS),
    "gemma3 stock": Job("gemma3", STOCK),
    "gemma3": Job("gemma3", OURS),
    "gemma3, fp8 cache, stock": Job("gemma3", STOCK, "fp8"),
    "gemma3, fp8 cache": Job("gemma3", OURS, "fp8"),
    "gemma3 kept dense, fp8 cache": Job("gemma3", OURS, "fp8", {"dense_layers": 6}),
    "gemma3, fp8_e5m2 cache, stock": Job("gemma3", STOCK, "fp8_e5m2"),
    "gemma3, fp8_e5m2 cache": Job("gemma3", OURS, "fp8_e5m2"),
    "gemma3, bfloat16 cache": Job("gemma3", OURS, "bfloat16"),
    "gemma3 kept dense, bfloat16 cache": Job("gemma3", OURS, "bfloat16", {"dense_layers": 6}),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        tokens, logprobs: what followed each prompt.
        vectors: what an encoder made of each.
        counted: prefill tokens by path and reason, "sparse gate_open" for one, as our runtime counted them.
        log: the messages of vLLM's loggers.
        error: type and text of the exception that ended it, if one did.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    vectors: list[list[float]] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    error: str | None = None


def token_ids(length: int) -> list[int]:
    """Tokens that are letters: below 256 the models have no tokens of special meaning."""
    return [10 + (7 * i * i + length) % 240 for i in range(length)]


def gemma3_prompts() -> list[Any]:
    """Prompts of three chunks, of somewhat more than one, and of a part of one."""
    return [{"prompt_token_ids": token_ids(length)} for length in (1_400, 700, 100)]


def whisper_prompts() -> list[Any]:
    """A high and a deep note, both with the same text before the answer, and a third note with a short text."""
    import numpy

    prompts = []
    for frequency, length in ((2_000, 400), (200, 400), (700, 10)):
        times = numpy.arange(SECONDS_OF_AUDIO * SAMPLING_RATE, dtype=numpy.float32) / SAMPLING_RATE
        audio = numpy.sin(2 * numpy.pi * frequency * times)
        heard = {"prompt": "", "multi_modal_data": {"audio": (audio, SAMPLING_RATE)}}
        written = {"prompt_token_ids": [257, *token_ids(length)]}
        prompts.append({"encoder_prompt": heard, "decoder_prompt": written})
    return prompts


PROMPTS = dict.fromkeys(MAKERS, gemma3_prompts) | {"whisper": whisper_prompts}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"max_model_len": 2_048, "max_num_batched_tokens": CHUNK, "skip_tokenizer_init": True},
    "whisper": {"max_model_len": 512},  # vLLM reads each of its prompts in one step
    "modernbert": {"runner": "pooling", "max_model_len": 2_048},  # and of this model's
}
OPTIONS["gpt-oss"] = OPTIONS["gemma3"]
OPTIONS["lfm2"] = OPTIONS["gemma3"] | {"block_size": 32}  # which vLLM raises to 800


@contextmanager
def engine(job: Job, folder: Path) -> Iterator[Any]:
    """vLLM's engine inside this process. It computes in float32, so that rounding hides no difference."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = dict(OPTIONS[job.model])
    if job.is_ours:
        options["additional_config"] = {"minference": {**FULL_BUDGET, **job.settings}}
    try:
        yield LLM(
            str(folder / job.model),
            dtype="float32",
            kv_cache_dtype=job.cache,
            attention_backend=job.backend,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_num_seqs=4,
            **options,
        )
    finally:
        cleanup_dist_env_and_memory()


def answer(job: Job, folder: Path) -> Outcome:
    """The model's output for all its prompts in one batch: vectors of an encoder, else greedy tokens and logprobs."""
    from vllm import SamplingParams

    with engine(job, folder) as llm:
        if llm.model_config.runner_type == "pooling":
            outputs = llm.embed(PROMPTS[job.model](), use_tqdm=False)
            return Outcome(vectors=[output.outputs.embedding for output in outputs], counted=counted(job))
        sampling = SamplingParams(
            temperature=0, max_tokens=NUM_GENERATED, logprobs=0, ignore_eos=True, detokenize=False
        )
        answers = [output.outputs[0] for output in llm.generate(PROMPTS[job.model](), sampling, use_tqdm=False)]
        return Outcome(
            [list(answer.token_ids) for answer in answers],
            [[chosen[token].logprob for token, chosen in zip(a.token_ids, a.logprobs, strict=True)] for a in answers],
            counted=counted(job),
        )


def counted(job: Job) -> dict[str, int]:
    """The prefill tokens that our runtime has counted; its engine must still be alive."""
    if not job.is_ours:
        return {}
    from minference_vllm import impl

    tokens: Counter[str] = Counter()
    for runtime in impl._runtimes.values():
        for (path, reason), number in runtime.counters.snapshot().tokens.items():
            tokens[f"{path} {reason}"] += number
    impl._runtimes.clear()  # the next engine makes a new one
    return dict(tokens)


@contextmanager
def listening() -> Iterator[list[str]]:
    """The messages that vLLM's loggers get inside a `with` block, ours among them."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def outcome(job: Job, folder: Path) -> Outcome:
    """Run one job, come what may."""
    with listening() as log:
        try:
            result = answer(job, folder)
        except Exception as error:
            logging.getLogger("vllm").exception("This job failed")
            result = Outcome(error=f"{type(error).__name__}: {error}")
    return replace(result, log=log)


def main() -> None:
    folder = Path(sys.argv[1])
    for name, make in MAKERS.items():
        make(folder / name)
    outcomes = {}
    for name, job in JOBS.items():
        start = time.process_time()
        # vLLM collects all garbage eight times per engine, which would take longer than everything else.
        with patch.object(gc, "collect"):
            outcomes[name] = asdict(outcome(job, folder))
        logging.getLogger("vllm").info("Job %r took %.1f s of CPU", name, time.process_time() - start)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own threads may abort the process while the interpreter ends; all is written


if __name__ == "__main__":
    main()
