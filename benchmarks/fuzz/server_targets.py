# SPDX-License-Identifier: Apache-2.0
"""What a server reads: settings and pattern files; and what pattern files are made from."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as some

from benchmarks.fuzz.target import Target, Trial
from benchmarks.fuzz.values import documents, mutated, settings_of, spoilt, values
from minference_vllm.config import CONFIG_FILE_VARIABLE, SETTINGS, MInferenceConfig, load_config
from minference_vllm.patterns import AutoSettings, Geometry, ServedModel, read_pattern, resolve
from minference_vllm.patterns.file import Provenance
from minference_vllm.patterns.importer import import_list, write
from minference_vllm.patterns.published import FOLDER, GEOMETRIES, NAMES, published

NAMES_OF_SETTINGS = (*MInferenceConfig.model_fields, *sorted({name for each in SETTINGS for name in each.model_fields}))
DEFAULTS = MInferenceConfig().model_dump(mode="json")
METHODS = [each().model_dump(mode="json") for each in SETTINGS]
GEOMETRY = Geometry(num_layers=2, num_qo_heads=3, num_kv_heads=1, head_dim=64)
MODEL = ServedModel(("org/model",), GEOMETRY)
PATTERN = {
    "version": 1,
    "models": ["org/model"],
    "geometry": GEOMETRY.model_dump(),
    "provenance": {"source": "a search", "sha256": "0" * 64, "notes": ["one"]},
    "method": {"name": "vertical_slash", "probe_rows": "last", "sink_tokens": 30, "local_tokens": 100},
    "layers": [[[1000, 6096], [30, 800], ["a_shape", 100, 800]], "dense"],
}
SHARES = {**PATTERN, "method": {"name": "block", "rows_per_half": 32}, "layers": [[0.5, 0.84, 1], "dense"]}
LIST = [
    {str(head): ["vertical_and_slash", 500, 700, 0.9] for head in range(GEOMETRY.num_qo_heads)},
    {"0": ["stream_llm", 100, 800, 1], "1": ["block_sparse", 8, 0, 1]},
]
LISTS = some.sampled_from((LIST, {"dual_chunk_attention_config": {"sparse_attention_config": LIST}}))
RELEASE = """
import os
MODEL2PATH = {
    "01-ai/Yi": os.path.join(BASE_DIR, "Yi_9B_200k_kv_out_v32_fit_o_best_pattern.json"),
}
"""
PYTHON = (
    '{"a": f()}',
    '{"a": f(*b)}',
    "{0x" + "f" * 4000 + ': f("a")}',
    '{None: f(b"a")}',
    "{**a}",
    "(" * 300,
    "-" * 50_000 + "1",
    "f" * 100_000,
    '{"' + "a" * 50_000 + '": f("b")}',
)


def inline(_: Path, case: Any) -> Trial:
    return lambda: load_config({"minference": case}, {}), ()


def settings_file(folder: Path, case: bytes) -> Trial:
    file = folder / "settings.json"
    file.write_bytes(case)
    return lambda: load_config(None, {CONFIG_FILE_VARIABLE: str(file)}), [file]


def method_file(folder: Path, case: str) -> Trial:
    """A pattern file, read through the setting that names it."""

    def act() -> object:
        config = load_config({"minference": {"method": {"name": "auto", "pattern_file": case}}}, {})
        return resolve(config.method, MODEL)

    return act, [Path(case)] if "\0" not in case else []


def pattern_file(folder: Path, case: bytes) -> Trial:
    file = folder / "pattern.json"
    file.write_bytes(case)

    def act() -> object:
        read_pattern(file)
        resolved = resolve(AutoSettings(pattern_file=str(file)), MODEL)
        return resolved.pattern and [resolved.pattern.budgets(0, GEOMETRY.num_qo_heads), resolved.settings]

    return act, [file]


def pattern_list(folder: Path, case: bytes) -> Trial:
    name = str(folder / "list.json")
    return lambda: write(import_list(case, name, GEOMETRY, ["org/model"], Provenance(source="x"))), ()


def release(folder: Path, case: bytes) -> Trial:
    configs = folder / FOLDER
    configs.mkdir(parents=True)
    (configs / NAMES).write_bytes(case)
    num_layers, num_heads, *_ = GEOMETRIES["Yi_9B_200k"]
    content = [{str(head): ["vertical_and_slash", 500, 700, 1] for head in range(num_heads)}] * num_layers
    (configs / "Yi_9B_200k_kv_out_v32_fit_o_best_pattern.json").write_text(json.dumps(content))
    return lambda: list(published(folder)), [folder]


python = some.sampled_from((RELEASE, *PYTHON)).flatmap(lambda text: spoilt(text.encode()))
objects = (
    settings_of(NAMES_OF_SETTINGS)
    | mutated(DEFAULTS)
    | some.sampled_from(METHODS).flatmap(lambda method: mutated({"method": method}))
)
TARGETS = (
    Target("settings of --additional-config", values | objects, inline),
    Target("settings file", documents(values | objects), settings_file),
    Target("pattern file", documents(mutated(PATTERN)), pattern_file),
    Target("pattern file of shares", documents(mutated(SHARES)), pattern_file),
    Target("list of patterns", documents(LISTS.flatmap(mutated)), pattern_list),
    Target("release of lists", python, release),
)
