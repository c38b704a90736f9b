# SPDX-License-Identifier: Apache-2.0
"""vLLM takes every option that deploy/ and the pages about deployment give it, and each of them selects the plugin."""

import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.config import load_config
from tests.conftest import import_or_skip
from tests.deploy.manifests import DEPLOY, OVERLAYS, ROOT, Manifest, build, build_with, container_of, env_of, only, read

PAGES = (ROOT / "README.md", ROOT / "docs/quickstart.md")
SERVE, IMAGE = ["vllm", "serve"], "vllm-minference"
BACKEND = "minference"

Serve = Callable[..., Namespace]


@pytest.fixture(scope="module")
def parser() -> Any:
    """vLLM's own, of `vllm serve`."""
    import_or_skip("vllm")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    # vLLM takes the beginning of an option's name too, which another release may find ambiguous.
    ServeSubcommand().subparser_init(parser.add_subparsers()).allow_abbrev = False
    return parser


@pytest.fixture
def serve(parser: Any, capsys: pytest.CaptureFixture[str]) -> Serve:
    """What vLLM reads in the arguments of `vllm serve`."""

    def parse(*arguments: str) -> Namespace:
        try:
            return parser.parse_args(["serve", *arguments])
        except SystemExit:
            return pytest.fail(f"{shlex.join(arguments)}: {capsys.readouterr().err}")

    return parse


@pytest.mark.parametrize("option", ["--shut-down-timeout=1", "--shutdown-time=1"], ids=["unknown", "cut short"])
def test_an_option_that_vllm_does_not_know_is_seen(option: str, parser: Any) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "MODEL", option])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_kubernetes(overlay: Path, serve: Serve, tmp_path: Path) -> None:
    manifests = build(overlay)
    text = only(manifests, "ConfigMap")["data"]["serve.yaml"]
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    arguments = container_of(only(manifests, "Deployment"))["args"]
    arguments[arguments.index("--config") + 1] = str(path)
    options = serve(*arguments)
    assert options.attention_backend == BACKEND
    for key, value in read(text)[0].items():
        assert getattr(options, key.replace("-", "_")) == value
    assert options.disable_access_log_for_endpoints == "/health,/metrics"


def guide_deployment(name: str, role: str) -> Manifest:
    """A server as llm-d's guides have it, as far as the component looks at it."""
    container = {
        "name": "modelserver",
        "image": "vllm/vllm-openai:v0.23.0",
        "command": ["vllm", "serve"],
        "args": ["Qwen/Qwen3-0.6B", "--port=8000"],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {"llm-d.ai/role": role}},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }


@pytest.fixture
def pools(tmp_path: Path) -> dict[str, Manifest]:
    """What the component makes of a guide's Deployments, by name."""
    yaml = import_or_skip("yaml")
    roles = {"decode": "decode", "prefill-short": "prefill", "prefill-long": "prefill", "router": "router"}
    guide = [guide_deployment(name, role) for name, role in roles.items()]
    (tmp_path / "guide.yaml").write_text(yaml.safe_dump_all(guide))
    built = build_with(DEPLOY / "llm-d", [tmp_path / "guide.yaml"], tmp_path)
    return {manifest["metadata"]["name"]: manifest for manifest in built}


@pytest.mark.parametrize("pool", ["decode", "prefill-short", "prefill-long"])
def test_llm_d(pool: str, pools: dict[str, Manifest], serve: Serve) -> None:
    container = container_of(pools[pool])
    assert container["image"].startswith("registry.example.com/vllm-minference:")
    options = serve(*container["args"])
    assert options.attention_backend == BACKEND
    assert options.model_tag == "Qwen/Qwen3-0.6B"
    if pool.startswith("prefill"):
        assert options.max_num_batched_tokens == 16384
        assert pools[pool]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > options.shutdown_timeout


def test_llm_d_leaves_others_alone(pools: dict[str, Manifest]) -> None:
    assert container_of(pools["router"])["args"] == ["Qwen/Qwen3-0.6B", "--port=8000"]


def test_kserve(serve: Serve, tmp_path: Path) -> None:
    settings, service = read((DEPLOY / "kserve/llminferenceservice.yaml").read_text())
    template = service["spec"]["template"]
    (container,) = template["containers"]
    env = env_of(container)
    assert serve("/mnt/models", *shlex.split(env["VLLM_ADDITIONAL_ARGS"])).attention_backend == BACKEND
    folder, name = env["MINFERENCE_CONFIG"].rsplit("/", 1)
    (mount,), (volume,) = container["volumeMounts"], template["volumes"]
    assert (mount["mountPath"], mount["name"]) == (folder, volume["name"])
    assert volume["configMap"]["name"] == settings["metadata"]["name"]
    path = tmp_path / name
    path.write_text(settings["data"][name])
    load_config(None, {"MINFERENCE_CONFIG": str(path)})


@pytest.mark.parametrize("release", ["1.31", "1.37"])
def test_kserve_would_make_pods_that_kubernetes_takes(release: str) -> None:
    kubernetes_validate = import_or_skip("kubernetes_validate")
    service = read((DEPLOY / "kserve/llminferenceservice.yaml").read_text())[1]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": service["spec"]["template"]}
    kubernetes_validate.validate(pod, release, strict=True)


def test_production_stack(serve: Serve) -> None:
    (values,) = read((DEPLOY / "production-stack/values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    options = serve(model["modelURL"], *model["vllmConfig"]["extraArgs"])
    assert options.attention_backend == BACKEND
    load_config(options.additional_config, {})


def commands(page: Path) -> list[list[str]]:
    """The arguments of `vllm serve` in each command of a page's code blocks, be it run in the image or not."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if not line.startswith("    ") or "…" in line:
            continue
        words = shlex.split(line, comments=True)
        if "run" in words and IMAGE in words:
            found.append(words[words.index(IMAGE) + 1 :])
        elif SERVE in [words[i : i + 2] for i in range(len(words))]:
            found.append(words[words.index("serve") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_of_pages(page: Path, serve: Serve) -> None:
    found = commands(page)
    assert found
    for arguments in found:
        assert serve(*arguments).attention_backend == BACKEND, arguments
