# SPDX-License-Identifier: Apache-2.0
"""The lists that MInference's release holds, and the models that they are for: the shipped files are made from them.

MINFERENCE_SKIP_CUDA_BUILD=TRUE pip download --no-binary :all: --no-deps --no-build-isolation minference==0.1.6.0
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from minference_vllm.errors import ConfigError
from minference_vllm.files import read_file
from minference_vllm.patterns.file import Geometry, PatternFile, Provenance
from minference_vllm.patterns.importer import import_list

RELEASE = "minference==0.1.6.0"
FOLDER = "minference/configs"
NAMES = "model2path.py"
LICENCE = "MIT, Copyright (c) Microsoft Corporation"

# By the beginning of a list's name, before the words that all names share: layers, query heads, KV heads and head size.
# They come from the models' config.json, because a list tells no more than layers and query heads.
GEOMETRIES = {
    "GLM_4_9B_1M_instruct": (40, 32, 4, 128),
    "Llama_3.1_70B_Instruct_128k": (80, 64, 8, 128),
    "Llama_3.1_8B_Instruct_128k": (32, 32, 8, 128),
    "Llama_3_70B_Instruct_262k": (80, 64, 8, 128),
    "Llama_3_8B_Instruct_262k": (32, 32, 8, 128),
    "Phi_3_mini_128k_instruct": (32, 32, 32, 96),
    "Qwen2.5_14B_Instruct_1M": (48, 40, 8, 128),
    "Qwen2.5_32B_Instruct_128k": (64, 40, 8, 128),
    "Qwen2.5_72B_Instruct_128k": (80, 64, 8, 128),
    "Qwen2.5_7B_Instruct_128k_instruct": (28, 28, 4, 128),
    "Qwen2.5_7B_Instruct_1M": (28, 28, 4, 128),
    "Qwen2_7B_Instruct_128k_instruct": (28, 28, 4, 128),
    "Yi_9B_200k": (48, 32, 4, 128),
}


def published(sdist: Path) -> Iterator[tuple[str, PatternFile]]:
    """Each list of the unpacked release as a pattern file, with the file's name.

    Raises:
        ConfigError: it is no such release.
    """
    models = _models(sdist / FOLDER / NAMES)
    lists = sorted((sdist / FOLDER).glob("*.json"))
    if missing := models.keys() - {path.name for path in lists}:
        raise ConfigError(f"{sdist / FOLDER} lacks {min(missing)}: it must be that of {RELEASE}, unpacked.")
    for path in lists:
        stem = path.stem.replace("_kv_out_v32_fit_o_best_pattern", "")
        known = GEOMETRIES.get(stem.removesuffix("_v2"))
        if known is None:
            raise ConfigError(f"{path} is no list of {RELEASE}; those are {', '.join(GEOMETRIES)}.")
        geometry = Geometry(num_layers=known[0], num_qo_heads=known[1], num_kv_heads=known[2], head_dim=known[3])
        source = Provenance(source=RELEASE, file=f"{FOLDER}/{path.name}", licence=LICENCE)
        content = read_file(path, str(path))
        name = stem.lower().replace("_", "-") + ".json"
        yield name, import_list(content, str(path), geometry, models.get(path.name, []), source)


def _models(path: Path) -> dict[str, list[str]]:
    """Names of models by their list, from the assignment in MInference's module, which is read and not run."""
    models: dict[str, list[str]] = {}
    try:
        # The path is given because Python would otherwise search for a file named "<unknown>" to show lines of it in
        # errors.
        tree = ast.parse(read_file(path, str(path)), str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read as Python: {error}.") from None
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for model, where in zip(table.keys, table.values, strict=True):
            file = where.args[-1] if isinstance(where, ast.Call) and where.args else None
            name, listed = _text_of(model), _text_of(file)
            if name is not None and listed is not None:
                models.setdefault(listed, []).append(name)
    if not models:
        raise ConfigError(f"{path} names no models: it must be that of {RELEASE}.")
    return models


def _text_of(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
