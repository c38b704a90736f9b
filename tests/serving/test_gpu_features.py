# SPDX-License-Identifier: Apache-2.0
"""Serving features that vLLM's engine for the CPU has not, on a GPU: with every key kept, as with FLASH_ATTN.

Each test is an engine in a process of its own. MINFERENCE_TEST_MODEL names a small model of 16K tokens or more; the
lines of JSON that `--log-cli-level=INFO` shows say what was compared.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.engine_jobs import Job, Outcome, Step, run
from tests.serving.features import Report, Tolerance, answers, compare, density, metric, reporter, served, sparse_tokens
from tests.serving.prompts import HAYSTACK
from tests.serving.server import MODEL, needs_model
from tests.serving.tiny_drafts import make_eagle_head, make_qwen3_moe
from tests.serving.tiny_kinds import make_deepseek

pytestmark = [pytest.mark.serving, pytest.mark.gpu, needs_model]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ROOT = Path(__file__).parents[2]
STOCK, OURS = "FLASH_ATTN", "minference"
TIMEOUT_S = 280
ROUNDING = Tolerance(most=0.25, mean=0.03)  # bfloat16, 24 layers
ROUNDING_TO_FP8 = Tolerance(most=0.5, mean=0.06)
LONGEST = 16_384
# All keys are kept as local ones: a share of 1 could leave out groups whose estimated mass rounds to zero.
ALL_KEYS = {"min_seq_len": 1024, "min_chunk": 64, "method": {"name": "block", "local_tokens": LONGEST}}
CHUNK = 4096
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": LONGEST,
    "max_num_seqs": 8,
    "max_num_batched_tokens": CHUNK,
    "kv_cache_memory_bytes": 2 * 10**9,
    "gpu_memory_utilization": 0.15,  # as much as must be free at start; others may use the GPU too
}
# Nothing is compiled. Where compilation is not tested, it would take longer than everything else.
QUICK = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
LENGTHS = (3_000, 6_000, 12_000)
CUE_TOKENS, ANSWER_TOKENS, MANY_TOKENS = 64, 24, 300
TOKENS = sum(LENGTHS)

Prompts = dict[str, list[Any]]
Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Excerpts that end with the beginning of one of their own passages, which the model surely continues."""
    from transformers import AutoTokenizer

    documents = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("methods", "performance", "troubleshooting")]
    text = AutoTokenizer.from_pretrained(MODEL).encode("\n\n".join([HAYSTACK, *documents]))

    def prompt(start: int, length: int) -> dict[str, list[int]]:
        body = text[start : start + length - CUE_TOKENS]
        assert len(body) == length - CUE_TOKENS
        return {"prompt_token_ids": body + body[length // 3 : length // 3 + CUE_TOKENS]}

    return {
        "three": [prompt(100 * at, length) for at, length in enumerate(LENGTHS)],
        "eight": [prompt(1_500 * at, 6_000) for at in range(8)],
        "four": [prompt(2_000 * at, 3_000) for at in range(4)],
    }


def asking(prompts: Prompts, name: str, max_tokens: int = ANSWER_TOKENS) -> Step:
    return {"do": "ask", "prompts": prompts[name], "sampling": {"max_tokens": max_tokens}}


def ours(steps: list[Step], **options: Any) -> Job:
    return Job(str(MODEL), OURS, {**OPTIONS, **options}, steps, ALL_KEYS)


def assert_all_kept(found: Outcome) -> None:
    """On every GPU, of all that ran sparse."""
    for rank in range(len(found.counted[-1])):
        assert density(found, rank) == pytest.approx(1, abs=1e-3)


@pytest.fixture
def engine(tmp_path: Path) -> Run:
    """Runs one job in a process of its own."""

    def run_one(job: Job, **environ: str) -> Outcome:
        return served(run({"job": job}, tmp_path / f"job {len(list(tmp_path.iterdir()))}", TIMEOUT_S, **environ)["job"])

    return run_one


@pytest.fixture(scope="module")
def stock(prompts: Prompts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What FLASH_ATTN makes of all prompts, in chunks of 8,192 tokens."""
    steps = [asking(prompts, "three"), asking(prompts, "eight"), asking(prompts, "four", MANY_TOKENS)]
    job = Job(str(MODEL), STOCK, {**OPTIONS, **QUICK, "max_num_batched_tokens": 8_192}, steps)
    found = served(run({"stock": job}, tmp_path_factory.mktemp("features") / "stock", TIMEOUT_S)["stock"])
    return dict(zip(("three", "eight", "four"), map(answers, found.steps), strict=True))


@pytest.fixture
def report(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Report:
    return reporter(request.node.name, record_property)


@pytest.mark.parametrize("runner", ["0", "1"], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", [None, "FULL", "PIECEWISE"], ids=["default", "full", "piecewise"])
def test_compiled_and_in_cuda_graphs(
    mode: str | None, runner: str, prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report
) -> None:
    # If the mode has graphs for chunks, one of 4,096 tokens is replayed, and so is a prompt's rest, padded to as many.
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2, 4, 8, CHUNK]}
    if mode:
        compilation["cudagraph_mode"] = mode
    job = ours([asking(prompts, "three")], compilation_config=compilation)
    found = engine(job, VLLM_USE_V2_MODEL_RUNNER=runner)
    difference = compare(answers(found.steps[0]), stock["three"], ROUNDING)
    report(found, difference=difference._asdict(), runner=runner)
    assert "NONE" not in found.cudagraph_mode
    assert sparse_tokens(found) >= 0.9 * TOKENS
    assert_all_kept(found)


@pytest.mark.parametrize("chunk", [1_024, 2_048, 4_096, 8_192, 16_384])
def test_chunks(chunk: int, prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    found = engine(ours([asking(prompts, "three")], **QUICK, max_num_batched_tokens=chunk))
    difference = compare(answers(found.steps[0]), stock["three"], ROUNDING)
    report(found, difference=difference._asdict(), chunks=found.counted[0][0]["chunks"])
    assert sparse_tokens(found) >= 0.9 * TOKENS - chunk
    assert_all_kept(found)


def test_eight_prompts_at_once(prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    # A step holds two prompts and the rest of one, or more.
    found = engine(ours([asking(prompts, "eight")], **QUICK, max_num_batched_tokens=16_384))
    difference = compare(answers(found.steps[0]), stock["eight"], ROUNDING)
    report(found, difference=difference._asdict(), chunks=found.counted[0][0]["chunks"])
    assert sparse_tokens(found) >= 0.9 * 8 * 6_000
    assert_all_kept(found)


def test_a_cache_in_fp8(prompts: Prompts, engine: Run, report: Report) -> None:
    job = ours([asking(prompts, "three")], **QUICK, kv_cache_dtype="fp8")
    theirs = engine(replace(job, backend=STOCK, settings=None))
    found = engine(job)
    difference = compare(answers(found.steps[0]), answers(theirs.steps[0]), ROUNDING_TO_FP8)
    report(found, difference=difference._asdict())
    assert sparse_tokens(found) >= 0.9 * TOKENS
    assert_all_kept(found)


def test_without_asynchronous_scheduling(prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    # All other tests have asynchronous scheduling, which is vLLM's default.
    found = engine(ours([asking(prompts, "three")], **QUICK, async_scheduling=False))
    difference = compare(answers(found.steps[0]), stock["three"], ROUNDING)
    report(found, difference=difference._asdict())
    assert sparse_tokens(found) >= 0.9 * TOKENS
    assert_all_kept(found)


def test_preempted_prompts_are_read_again(prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    # The cache holds four prompts, but not all that follows them.
    tight = {"num_gpu_blocks_override": 4 * 3_000 // 16 + 20, "max_model_len": 8_192, "enable_prefix_caching": False}
    found = engine(ours([asking(prompts, "four", MANY_TOKENS)], **QUICK, **tight))
    difference = compare(answers(found.steps[0]), stock["four"], ROUNDING)
    report(found, difference=difference._asdict(), preemptions=metric(found, "num_preemptions"))
    assert metric(found, "num_preemptions") > 0
    assert sparse_tokens(found) > 4 * 3_000
    assert_all_kept(found)


def test_asleep_and_awake_again(prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    question = asking(prompts, "three")
    light: list[Step] = [question, {"do": "sleep", "level": 1}, {"do": "wake"}, question]
    deep: list[Step] = [
        {"do": "sleep", "level": 2},
        {"do": "wake", "tags": ["weights"]},
        {"do": "reload"},
        {"do": "wake", "tags": ["kv_cache"]},
        question,
    ]
    found = engine(ours(light + deep, **QUICK, enable_sleep_mode=True))
    asked = [step for step, done in zip(found.steps, light + deep, strict=True) if done["do"] == "ask"]
    differences = [compare(answers(each), stock["three"], ROUNDING)._asdict() for each in asked]
    report(found, differences=differences, levels=[found.steps[1], found.steps[4]])
    for level in found.steps[1], found.steps[4]:
        assert level["free_asleep"] > level["free_awake"] + 2 * 10**9
    assert sparse_tokens(found) >= 3 * 0.9 * TOKENS  # read three times: each sleep loses the cache
    assert_all_kept(found)


def test_pages_that_were_moved_to_the_hosts_memory(
    prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report
) -> None:
    connector = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 4 * 10**9},
    }
    question = asking(prompts, "three")
    # Pages are moved during the steps that follow those in which they were filled.
    after: list[Step] = [{"do": "rest", "seconds": 1}, asking(prompts, "four", 4), {"do": "rest", "seconds": 1}]
    steps = [question, *after, {"do": "forget"}, question]
    found = engine(ours(steps, **QUICK, kv_transfer_config=connector))
    first, second = (compare(answers(found.steps[at]), stock["three"], ROUNDING) for at in (0, -1))
    hits = metric(found, "external_prefix_cache_hits")
    again = sparse_tokens(found, since=-2)
    report(found, first=first._asdict(), second=second._asdict(), hits=hits, read_again=again)
    assert found.steps[-2] is True
    assert hits > 0.8 * TOKENS
    assert again < 0.2 * TOKENS
    assert_all_kept(found)


@pytest.mark.parametrize(
    ("kind", "runner"), [("ngram", "1"), ("draft_model", "1"), ("eagle", "1"), ("eagle", "0")],
    ids=["ngram-v2", "draft_model-v2", "eagle-v2", "eagle-v1"],
)  # fmt: skip
def test_speculative_decoding(
    kind: str, runner: str, prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report, tmp_path: Path
) -> None:
    speculative: dict[str, Any] = {"method": kind, "num_speculative_tokens": 3}
    if kind == "ngram":
        speculative |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    elif kind == "draft_model":
        speculative["model"] = str(MODEL)  # its own draft
    else:
        make_eagle_head(tmp_path / "head", MODEL)
        speculative["model"] = str(tmp_path / "head")
    found = engine(
        ours([asking(prompts, "three")], **QUICK, speculative_config=speculative), VLLM_USE_V2_MODEL_RUNNER=runner
    )
    difference = compare(answers(found.steps[0]), stock["three"], ROUNDING)
    drafted, accepted = (metric(found, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    report(found, difference=difference._asdict(), drafted=drafted, accepted=accepted)
    assert drafted > 0
    assert accepted >= {"ngram": 0.3, "draft_model": 0.8, "eagle": 0.0}[kind] * drafted  # the head's weights are random
    assert sparse_tokens(found) >= 0.9 * TOKENS
    assert_all_kept(found)


def test_latent_attention_is_refused_by_name(report: Report, tmp_path: Path) -> None:
    make_deepseek(tmp_path / "model")
    options = {**OPTIONS, **QUICK, "max_model_len": 4_096, "skip_tokenizer_init": True}
    job = Job(str(tmp_path / "model"), OURS, options, [], ALL_KEYS)
    found = run({"job": job}, tmp_path / "job", TIMEOUT_S)["job"]
    report(found, error=found.error)
    assert found.error is not None
    assert "MLA not supported" in found.error


@two_gpus
def test_two_gpus_answer_as_one(prompts: Prompts, stock: dict[str, Any], engine: Run, report: Report) -> None:
    found = engine(ours([asking(prompts, "three")], **QUICK, tensor_parallel_size=2))
    difference = compare(answers(found.steps[0]), stock["three"], ROUNDING)
    report(found, difference=difference._asdict(), workers=len(found.counted[0]))
    assert len(found.counted[0]) == 2
    assert sparse_tokens(found) >= 0.9 * TOKENS
    assert_all_kept(found)


@two_gpus
def test_experts_on_two_gpus(engine: Run, report: Report, tmp_path: Path) -> None:
    make_qwen3_moe(tmp_path / "model")
    prompts = {"one": [{"prompt_token_ids": [10 + (7 * i * i) % 240 for i in range(3_000)]}]}
    options = {**OPTIONS, **QUICK, "tensor_parallel_size": 2, "enable_expert_parallel": True, "max_model_len": 4_096}
    job = Job(
        str(tmp_path / "model"), OURS, {**options, "skip_tokenizer_init": True}, [asking(prompts, "one")], ALL_KEYS
    )
    theirs = engine(replace(job, backend=STOCK, settings=None))
    found = engine(job)
    difference = compare(answers(found.steps[0]), answers(theirs.steps[0]), ROUNDING)
    report(found, difference=difference._asdict())
    assert sparse_tokens(found) == 3_000
    assert_all_kept(found)
