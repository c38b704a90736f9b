# SPDX-License-Identifier: Apache-2.0
"""Whether the doctor sees that vLLM does not load the plugin, or knows another backend by its name."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import plugin
from minference_vllm.doctor import registration
from minference_vllm.doctor.check import Check, Status


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that vLLM finds these entry points, and that this is selected after the plugins have said this."""

    def pretend(path: str | None = plugin.CPU_BACKEND, says: str = "", is_installed: bool = True) -> None:
        entry = EntryPoint(registration.ENTRY, registration.TARGET, registration.GROUP)
        monkeypatch.setattr(registration, "entry_points", lambda **_: [entry] * is_installed)
        monkeypatch.setattr(plugin, "load_plugins", lambda: says and plugin.logger.warning(says))
        monkeypatch.setattr(plugin, "selected_path", lambda: path)
        monkeypatch.setattr(registration.pkgutil, "resolve_name", lambda _: object)

    return pretend


def found_of_plugin(**environ: str) -> tuple[Check, Check]:
    plugin_, backend = registration.check_registration(environ)
    return plugin_, backend


def test_the_entry_point_that_is_looked_for_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registration.GROUP] == {registration.ENTRY: registration.TARGET}


def test_a_plugin_that_vllm_loads_is_as_it_should_be(vllm: Any) -> None:
    vllm()
    assert [check.status for check in found_of_plugin(VLLM_PLUGINS="other,minference")] == [Status.OK] * 2


def test_a_plugin_that_vllm_does_not_load_is_a_fault(vllm: Any) -> None:
    vllm(is_installed=False)
    plugin_, backend = found_of_plugin()
    assert (plugin_.status, backend.status) == (Status.FAILED, Status.SKIPPED)
    vllm()
    plugin_, backend = found_of_plugin(VLLM_PLUGINS="other")
    assert (plugin_.status, backend.status) == (Status.FAILED, Status.SKIPPED)
    assert plugin_.what == "VLLM_PLUGINS=other leaves it out"


@pytest.mark.parametrize(
    ("path", "says", "what"),
    [
        ("other.Backend", "", "other.Backend has taken the name"),
        (None, "MInference could not register", "MInference could not register"),
        (None, "", "vLLM does not know the name"),
        (plugin.CPU_BACKEND, "MInference is registered, but no", "MInference is registered, but no"),
    ],
)
def test_what_the_name_means_otherwise_is_a_fault(path: str | None, says: str, what: str, vllm: Any) -> None:
    vllm(path, says)
    _, backend = found_of_plugin()
    assert (backend.status, backend.what) == (Status.FAILED, what)


def test_a_backend_that_cannot_be_imported_is_a_fault(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm()
    monkeypatch.setattr(registration.pkgutil, "resolve_name", lambda _: 1 / 0)
    _, backend = found_of_plugin()
    assert (backend.status, backend.what) == (
        Status.FAILED,
        f"{plugin.CPU_BACKEND} cannot be imported: division by zero",
    )
