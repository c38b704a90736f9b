# SPDX-License-Identifier: Apache-2.0
"""What the overlays in deploy/kubernetes make is taken by Kubernetes, holds together, and lets a long prompt finish."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest

from minference_vllm.config import CONFIG_FILE_VARIABLE, load_config
from tests.conftest import import_or_skip
from tests.deploy.manifests import (
    COMPONENTS,
    DEPLOY,
    KUBERNETES,
    OVERLAYS,
    Manifest,
    build,
    build_with,
    container_of,
    env_of,
    only,
    read,
)

# The oldest release in which all fields are known without a feature gate, and the newest that the schemas cover.
RELEASES = ("1.31", "1.37")
# Custom resources, whose schemas no Python package has: of a PodMonitor only what is tested here is known to be right.
WITHOUT_SCHEMA = {"PodMonitor"}
PODS_BY = {
    "Deployment": ("selector", "matchLabels"),
    "Service": ("selector",),
    "PodDisruptionBudget": ("selector", "matchLabels"),
    "NetworkPolicy": ("podSelector", "matchLabels"),
    "PodMonitor": ("selector", "matchLabels"),
}
# vLLM, Triton, torch and others write there; nothing else of the container can be written to.
WRITTEN = {"/var/lib/vllm", "/tmp", "/dev/shm"}
CACHES = ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")
TEARDOWN_S = 30


@pytest.fixture(scope="module", params=OVERLAYS, ids=lambda path: path.name)
def overlay(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def manifests(overlay: Path) -> list[Manifest]:
    return build(overlay)


@pytest.fixture(scope="module")
def deployment(manifests: list[Manifest]) -> Manifest:
    return only(manifests, "Deployment")["spec"]


@pytest.fixture(scope="module")
def options(manifests: list[Manifest]) -> Manifest:
    """What the ConfigMap's serve.yaml says."""
    return read(only(manifests, "ConfigMap")["data"]["serve.yaml"])[0]


def option(container: Manifest, name: str) -> int:
    """The number that a container gives vLLM as --name=number."""
    (argument,) = [argument for argument in container["args"] if argument.startswith(f"--{name}=")]
    return int(argument.partition("=")[2])


def test_there_are_overlays_and_components() -> None:
    assert [path.name for path in OVERLAYS] == ["one-gpu", "tensor-parallel-2"]
    assert [path.name for path in COMPONENTS] == ["monitoring", "openshift", "writable-root"]


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_takes_every_field(manifests: list[Manifest], release: str) -> None:
    kubernetes_validate = import_or_skip("kubernetes_validate")
    without_schema = set()
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, release, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            without_schema.add(manifest["kind"])
    assert without_schema == WITHOUT_SCHEMA


def test_a_field_that_kubernetes_does_not_know_is_seen(manifests: list[Manifest]) -> None:
    kubernetes_validate = import_or_skip("kubernetes_validate")
    wrong = json.loads(json.dumps(only(manifests, "Deployment")))
    container_of(wrong)["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


def test_all_is_about_the_pods_of_this_overlay(manifests: list[Manifest], deployment: Manifest, overlay: Path) -> None:
    labels = deployment["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == overlay.name
    for kind, path in PODS_BY.items():
        selector = only(manifests, kind)["spec"]
        for key in path:
            selector = selector[key]
        assert selector == labels, kind


def test_ports_are_named_as_the_container_names_them(manifests: list[Manifest], deployment: Manifest) -> None:
    container = container_of({"spec": deployment})
    (port,) = container["ports"]
    asked = {
        only(manifests, "Service")["spec"]["ports"][0]["targetPort"],
        only(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0]["port"],
        only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"],
        *(container[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "readiness", "liveness")),
    }
    assert asked == {port["name"]}


def test_the_pod_has_no_rights_that_it_does_not_need(deployment: Manifest) -> None:
    pod = deployment["template"]["spec"]
    container = container_of({"spec": deployment})["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"]
    assert container["readOnlyRootFilesystem"]
    assert not container["allowPrivilegeEscalation"]
    assert container["capabilities"] == {"drop": ["ALL"]}


def test_what_the_server_writes_to_is_mounted(deployment: Manifest) -> None:
    pod, container = deployment["template"]["spec"], container_of({"spec": deployment})
    mounts = container["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
    env = env_of(container)
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    assert writable == WRITTEN | {env[variable] for variable in CACHES}
    shm = next(mount["name"] for mount in mounts if mount["mountPath"] == "/dev/shm")
    assert next(volume for volume in pod["volumes"] if volume["name"] == shm)["emptyDir"]["medium"] == "Memory"


def test_what_the_server_reads_is_in_the_config_map(manifests: list[Manifest], deployment: Manifest) -> None:
    container = container_of({"spec": deployment})
    (folder,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount.get("readOnly")]
    named = {container["args"][container["args"].index("--config") + 1], env_of(container)[CONFIG_FILE_VARIABLE]}
    assert named == {f"{folder}/{name}" for name in only(manifests, "ConfigMap")["data"]}


def test_a_changed_setting_changes_the_name_that_the_pods_mount(
    manifests: list[Manifest], deployment: Manifest
) -> None:
    name = only(manifests, "ConfigMap")["metadata"]["name"]
    prefix, _, digest = name.rpartition("-")
    assert prefix == only(manifests, "Deployment")["metadata"]["name"]
    assert len(digest) == 10
    assert name in [volume.get("configMap", {}).get("name") for volume in deployment["template"]["spec"]["volumes"]]


def test_the_plugin_takes_its_settings_and_its_gate_can_open(
    manifests: list[Manifest], options: Manifest, tmp_path: Path
) -> None:
    path = tmp_path / "minference.json"
    path.write_text(only(manifests, "ConfigMap")["data"]["minference.json"])
    settings = load_config(options.get("additional-config"), {CONFIG_FILE_VARIABLE: str(path)})
    assert settings.min_seq_len <= options["max-model-len"]
    assert settings.min_chunk <= options["max-num-batched-tokens"]


def test_a_pattern_file_beside_an_overlay_is_mounted_where_the_page_names_it(overlay: Path, tmp_path: Path) -> None:
    """What docs/deployment.md says under "A pattern file of your own", done."""
    page = (DEPLOY.parent / "docs" / "deployment.md").read_text().partition("### A pattern file of your own")[2]
    settings = textwrap.dedent(page[page.index('    {"min_seq_len"') :].partition("\n\n")[0])
    files = textwrap.dedent(page[page.index("    files:") :].partition("\n\n")[0])
    copy = tmp_path / "kubernetes" / overlay.relative_to(KUBERNETES)
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    kustomization = (copy / "kustomization.yaml").read_text()
    listed = "    files:\n      - serve.yaml\n"
    assert listed in kustomization
    (copy / "kustomization.yaml").write_text(kustomization.replace(listed, textwrap.indent(files, "    ") + "\n"))
    (copy / "minference.json").write_text(settings)
    (copy / "pattern.json").write_text("the file")
    manifests = build(copy)
    assert only(manifests, "ConfigMap")["data"]["pattern.json"] == "the file"
    method = load_config(None, {CONFIG_FILE_VARIABLE: str(copy / "minference.json")}).method
    mounts = container_of(only(manifests, "Deployment"))["volumeMounts"]
    (folder,) = [mount["mountPath"] for mount in mounts if mount["name"] == "settings"]
    assert (method.name, method.pattern_file) == ("auto", f"{folder}/pattern.json")


def test_there_are_as_many_gpus_as_the_model_is_split_over(deployment: Manifest, options: Manifest) -> None:
    gpus = container_of({"spec": deployment})["resources"]["limits"]["nvidia.com/gpu"]
    assert int(gpus) == options.get("tensor-parallel-size", 1)


def test_a_prompt_that_is_being_read_may_finish(deployment: Manifest) -> None:
    pod, container = deployment["template"]["spec"], container_of({"spec": deployment})
    _, wait = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(wait) + option(container, "shutdown-timeout") + TEARDOWN_S
    assert pod["terminationGracePeriodSeconds"] >= needed


def test_a_rollout_is_not_given_up_while_a_pod_ends_or_a_model_loads(deployment: Manifest) -> None:
    startup = container_of({"spec": deployment})["startupProbe"]
    loading = startup["periodSeconds"] * startup["failureThreshold"]
    ending = deployment["template"]["spec"]["terminationGracePeriodSeconds"]
    assert deployment["progressDeadlineSeconds"] > ending + loading


def test_a_disruption_takes_one_server_at_a_time(manifests: list[Manifest], deployment: Manifest) -> None:
    assert only(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_replicas_can_share_the_model_cache(manifests: list[Manifest], deployment: Manifest) -> None:
    (mode,) = only(manifests, "PersistentVolumeClaim")["spec"]["accessModes"]
    assert mode == ("ReadWriteMany" if deployment["replicas"] > 1 else "ReadWriteOnce")


# Components that some clusters need


def component(name: str) -> Path:
    return next(path for path in COMPONENTS if path.name == name)


def test_on_openshift_the_cluster_says_who_runs_the_pod(overlay: Path, tmp_path: Path) -> None:
    pod = only(build_with(component("openshift"), [overlay], tmp_path), "Deployment")["spec"]["template"]["spec"]
    assert {"runAsUser", "runAsGroup", "fsGroup"}.isdisjoint(pod["securityContext"])
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_root_filesystem_can_be_made_writable(overlay: Path, tmp_path: Path) -> None:
    deployment = only(build_with(component("writable-root"), [overlay], tmp_path), "Deployment")
    assert container_of(deployment)["securityContext"]["readOnlyRootFilesystem"] is False
