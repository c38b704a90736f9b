# SPDX-License-Identifier: Apache-2.0
"""What the tests of serving features do to engines on the CPU, ours and vLLM's own."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.serving.engine_jobs import Job, Step
from tests.serving.tiny_drafts import make_adapter, make_eagle_head, make_qwen3_moe
from tests.serving.tiny_kinds import make_blip2, make_deepseek, make_granite_hybrid, make_llama, make_qwen3_next
from tests.serving.tiny_models import token_ids

STOCK, OURS = "CPU_ATTN", "minference"
LENGTHS = (1_400, 700, 100)
NUM_GENERATED, MANY = 12, 100
PAGE = 32
PRIORITY = [0, 2, 1]  # the second prompt has to wait
ALL_KEYS = {"min_seq_len": 256, "min_chunk": 64, "method": {"name": "block", "share": 1.0}, "debug": True}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2_048,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
    "block_size": PAGE,
}
NO_TOKENIZER = {"skip_tokenizer_init": True}
PROMPTS = [{"prompt_token_ids": token_ids(length)} for length in LENGTHS]
SEEING = [{"prompt_token_ids": token_ids(800), "images": [seed]} for seed in (1, 2)]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
HAS_GRAMMARS = find_spec("xgrammar") is not None
# The heads of one rank keep little, those of the other rank keep all.
LITTLE, EVERYTHING = [64, 64], [2_000, 2_000]
PATTERN = {
    "version": 1,
    "models": [],
    "geometry": {"num_layers": 2, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    "provenance": {"source": "a test"},
    "layers": [[LITTLE, LITTLE, EVERYTHING, EVERYTHING]] * 2,
}


def ask(prompts: list[Any] = PROMPTS, lora: str | None = None, priority: Any = None, **sampling: Any) -> Step:
    given = {"max_tokens": NUM_GENERATED, **sampling}
    return {"do": "ask", "prompts": prompts, "sampling": given, "lora": lora, "priority": priority}


# By name, in the order in which a plain decoder is asked.
PLAIN: dict[str, Step] = {
    "greedy": ask(),
    "many tokens": ask(max_tokens=MANY),
    "prompt logprobs": ask(prompt_logprobs=0),
    "two answers": ask(n=2, temperature=0.001),
    "beams": {"do": "beam", "prompts": PROMPTS[1:], "width": 2, "max_tokens": 4},
    "a pause": {"do": "pause", "prompt": PROMPTS[0], "max_tokens": NUM_GENERATED},
}
if HAS_GRAMMARS:
    PLAIN["a schema"] = ask(structured_outputs={"json": SCHEMA}, ignore_eos=False, detokenize=True, max_tokens=40)


def pair(model: Path, steps: list[Step], **options: Any) -> tuple[Job, Job]:
    """The same job with our backend and with vLLM's own."""
    given = {**OPTIONS, **NO_TOKENIZER, **options}
    return Job(str(model), OURS, given, steps, ALL_KEYS), Job(str(model), STOCK, given, steps)


def plain_jobs(llama: Path, head: Path, adapter: Path) -> dict[str, Job]:
    """The jobs with a plain decoder."""
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True} if HAS_GRAMMARS else {}
    with_tokenizer = {"skip_tokenizer_init": False, "structured_outputs_config": grammars}
    jobs = dict(zip(("plain", "plain stock"), pair(llama, list(PLAIN.values()), **with_tokenizer), strict=True))
    drafts: dict[str, dict[str, Any]] = {
        "ngram": {"prompt_lookup_max": 4, "prompt_lookup_min": 2},
        "draft_model": {"model": str(llama)},  # its own draft
        "eagle": {"model": str(head)},
    }
    for method, more in drafts.items():
        speculative = {"method": method, "num_speculative_tokens": 3, **more}
        jobs[method], _ = pair(llama, [PLAIN["many tokens"]], speculative_config=speculative)
    loras = {"enable_lora": True, "max_lora_rank": 8}
    jobs["adapter"], jobs["adapter stock"] = pair(llama, [ask(lora=str(adapter)), ask()], **loras)
    # There are pages for all prompts, and one that vLLM needs for itself, but not for all that the model generates.
    pages = {"num_gpu_blocks_override": 2 + sum(-(-length // PAGE) for length in LENGTHS)}
    preempted = [ask(max_tokens=MANY, priority=PRIORITY)]
    jobs["preempted"], _ = pair(llama, preempted, scheduling_policy="priority", **pages)
    return jobs


def rank_jobs(llama: Path, pattern: Path) -> dict[str, Job]:
    """Jobs with one rank and with two, which read a pattern file."""
    settings = ALL_KEYS | {"method": {"name": "auto", "pattern_file": str(pattern)}, "recall_floor": 0.0}
    settings["row_recall_floor"] = 0.0
    given = {**OPTIONS, **NO_TOKENIZER}
    return {
        f"{ranks} ranks": Job(str(llama), OURS, {**given, "tensor_parallel_size": ranks}, [ask()], settings)
        for ranks in (1, 2)
    }


def jobs(folder: Path) -> dict[str, Job]:
    """All jobs; their models are made in the folder."""
    for make in (make_llama, make_qwen3_moe, make_granite_hybrid, make_qwen3_next, make_deepseek, make_blip2):
        make(folder / make.__name__.removeprefix("make_"))
    llama, head, adapter, pattern = (folder / name for name in ("llama", "head", "adapter", "pattern.json"))
    make_eagle_head(head, llama)
    make_adapter(adapter, llama)
    pattern.write_text(json.dumps(PATTERN))
    embed: list[Step] = [{"do": "embed", "prompts": PROMPTS}]
    pairs = {
        "embeddings": pair(llama, embed, runner="pooling", convert="embed", skip_tokenizer_init=False),
        "experts": pair(folder / "qwen3_moe", [ask()]),
        "state space": pair(folder / "granite_hybrid", [ask()], block_size=16),
        "linear attention": pair(folder / "qwen3_next", [ask()], block_size=16, dtype="bfloat16"),
        # On CPUs with AMX vLLM multiplies latent attention in no other type.
        "latent attention": pair(folder / "deepseek", [ask()], block_size=128, dtype="bfloat16"),
        "images": pair(folder / "blip2", [ask(SEEING)], skip_tokenizer_init=False),
    }
    named = plain_jobs(llama, head, adapter)
    for name, (ours, stock) in pairs.items():
        named |= {name: ours, f"{name} stock": stock}
    named |= rank_jobs(llama, pattern)
    # This job is last, because after its imports for n-grams vLLM cannot start another engine in the same process.
    return named | {"ngram": named.pop("ngram")}
