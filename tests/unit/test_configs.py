# SPDX-License-Identifier: Apache-2.0
"""The examples in configs/ are what the plugin and vLLM take, and docs/configuration.md describes the settings.

`python -m tests.unit.test_configs` makes that document, two of the examples and the schemas.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.config import CONFIG_FILE_VARIABLE, MInferenceConfig, load_config
from minference_vllm.patterns import PatternFile
from tests.conftest import import_or_skip
from tests.unit.configuration_document import document

ROOT = Path(__file__).parents[2]
CONFIGS, DOCUMENT = ROOT / "configs", ROOT / "docs" / "configuration.md"
SETTINGS, SCHEMA = CONFIGS / "minference.json", CONFIGS / "minference.schema.json"
PATTERN_SCHEMA = CONFIGS / "pattern.schema.json"
SERVE = sorted((CONFIGS / "serve").glob("*.yaml"))


def made() -> dict[Path, str]:
    """The files that are made from the models of the settings."""
    contents = {
        SETTINGS: MInferenceConfig().model_dump(mode="json"),
        SCHEMA: MInferenceConfig.model_json_schema(),
        PATTERN_SCHEMA: PatternFile.model_json_schema(),
    }
    return {DOCUMENT: document()} | {path: json.dumps(content, indent=2) + "\n" for path, content in contents.items()}


@pytest.mark.parametrize("path", made(), ids=lambda path: path.name)
def test_what_is_made_from_the_settings_is_up_to_date(path: Path) -> None:
    assert path.read_text() == made()[path], "python -m tests.unit.test_configs writes it anew"


def test_the_file_of_settings_is_taken() -> None:
    assert load_config(None, {CONFIG_FILE_VARIABLE: str(SETTINGS)}) == MInferenceConfig()


def test_the_file_of_settings_fits_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(SETTINGS.read_text()), json.loads(SCHEMA.read_text()))


def test_the_schema_describes_every_setting() -> None:
    schema = json.loads(SCHEMA.read_text())
    for settings in (schema, *schema["$defs"].values()):
        assert all("description" in field for name, field in settings["properties"].items() if name != "name")


def test_every_variable_that_the_package_reads_is_described() -> None:
    sources = [*(ROOT / "minference_vllm").rglob("*.py"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"MINFERENCE_[A-Z_]*[A-Z]", path.read_text())}
    read -= {"MINFERENCE_SKIP_CUDA_BUILD"}  # of Microsoft's package, which published patterns come from
    assert read <= set(re.findall(r"`(MINFERENCE_\w+)`", DOCUMENT.read_text()))


@pytest.mark.parametrize("path", sorted((CONFIGS / "patterns").glob("*.json")), ids=lambda path: path.stem)
def test_every_pattern_file_fits_the_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(path.read_text()), json.loads(PATTERN_SCHEMA.read_text()))


def test_the_schema_of_pattern_files_refuses_what_the_reader_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(next((CONFIGS / "patterns").glob("*.json")).read_text())
    for head in ([0, 100], [1, 2, 3], ["stream_llm", 100, 800], [2**24 + 1, 1], "dense", [1.5, 2]):
        content["layers"][0][0] = head
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, json.loads(PATTERN_SCHEMA.read_text()))


# For vllm serve


@pytest.fixture(scope="module")
def parser() -> Any:
    """vLLM's parser of the engine's options, which `vllm serve` has all."""
    import_or_skip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from minference_vllm import plugin

    plugin.register()  # an option may name our backend
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.name)
def test_vllm_takes_every_option(path: Path, parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = import_or_skip("yaml")
    try:
        options = parser.parse_args(["--config", str(path)])
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    for key, value in yaml.safe_load(path.read_text()).items():
        parsed = getattr(options, key.replace("-", "_"))
        assert parsed == value or key == "attention-config"
    backends = {options.attention_backend, *options.attention_config.backend_per_kind.values()}
    assert backends & {"minference", plugin_backend()}


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.name)
def test_the_settings_for_the_plugin_are_taken(path: Path) -> None:
    yaml = import_or_skip("yaml")
    load_config(yaml.safe_load(path.read_text())["additional-config"], {})


def test_there_are_examples() -> None:
    assert {path.name for path in SERVE} == {"hybrid.yaml", "one-gpu.yaml", "two-gpus.yaml"}


def plugin_backend() -> Any:
    """vLLM's member for our backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.CUSTOM


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)
