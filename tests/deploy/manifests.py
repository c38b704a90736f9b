# SPDX-License-Identifier: Apache-2.0
"""What deploy/ holds, as a cluster gets it."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ON_CI, import_or_skip

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in KUBERNETES.glob("components/*/kustomization.yaml"))

Manifest = dict[str, Any]


def read(text: str) -> list[Manifest]:
    """The documents of a YAML text."""
    yaml = import_or_skip("yaml")
    return [document for document in yaml.safe_load_all(text) if document]


def build(folder: Path) -> list[Manifest]:
    """The manifests that a kustomization makes."""
    built = subprocess.run([*_kustomize(), str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return read(built.stdout)


def build_with(component: Path, resources: list[Path], folder: Path) -> list[Manifest]:
    """The manifests that resources make with a component. `folder` is an empty one for the kustomization."""
    yaml = import_or_skip("yaml")
    paths = {
        "resources": [os.path.relpath(path, folder) for path in resources],
        "components": [os.path.relpath(component, folder)],
    }
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **paths}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(folder)


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The one manifest of this kind."""
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def container_of(manifest: Manifest) -> Manifest:
    """The one container of a Deployment."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return container


def env_of(container: Manifest) -> dict[str, str]:
    """The environment variables that a container is given, those from elsewhere left out."""
    return {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}


def _kustomize() -> list[str]:
    for program, command in (("kustomize", "build"), ("kubectl", "kustomize")):
        if path := shutil.which(program):
            return [path, command]
    missing = "overlays are built by kustomize or kubectl, and neither is in PATH"
    if ON_CI:
        pytest.fail(missing)
    pytest.skip(missing)
