# SPDX-License-Identifier: Apache-2.0
"""All checks, in the order in which one explains the next."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from minference_vllm import __version__
from minference_vllm.doctor.check import Check, Status, failed, on_one_line
from minference_vllm.doctor.gpu import check_gpu, device
from minference_vllm.doctor.metrics import check_metrics
from minference_vllm.doctor.registration import check_registration
from minference_vllm.doctor.selftest import try_kernels
from minference_vllm.doctor.settings import Limits, check_settings
from minference_vllm.doctor.versions import check_versions

SCHEMA_VERSION = 1

logger = logging.getLogger("vllm.minference.doctor")


def diagnose(
    environ: Mapping[str, str],
    model: str | None,
    limits: Limits,
    additional_config: Mapping[str, Any] | None = None,
    expects_gpu: bool = True,
) -> list[Check]:
    """Look at everything.

    Args:
        environ: the process environment, as it is before vLLM loads any plugin.
        model: directory, or name on the hub.
        limits: what the server would be given.
        additional_config: its `--additional-config`.
        expects_gpu: False while an image is built: checks that need a GPU are then skipped if there is none.
    """
    where = device()
    expects_gpu = expects_gpu or where.type == "cuda"
    return [
        *_examine("versions", check_versions, expects_gpu),
        *_examine("gpu", check_gpu, expects_gpu),
        *_examine("metrics folder", check_metrics, environ),
        *_examine("plugin", check_registration, environ, expects_gpu),
        *_examine(
            "settings", check_settings, environ, model, limits, where if expects_gpu else None, additional_config
        ),
        *_examine("kernels", try_kernels, where),
    ]


def _examine(name: str, check: Callable[..., Iterable[Check]], *arguments: Any) -> list[Check]:
    """The results of one function of checks. An exception becomes a failed check, so that all others are still made."""
    try:
        return list(check(*arguments))
    except Exception as error:
        logger.exception("MInference: the doctor's check of %s raised an exception", name)
        return [failed(name, f"the check raised {type(error).__name__}: {on_one_line(error)}", "Report its traceback")]


def has_failed(checks: Iterable[Check]) -> bool:
    return any(check.status is Status.FAILED for check in checks)


def to_json(checks: Sequence[Check]) -> str:
    """The checks for programs: one JSON object, whose layout SCHEMA_VERSION numbers."""
    status = Status.FAILED if has_failed(checks) else Status.OK
    report = {"schema_version": SCHEMA_VERSION, "version": __version__, "status": status}
    return json.dumps({**report, "checks": [asdict(check) for check in checks]}, indent=2)


def to_lines(checks: Sequence[Check]) -> list[str]:
    """The checks for people: aligned lines, each problem with its remedy below it."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:7}  {check.name:{width}}  {check.what}")
        if check.remedy:
            lines.append(f"{'':7}  {'':{width}}  -> {check.remedy}.")
    return lines
