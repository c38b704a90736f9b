# SPDX-License-Identifier: Apache-2.0
"""docs/compatibility.md says of every serving feature what its prompts run as, and by what that is known."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
ROW = re.compile(r"^\| (.+?) \| (sparse|dense|refused) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")
RESULT = re.compile(r"`([\w-]+\.json)`")

FEATURES = """
FP8 KV cache; Tensor parallel; Pattern files under tensor parallel; Pipeline parallel; Data parallel; Several
API servers; Experts (MoE); Expert parallel; Sliding windows beside global layers (Gemma 3); Learned sinks
(gpt-oss); Mamba layers beside attention; Linear attention beside attention; Drafts by n-gram; Draft models;
EAGLE; LoRA; Structured outputs; `prompt_logprobs`; `n` > 1; Beam search; Priority scheduling; Preemption;
Pause and go on; Sleep and wake, levels 1 and 2; KV offloading; NIXL connector; Prefix caching; Approximate
pages told from others; Chunks of 1K to 32K tokens; Several sparse chunks in a step; CUDA graphs;
torch.compile; Asynchronous scheduling; V1 and V2 runners; Latent attention (MLA); Decoders that see images;
Embeddings and pooling of causal models; A million tokens on two GPUs
"""


class Row(NamedTuple):
    feature: str
    path: str
    note: str
    evidence: str


def rows() -> list[Row]:
    section = DOCUMENT.read_text().split("## Serving features\n")[1].split("\n## ")[0]
    return [Row(*found.groups()) for found in ROW.finditer(section)]


@functools.cache
def defined_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_feature_has_one_row() -> None:
    named = [feature.strip() for feature in FEATURES.replace("\n", " ").split(";")]
    assert [row.feature for row in rows()] == named


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.feature)
def test_what_a_row_names_exists(row: Row) -> None:
    tests, results = TEST.findall(row.evidence), RESULT.findall(row.evidence)
    assert tests or results or "not run" in row.evidence
    for name, test in tests:
        path = ROOT / (name if "/" in name else f"tests/serving/{name}")
        assert test in defined_in(path)
    for name in results:
        assert (ROOT / "benchmarks" / "results" / name).is_file()


def test_every_test_of_a_serving_feature_is_named() -> None:
    evidence = " ".join(row.evidence for row in rows())
    for name in ("test_features.py", "test_gpu_features.py", "test_api_servers.py"):
        tests = {test for test in defined_in(ROOT / "tests/serving" / name) if test.startswith("test_")}
        assert tests - {test for file, test in TEST.findall(evidence) if file == name} == set()
