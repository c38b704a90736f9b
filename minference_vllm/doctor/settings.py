# SPDX-License-Identifier: Apache-2.0
"""The settings as a server would resolve them, and what follows from them for a model and a server's limits."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minference_vllm import compat, plugin
from minference_vllm.budget import Budget, gate_obstacle, sharing_obstacle
from minference_vllm.compat import engines
from minference_vllm.compat import limits as server_limits
from minference_vllm.config import CONFIG_FILE_VARIABLE, CONFIG_KEY, MInferenceConfig, load_config, misplaced
from minference_vllm.doctor.check import NO_GPU, Check, failed, ok, on_one_line, skipped, warning
from minference_vllm.doctor.model import NONE, OTHER, SPARSE, describe_layers
from minference_vllm.errors import ConfigError
from minference_vllm.ops import choose_kernel
from minference_vllm.patterns import resolve


@dataclass(frozen=True, slots=True)
class Limits:
    """Options of `vllm serve`, under vLLM's names; None stands for vLLM's own default."""

    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: int | None = None


def check_settings(
    environ: Mapping[str, str],
    model: str | None,
    limits: Limits,
    device: torch.device | None,
    additional_config: Mapping[str, Any] | None = None,
) -> Iterator[Check]:
    """The settings, the kernels that they choose here, and whether the gate can open; for a model, its layers too.

    `device` is None where no GPU is expected.
    """
    try:
        config = load_config(additional_config, environ)
    except ConfigError as error:
        yield failed("settings", on_one_line(error), "Correct it; docs/configuration.md has all settings")
        for name in ("kernel", "model", "method", "layers", "gate"):
            yield skipped(name, "the settings are refused")
        return
    source = environ.get(CONFIG_FILE_VARIABLE)
    where = f"{CONFIG_FILE_VARIABLE}={source}" if source else f"defaults, since {CONFIG_FILE_VARIABLE} is not set"
    if CONFIG_KEY in (additional_config or {}):
        where = f"--additional-config over {where}"
    facts = {"settings": config.model_dump(mode="json")}
    if wrong := misplaced(additional_config):
        yield warning("settings", wrong, f"Until then a server runs with {where}", **facts)
    else:
        yield ok("settings", f"{where}: {config}", **facts)
    yield skipped("kernel", NO_GPU) if device is None else _check_kernel(config, device)
    if model is None:
        yield skipped("model", "none given: --model NAME_OR_DIR")
        yield skipped("method", "no model given")
        yield skipped("layers", "no model given")
        tokens = limits.max_num_batched_tokens or math.inf
        yield _check_gate(config, (limits.max_model_len or math.inf) - 1, Budget(tokens, tokens))
    else:
        yield from _check_model(config, model, limits)


def _check_kernel(config: MInferenceConfig, device: torch.device) -> Check:
    try:
        kernel = choose_kernel(config.kernel, device)
    except ConfigError as error:
        return failed("kernel", on_one_line(error), "Set minference.kernel to what it names")
    return ok("kernel", f"minference.kernel={config.kernel!r} is {kernel} here")


def _check_model(config: MInferenceConfig, model: str, limits: Limits) -> Iterator[Check]:
    try:
        engine = engines.engine_config(model, attention_backend=plugin.NAME, **asdict(limits))
    except Exception as error:  # vLLM has no common exception for what it refuses
        yield failed("model", f"vLLM refuses {model!r}: {on_one_line(error)}", "Correct what vLLM names")
        yield skipped("method", "vLLM refuses the model")
        yield skipped("layers", "vLLM refuses the model")
        yield skipped("gate", "vLLM refuses the model")
        return
    parallel = engine.parallel_config
    qo_heads = engine.model_config.get_num_attention_heads(parallel)
    kv_heads, head_dim = engine.model_config.get_num_kv_heads(parallel), engine.model_config.get_head_size()
    gpus = parallel.tensor_parallel_size
    heads = f"{qo_heads} query heads over {kv_heads} KV heads of {head_dim}{f' on each of {gpus} GPUs' * (gpus > 1)}"
    yield ok(
        "model", f"{model}: {heads}", num_qo_heads=qo_heads, num_kv_heads=kv_heads, head_dim=head_dim,
        tensor_parallel_size=gpus,
    )  # fmt: skip
    try:
        resolved = resolve(config.method, compat.served_model(engine, rank=0))
    except ConfigError as error:
        yield failed("method", on_one_line(error), "Correct minference.method; docs/methods.md explains pattern files")
        yield skipped("layers", "the method is refused")
    else:
        yield ok("method", resolved.why or f"the method is {config.method.name}")
        dense = frozenset(range(config.dense_layers)) | resolved.dense_layers
        yield _check_layers(describe_layers(engine, dense))
    yield _check_gate(config, server_limits.longest_prompt(engine), server_limits.budget(engine))


def _check_layers(layers: list[str]) -> Check:
    attending = [layer for layer in layers if layer != NONE]
    dense = Counter(layer for layer in attending if layer not in (SPARSE, OTHER))
    parts = [f"{layers.count(SPARSE)} of {len(attending)} attention layers may run sparse"]
    if dense:
        parts.append(f"always dense: {', '.join(f'{reason} {count}' for reason, count in dense.most_common())}")
    if other := layers.count(OTHER):
        parts.append(f"of another backend by the model's own choice: {other}")
    found = "; ".join(parts)
    if SPARSE in layers:
        return ok("layers", found, layers=layers)
    return failed("layers", found, "Serve it without the plugin, or change what the reasons name", layers=layers)


def _check_gate(config: MInferenceConfig, max_prompt: float, budget: Budget) -> Check:
    remedy = "Lower the setting, or raise the server's limit"
    if obstacle := gate_obstacle(config, max_prompt, budget):
        return failed("gate", f"it can never open: {obstacle}", remedy)
    if math.inf in (max_prompt, budget.tokens):
        return skipped("gate", "give --model, or --max-model-len and --max-num-batched-tokens")
    if obstacle := sharing_obstacle(config, budget):
        return warning("gate", f"it hardly opens beside other requests: {obstacle}", remedy)
    found = f"it opens from {config.min_seq_len} tokens on, in chunks of {config.min_chunk} and more"
    longest_chunk, _ = budget.alone
    facts = {"longest_prompt": max_prompt, "longest_chunk": longest_chunk}
    return ok("gate", f"{found}; a prompt has up to {max_prompt}, and gets up to {longest_chunk} a step", **facts)
