# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.33.0 as released for CUDA, on a machine without a GPU: what our subclasses rely on, and what they make of it.

The checks run in a process of their own, with the release before the installed vLLM on the path.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ON_CI
from tests.contract.wheel import WheelUnavailableError, unpacked_wheel

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    try:
        wheel = unpacked_wheel()
    except WheelUnavailableError as error:
        (pytest.fail if ON_CI else pytest.skip)(str(error))
    paths = [str(wheel), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "VLLM_PLUGINS": ""}


def test_contract(environment: dict[str, str]) -> None:
    checks = sorted(str(path) for path in FOLDER.glob("check_*.py"))
    assert len(checks) == 11
    result = subprocess.run([*PYTEST, *checks], cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(result.stdout[-20_000:] + result.stderr[-2_000:], pytrace=False)
