# SPDX-License-Identifier: Apache-2.0
"""More than plain decoders, on vLLM's real engine for the CPU: with every key kept, models answer as they always do."""

import json
from pathlib import Path

import pytest

from demo.server import environment, excerpt
from tests.serving import tiny_models
from tests.serving.forked import run_program
from tests.serving.server import ON_GPU
from tests.serving.tiny_models import CHUNK, Outcome, gemma3_prompts, whisper_prompts

pytestmark = [pytest.mark.serving, pytest.mark.skipif(ON_GPU, reason="compares with vLLM's CPU backend")]

TIMEOUT_S = 560
SPARSE, SHORT, BELOW = "sparse gate_open", "dense short_chunk", "dense below_min_seq_len"
ROUNDING = 1e-4  # in float32 the logprobs of two kernels differ by less
ROUNDING_TO_FP8 = 0.1  # vLLM's CPU kernels truncate; ours, and GPUs, round to nearest

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes(logs: Path) -> Outcomes:
    """What came of every job of tiny_models, by its name."""
    folder, log = logs / "models", logs / "models.log"
    folder.mkdir()
    # Engines run one after another in the program's process, and nothing is compiled.
    environ = {**environment(str(folder)), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    assert run_program(tiny_models.__name__, folder, log, environ, TIMEOUT_S) == 0, excerpt(log)
    return {name: Outcome(**fields) for name, fields in json.loads((folder / "outcomes.json").read_text()).items()}


def served(outcome: Outcome) -> Outcome:
    assert outcome.error is None
    return outcome


def assert_same_answers(ours: Outcome, stock: Outcome, rounding: float = ROUNDING) -> None:
    assert served(ours).tokens == served(stock).tokens
    for logprobs, expected in zip(ours.logprobs, stock.logprobs, strict=True):
        assert logprobs == pytest.approx(expected, abs=rounding)


def said_of_layers(outcome: Outcome) -> list[str]:
    return [message for message in outcome.log if "attention layers may run sparse" in message]


def test_an_encoder_decoder_model_hears_its_recordings_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    # vLLM derives cross attention from our classes, and fills its cache in a forward of its own.
    ours, stock = outcomes["whisper"], outcomes["whisper stock"]
    assert_same_answers(ours, stock)
    one, another, _ = stock.logprobs
    assert one != pytest.approx(another, abs=0.1)


def test_only_the_self_attention_of_a_decoder_runs_sparse(outcomes: Outcomes) -> None:
    ours = served(outcomes["whisper"])
    assert said_of_layers(ours) == [
        "MInference: 2 of 4 attention layers may run sparse; 2 always run dense (not_decoder 2)."
    ]
    one, another, third = (len(prompt["decoder_prompt"]["prompt_token_ids"]) for prompt in whisper_prompts())
    assert ours.counted == {SPARSE: one + another, BELOW: third}


def test_a_model_of_local_and_global_layers_answers_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    assert_same_answers(outcomes["gemma3"], outcomes["gemma3 stock"])


def test_only_global_layers_run_sparse_and_the_log_says_so_once(outcomes: Outcomes) -> None:
    ours = served(outcomes["gemma3"])
    assert said_of_layers(ours) == [
        "MInference: 1 of 6 attention layers may run sparse; 5 always run dense (sliding_window 5)."
    ]
    # vLLM keeps the cache of such a model in several groups, each of which plans the step.
    lengths = [len(prompt["prompt_token_ids"]) for prompt in gemma3_prompts()]
    assert sum(ours.counted.values()) == sum(lengths)
    assert ours.counted.keys() <= {SPARSE, SHORT, BELOW}
    assert ours.counted[SPARSE] > 2 * CHUNK


def test_a_cache_in_fp8_answers_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    ours, stock = outcomes["gemma3, fp8 cache"], outcomes["gemma3, fp8 cache, stock"]
    if stock.error is not None:
        pytest.skip(f"vLLM serves none on this machine: {stock.error}")
    assert_same_answers(ours, stock, ROUNDING_TO_FP8)
    assert_same_answers(ours, outcomes["gemma3 kept dense, fp8 cache"])
    assert said_of_layers(ours) == [
        "MInference: 1 of 6 attention layers may run sparse; 5 always run dense (sliding_window 5)."
    ]
    assert ours.counted == outcomes["gemma3"].counted


def test_a_cache_quantized_otherwise_is_left_to_the_stock_kernels(outcomes: Outcomes) -> None:
    ours, stock = outcomes["gemma3, fp8_e5m2 cache"], outcomes["gemma3, fp8_e5m2 cache, stock"]
    if stock.error is not None:
        pytest.skip(f"vLLM serves none on this machine: {stock.error}")
    assert_same_answers(ours, stock)
    assert said_of_layers(ours) == [
        "MInference: 0 of 6 attention layers may run sparse; 6 always run dense "
        "(sliding_window 5, quantized_kv_cache 1)."
    ]
    assert not any(label.startswith("sparse") for label in ours.counted)


@pytest.mark.parametrize("job", ["gemma3, bfloat16 cache", "gemma3 kept dense, bfloat16 cache"])
def test_a_cache_of_another_type_is_refused_at_the_start(job: str, outcomes: Outcomes) -> None:
    # vLLM's CPU kernels would take its pages for float32.
    sentence = "ConfigError: On a CPU a model in torch.float32 cannot be served with a KV cache of 'bfloat16'"
    assert outcomes[job].error is not None
    assert outcomes[job].error.startswith(sentence)
    assert outcomes[job].counted == {}


def test_a_model_with_learned_sinks_answers_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    ours = outcomes["gpt-oss"]
    assert_same_answers(ours, outcomes["gpt-oss stock"])
    assert said_of_layers(ours) == [
        "MInference: 2 of 4 attention layers may run sparse; 2 always run dense (sliding_window 2)."
    ]
    assert ours.counted == outcomes["gemma3"].counted


def test_a_hybrid_model_with_pages_of_800_tokens_answers_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    ours = outcomes["lfm2"]
    assert_same_answers(ours, outcomes["lfm2 stock"])
    assert any("Setting attention block size to 800 tokens" in message for message in ours.log)
    assert said_of_layers(ours) == ["MInference: 2 of 2 attention layers may run sparse."]
    assert ours.counted == outcomes["gemma3"].counted


def test_an_encoder_runs_dense_and_makes_the_same_of_its_prompts_as_with_the_stock_backend(outcomes: Outcomes) -> None:
    # Its attention is not causal, and its prompts pass the gate.
    ours, stock = served(outcomes["modernbert"]), served(outcomes["modernbert stock"])
    for vector, expected in zip(ours.vectors, stock.vectors, strict=True):
        assert vector == pytest.approx(expected, abs=ROUNDING)
    assert said_of_layers(ours) == [
        "MInference: 0 of 4 attention layers may run sparse; 4 always run dense (not_decoder 4)."
    ]
    lengths = [len(prompt["prompt_token_ids"]) for prompt in gemma3_prompts()]
    assert ours.counted == {"dense not_decoder": sum(lengths)}
