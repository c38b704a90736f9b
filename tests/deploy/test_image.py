# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile: what a linter finds in it, whom the image runs as, and what its health check says."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import minference_vllm
from tests.conftest import ON_CI
from tests.contract.wheel import VERSION as VLLM_VERSION
from tests.deploy.manifests import DEPLOY, OVERLAYS, ROOT, build, container_of, only, read

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE_TAG = f"{minference_vllm.__version__}-vllm{VLLM_VERSION}"


def instructions(name: str) -> list[str]:
    """What follows an instruction, each time it comes, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return [line.removeprefix(f"{name} ") for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_hadolint_finds_nothing() -> None:
    installed = Path(sys.executable).with_name("hadolint")
    hadolint = str(installed) if installed.exists() else shutil.which("hadolint")
    if not hadolint:
        missing = "hadolint is not installed; the extra [dev] brings it"
        pytest.fail(missing) if ON_CI else pytest.skip(missing)
    done = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_names_the_versions_that_are_tested() -> None:
    arguments = dict(argument.split("=") for argument in instructions("ARG") if "=" in argument)
    assert arguments["VLLM_VERSION"] == VLLM_VERSION
    assert arguments["VERSION"] == minference_vllm.__version__
    assert instructions("FROM")[-1] == "vllm/vllm-openai:v${VLLM_VERSION}"


def test_every_manifest_names_that_image() -> None:
    llm_d = read((DEPLOY / "llm-d/kustomization.yaml").read_text())[0]["patches"][0]["patch"]
    service = read((DEPLOY / "kserve/llminferenceservice.yaml").read_text())[1]
    model = read((DEPLOY / "production-stack/values.yaml").read_text())[0]["servingEngineSpec"]["modelSpec"][0]
    images = {
        *(container_of(only(build(overlay), "Deployment"))["image"] for overlay in OVERLAYS),
        next(change["value"] for change in read(llm_d)[0] if change["path"].endswith("/image")),
        service["spec"]["template"]["containers"][0]["image"],
        f"{model['repository']}:{model['tag']}",
    }
    assert images == {f"registry.example.com/vllm-minference:{IMAGE_TAG}"}


def test_manifests_run_it_as_its_own_user() -> None:
    (user,) = instructions("USER")
    pods = [only(build(overlay), "Deployment")["spec"]["template"]["spec"]["securityContext"] for overlay in OVERLAYS]
    values = read((DEPLOY / "production-stack/values.yaml").read_text())[0]
    for context in (*pods, values["servingEngineSpec"]["securityContext"]):
        assert str(context["runAsUser"]) == user.split(":")[0]


def test_manifests_mount_its_home() -> None:
    home = re.search(r"HOME=(\S+)", DOCKERFILE)
    assert home
    for overlay in OVERLAYS:
        mounts = container_of(only(build(overlay), "Deployment"))["volumeMounts"]
        assert home[1] in [mount["mountPath"] for mount in mounts]


def test_the_build_context_is_what_the_wheel_is_made_of() -> None:
    """The sources of setup.py and pyproject.toml; a file more would make the image from other things than a release."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    metadata = {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in"}
    assert allowed == metadata | {"minference_vllm", "csrc"}
    assert all((ROOT / name).exists() for name in allowed)


@pytest.fixture
def port() -> Iterator[int]:
    """A server whose /health says 200, then 503."""
    answers = iter([200, 503])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(next(answers) if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_the_health_check_says_what_the_server_says(port: int) -> None:
    _, *arguments = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])
    assert arguments[1].count("8000") == 1
    check = [sys.executable, *(argument.replace("8000", str(port)) for argument in arguments)]
    statuses = [subprocess.run(check, capture_output=True).returncode for _ in range(2)]
    assert statuses == [0, 1]


def test_the_health_check_fails_where_nothing_listens() -> None:
    _, *arguments = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])
    nobody = [argument.replace("8000", "1") for argument in arguments]
    assert subprocess.run([sys.executable, *nobody], capture_output=True).returncode == 1
