# SPDX-License-Identifier: Apache-2.0
"""The Python files of vLLM's CUDA release, which a machine without a GPU can import but not install."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"
OVERRIDE = "MINFERENCE_VLLM_WHEEL"
"""Environment variable that names a folder in which the wheel is already unpacked."""

FOLDER = Path(__file__).parents[2] / "models" / f"vllm-{VERSION}"
# Everything else in it is compiled: 400 MB are fetched, 50 MB kept.
KEPT_SUFFIXES = (".py", ".json", "METADATA", "entry_points.txt")


class WheelUnavailableError(RuntimeError):
    """The wheel is not here and cannot be fetched; the message says why."""


def unpacked_wheel() -> Path:
    """A folder to put on PYTHONPATH, fetched when it is first asked for.

    Raises:
        WheelUnavailableError: no network, or no such wheel.
    """
    folder = Path(os.environ.get(OVERRIDE, FOLDER))
    if not (folder / "vllm" / "__init__.py").exists():
        if OVERRIDE in os.environ:
            raise WheelUnavailableError(f"{OVERRIDE}={folder} holds no vllm package")
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: a rename at the end makes it appear whole or not at all.
    with tempfile.TemporaryDirectory(prefix="vllm-", dir=folder.parent) as draft:
        wheel = _download(Path(draft))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(KEPT_SUFFIXES)]
            archive.extractall(Path(draft, "unpacked"), names)
        Path(draft, "unpacked").rename(folder)


def _download(folder: Path) -> Path:
    target = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.12"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, f"--dest={folder}"]
    result = subprocess.run([*command, f"vllm=={VERSION}"], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["pip said nothing"]
        raise WheelUnavailableError(f"vllm {VERSION} cannot be downloaded: {lines[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel
