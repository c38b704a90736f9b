# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm tune`: what it measures, what it decides from times, what it writes and what it refuses."""

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import cli
from minference_vllm.cli import status, tune
from minference_vllm.config import CONFIG_FILE_VARIABLE, MInferenceConfig, load_config
from minference_vllm.errors import ConfigError
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.tuning import gate, heads, timing
from minference_vllm.tuning.gate import Timing, crossover
from minference_vllm.tuning.heads import Heads

HEADS = ("--heads", "32", "--kv-heads", "8", "--head-dim", "128")
OWN_METHOD = {"name": "vertical_slash", "slash_size": 4000}


def timings(**speedups: float) -> list[Timing]:
    """timings(k4=0.9) is a prompt of 4096 tokens at which sparse takes longer."""
    return [Timing(1024 * int(name[1:]), speedup, 1.0) for name, speedup in speedups.items()]


# The crossover


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        pytest.param(timings(k4=0.5, k8=0.9, k16=1.1, k32=1.8), 16384, id="wins from one length on"),
        pytest.param(timings(k4=1.1, k8=0.9, k16=1.1, k32=1.8), 16384, id="an early win does not stay"),
        pytest.param(timings(k4=1.1, k8=1.2), 4096, id="always wins"),
        pytest.param(timings(k32=1.8, k16=1.1, k4=0.5), 16384, id="in any order"),
        pytest.param(timings(k4=0.9, k8=1.019, k16=1.02), 16384, id="2% counts, less does not"),
        pytest.param(timings(k4=0.5, k8=0.9), None, id="never wins"),
        pytest.param(timings(k4=1.5, k8=1.5, k16=1.0), None, id="loses at last"),
        pytest.param([], None, id="nothing measured"),
    ],
)
def test_the_crossover_is_where_sparse_stays_faster(measured: list[Timing], expected: int | None) -> None:
    assert crossover(measured) == expected


# The file


def test_the_gate_is_merged_into_the_settings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"method": OWN_METHOD, "min_seq_len": 7}))
    gate.write_gate(path, 16384)
    assert json.loads(path.read_text()) == {"method": OWN_METHOD, "min_seq_len": 16384}


def test_a_new_file_is_what_the_server_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "settings.json"
    gate.write_gate(path, 16384)
    assert load_config(None, {CONFIG_FILE_VARIABLE: str(path)}) == MInferenceConfig(min_seq_len=16384)


# Heads


def test_a_configuration_may_leave_out_what_is_as_usual() -> None:
    plain = SimpleNamespace(num_attention_heads=32, hidden_size=4096)
    assert heads.from_config(plain) == Heads(32, 32, 128)
    grouped = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, head_dim=64)
    assert heads.from_config(grouped) == Heads(32, 8, 64)
    nothing = SimpleNamespace(num_attention_heads=32, num_key_value_heads=None, hidden_size=2048, head_dim=None)
    assert heads.from_config(nothing) == Heads(32, 32, 64)


@pytest.mark.parametrize(("gpus", "expected"), [(1, (32, 8, 128)), (4, (8, 2, 128)), (16, (2, 1, 128))])
def test_heads_are_shared_between_gpus(gpus: int, expected: tuple[int, ...]) -> None:
    assert Heads(32, 8, 128).on_rank(gpus) == expected


@pytest.mark.parametrize(
    ("whole", "gpus", "fault"),
    [
        (Heads(14, 2, 64), 4, "14 query heads over 2 KV heads cannot be split over 4 GPUs"),
        (Heads(12, 6, 64), 4, "12 query heads over 6 KV heads cannot be split over 4 GPUs"),
        (Heads(10, 4, 64), 1, "10 query heads are no multiple of 4 KV heads"),
        (Heads(32, 8, 96), 1, "Heads of size 96 never run sparse; the kernels know 64, 128, 256"),
    ],
)
def test_heads_that_cannot_run_are_refused(whole: Heads, gpus: int, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        whole.on_rank(gpus)


def test_the_heads_of_a_model_are_read_from_its_directory(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "head_dim": 64}
    heads_of = {"num_attention_heads": 9, "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(config | heads_of))
    assert heads.of_model(str(tmp_path)) == Heads(9, 3, 64)


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        heads.of_model(str(tmp_path))


# The command


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Pretend to measure these speed-ups on a GPU; gives what `measure` was asked for."""

    def pretend(**speedups: float) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def measure(*arguments: Any) -> Iterator[Timing]:
            asked.append(arguments)
            return iter(timings(**speedups))

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
        monkeypatch.setattr(timing, "measure", measure)
        return asked

    return pretend


def test_the_console_script_is_the_function_tested_here() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"minference-vllm": f"{cli.__name__}:{cli.main.__name__}"}


def test_tune_writes_the_gate(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = gpu(k8=0.9, k16=1.1, k32=1.8)
    out = tmp_path / "settings.json"
    out.write_text(json.dumps({"method": OWN_METHOD}))
    options = ["--tensor-parallel-size", "2", "--chunk", "4096", "--kv-cache-dtype", "fp8", "--out", str(out)]
    assert cli.main(["tune", *HEADS, *options]) == 0
    assert json.loads(out.read_text()) == {"method": OWN_METHOD, "min_seq_len": 16384}
    ((layer, config, device, lengths, chunk, _, has_fp8_kv),) = asked
    assert (layer, device, chunk, has_fp8_kv) == (Heads(16, 4, 128), torch.device("cuda", 0), 4096, True)
    assert config.method == VerticalSlashSettings(slash_size=4000)
    assert lengths == tune.LENGTHS
    printed = capsys.readouterr().out
    assert "16384     1.100     1.000      1.10" in printed
    assert f"{CONFIG_FILE_VARIABLE}={out} vllm serve" in printed


def test_tune_writes_nothing_where_sparse_never_wins(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(k8=0.9, k16=1.0)
    out = tmp_path / "settings.json"
    assert cli.main(["tune", *HEADS, "--out", str(out)]) == tune.NEVER_WINS == 3
    assert not out.exists()
    assert "At 16384 tokens sparse is not 1.02 times as fast as dense" in capsys.readouterr().out


def test_the_file_is_the_one_that_the_server_would_read(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(k16=1.1)
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(tmp_path / "named.json"))
    assert cli.main(["tune", *HEADS]) == 0
    assert (tmp_path / "named.json").exists()
    monkeypatch.delenv(CONFIG_FILE_VARIABLE)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", *HEADS]) == 0
    assert (tmp_path / "minference.json").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr that ends `tune`."""
    assert cli.main(["tune", *arguments]) == status.FAILED == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *HEADS).endswith("this machine has none.")


@pytest.mark.parametrize(
    "arguments", [(), ("--heads", "32"), ("--model", "a/b", "--heads", "32"), ("--model", "a/b", *HEADS)]
)
def test_tune_needs_a_model_or_its_heads(
    gpu: Any, arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu()
    message = refused(capsys, *arguments, "--out", str(tmp_path / "settings.json"))
    assert message == "Give --model, or --heads, --kv-heads and --head-dim."


def test_a_file_that_no_server_would_read_is_refused_before_measuring(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = gpu(k16=1.1)
    out = tmp_path / "settings.json"
    out.write_text('{"min_chunk": -3}')
    assert "minference.min_chunk=-3" in refused(capsys, *HEADS, "--out", str(out))
    assert asked == []


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_count_is_a_whole_number_above_0(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["tune", *HEADS, "--chunk", value])
    assert ended.value.code == 2
    assert f"--chunk: {value!r} is no whole number from 1 to 16777216" in capsys.readouterr().err
