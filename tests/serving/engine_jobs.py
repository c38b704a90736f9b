# SPDX-License-Identifier: Apache-2.0
"""A program that runs vLLM's real engine, and what starts it. A job is one engine, and what is done to it in turn.

`python -m tests.serving.engine_jobs FOLDER` reads FOLDER/jobs.json and writes FOLDER/outcomes.json. All jobs share one
process, because most of a start is imports.
"""

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from demo.server import environment, excerpt
from tests.serving.forked import run_program

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engines run in this process, one after another
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # workers are sent the function `count`
}
TOP_LOGPROBS = 2
Step = dict[str, Any]
"""{"do": name of a function below, and its arguments}."""


@dataclass(frozen=True)
class Job:
    """One engine.

    Attributes:
        model: folder.
        backend: by name.
        options: further arguments of vllm.LLM.
        settings: of this package.
        steps: what is done to the engine, in turn.
    """

    model: str
    backend: str
    options: dict[str, Any]
    steps: list[Step]
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        steps: what each step returned.
        counted: after each step, for each worker, what our runtimes have counted so far.
        metrics: vLLM's own counters after each step.
        cudagraph_mode: what vLLM made of the option.
        log: the messages of vLLM's loggers in this process.
        seconds: from its start to its end.
        error: type and text of the exception that ended it, if one did.
    """

    steps: list[Any] = field(default_factory=list)
    counted: list[list[dict[str, Any]]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    cudagraph_mode: str = ""
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def run(jobs: Mapping[str, Job], folder: Path, timeout: float, **environ: str) -> dict[str, Outcome]:
    """Start the program for these jobs, and wait for what comes of them."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps({name: asdict(job) for name, job in jobs.items()}))
    model, log = next(iter(jobs.values())).model, folder / "log"
    variables = {**environment(model), **ENVIRONMENT, **environ}
    assert run_program(__name__, folder, log, variables, timeout) == 0, excerpt(log)
    found = json.loads((folder / "outcomes.json").read_text())
    return {name: Outcome(**fields) for name, fields in found.items()}


def ask(
    llm: Any,
    prompts: list[Any],
    sampling: dict[str, Any],
    lora: str | None = None,
    priority: list[int] | None = None,
) -> list[dict[str, Any]]:
    """The model's answers to all prompts at once: tokens, their logprobs, and the lead of the likeliest token."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    options = {"temperature": 0, "logprobs": TOP_LOGPROBS, "ignore_eos": True, "detokenize": False, **sampling}
    if "structured_outputs" in options:
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    adapter = LoRARequest("adapter", 1, lora) if lora else None
    outputs = llm.generate(
        list(map(_seen, prompts)), SamplingParams(**options), use_tqdm=False, lora_request=adapter, priority=priority
    )
    return [
        {
            "answers": [_answer(answer) for answer in output.outputs],
            "prompt_logprobs": [
                entry[token].logprob
                for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
                if entry
            ],
        }
        for output in outputs
    ]


def _seen(prompt: Any) -> Any:
    """A prompt for vLLM; `images` holds the seeds of the images, which are made here."""
    if "images" not in prompt:
        return prompt
    import numpy
    from PIL import Image

    pixels = [numpy.random.default_rng(seed).integers(0, 256, (64, 64, 3), numpy.uint8) for seed in prompt["images"]]
    images = [Image.fromarray(each) for each in pixels]
    return {"prompt_token_ids": prompt["prompt_token_ids"], "multi_modal_data": {"image": images}}


def _answer(answer: Any) -> dict[str, Any]:
    chosen = [entries[token].logprob for token, entries in zip(answer.token_ids, answer.logprobs, strict=True)]
    ranked = [sorted((each.logprob for each in entries.values()), reverse=True) for entries in answer.logprobs]
    leads = [logprobs[0] - logprobs[1] for logprobs in ranked]
    return {"tokens": list(answer.token_ids), "logprobs": chosen, "leads": leads, "text": answer.text}


def beam(llm: Any, prompts: list[Any], width: int, max_tokens: int) -> list[dict[str, Any]]:
    """The beams of each prompt, the best first."""
    from vllm.sampling_params import BeamSearchParams

    outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True))
    return [
        {"tokens": [each.tokens for each in output.sequences], "sums": [each.cum_logprob for each in output.sequences]}
        for output in outputs
    ]


def pause(llm: Any, prompt: Any, max_tokens: int) -> dict[str, Any]:
    """Read one step of a prompt, pause the scheduler, then go on. Also says whether the pause did stop it."""
    from vllm import SamplingParams

    engine, sampling = llm.llm_engine, {"temperature": 0, "logprobs": TOP_LOGPROBS, "ignore_eos": True}
    engine.add_request("paused", prompt, SamplingParams(**sampling, max_tokens=max_tokens, detokenize=False))
    engine.step()
    llm.sleep(0, mode="keep")
    before = llm.collective_rpc(count)[0]["tokens"]
    stood_still = not engine.step() and llm.collective_rpc(count)[0]["tokens"] == before
    llm.wake_up(["scheduling"])
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return {"stood_still": stood_still, "read_before": before, "answer": _answer(outputs[-1].outputs[0])}


def embed(llm: Any, prompts: list[Any]) -> list[list[float]]:
    return [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]


def sleep(llm: Any, level: int) -> dict[str, int]:
    """Bytes of the GPU that are free before and after."""
    import torch

    before, _ = torch.cuda.mem_get_info()
    llm.sleep(level)
    return {"free_awake": before, "free_asleep": torch.cuda.mem_get_info()[0]}


def wake(llm: Any, tags: list[str] | None = None) -> None:
    llm.wake_up(tags)


def reload(llm: Any) -> None:
    llm.collective_rpc("reload_weights")


def forget(llm: Any) -> bool:
    """Whether the prefix cache was emptied."""
    return bool(llm.reset_prefix_cache())


def rest(llm: Any, seconds: float) -> None:
    time.sleep(seconds)


STEPS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (ask, beam, pause, embed, sleep, wake, reload, forget, rest)
}


def count(worker: Any) -> dict[str, Any]:
    """What a worker's runtimes have counted so far, with pairs that it does not report. Runs in the worker."""
    from minference_vllm import impl

    found: dict[str, Any] = {"tokens": {}, "chunks": {}, "kept": 0, "causal": 0, "scratch": 0}
    for runtime in impl._runtimes.values():
        counted = runtime.counters.snapshot()
        for name in ("tokens", "chunks"):
            for (path, reason), number in getattr(counted, name).items():
                label = f"{path} {reason}"
                found[name][label] = found[name].get(label, 0) + number
        found["kept"] += int(density.kept_pairs) if (density := runtime.account._density) else 0
        found["causal"] += runtime.account.causal_pairs
        found["scratch"] += counted.scratch_bytes
    return found


def counters_of(llm: Any) -> dict[str, float]:
    """vLLM's own, those of all labels added."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if type(metric).__name__ == "Counter":
            totals[metric.name] = totals.get(metric.name, 0) + metric.value
    return totals


def start(job: Job) -> Any:
    from vllm import LLM

    options = {"attention_backend": job.backend, "disable_log_stats": False, "seed": 0, **job.options}
    if job.settings is not None:
        options["additional_config"] = {"minference": job.settings}
    return LLM(job.model, **options)


def outcome(job: Job) -> Outcome:
    """Run one job, come what may."""
    from vllm.distributed import cleanup_dist_env_and_memory

    result, began = Outcome(), time.monotonic()
    try:
        llm = start(job)
        mode = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
        for step in job.steps:
            arguments = dict(step)
            result.steps.append(STEPS[arguments.pop("do")](llm, **arguments))
            result.counted.append(llm.collective_rpc(count))
            result.metrics.append(counters_of(llm))
        error = None
    except Exception as exception:
        logging.getLogger("vllm").exception("This job failed")
        mode, error = "", f"{type(exception).__name__}: {exception}"
    finally:
        _forget_runtimes()
        with suppress(Exception):  # a failure here is no matter: the job's result is known
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    found = asdict(result) | {"cudagraph_mode": mode, "error": error, "seconds": time.monotonic() - began}
    return Outcome(**found)


def _forget_runtimes() -> None:
    """The next engine of this process makes new ones."""
    if "minference_vllm.impl" in sys.modules:
        sys.modules["minference_vllm.impl"]._runtimes.clear()


class Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    folder = Path(sys.argv[1])
    jobs = {name: Job(**fields) for name, fields in json.loads((folder / "jobs.json").read_text()).items()}
    logger, outcomes = logging.getLogger("vllm"), {}
    for name, job in jobs.items():
        logger.addHandler(listener := Listener())
        # vLLM collects all garbage eight times per engine, which would take longer than everything else.
        with patch.object(gc, "collect"):
            found = outcome(job)
        logger.removeHandler(listener)
        outcomes[name] = asdict(found) | {"log": listener.messages}
        logger.info("Job %r took %.1f s", name, found.seconds)
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads and workers may hold up the end of the interpreter; all is written


if __name__ == "__main__":
    main()
