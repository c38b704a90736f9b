# SPDX-License-Identifier: Apache-2.0
# Everything runs in the virtual environment VENV, which any target makes if need be. `make` alone lists the targets.

VENV ?= .venv
PYTHON ?= $(or $(shell command -v python3.11),python3)
DEMO_MODEL := models/SmolLM2-135M-Instruct
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WEIGHTS := $(DEMO_MODEL)/model.safetensors
# Of the tests, side by side. A GPU's memory is for one at a time.
JOBS ?= $(if $(shell command -v nvidia-smi),0,2)

.PHONY: help install demo serve wheel test lint
.DELETE_ON_ERROR:

help:
	@echo 'make demo                         answer a question about a 6,000-token text with sparse prefill'
	@echo 'make install                      the environment that all others use, once'
	@echo 'make serve MODEL=org/name [ARGS=] keep a server up, with more `vllm serve` options in ARGS'
	@echo 'make wheel                        a wheel in dist/, with the CUDA library if there is an nvcc (README: Install)'
	@echo 'make test [ARGS=]                 all tests that this machine can run, with more pytest options in ARGS'
	@echo 'make lint                         ruff and mypy'
	@echo 'Variables: VENV=$(VENV) PYTHON=$(PYTHON) JOBS=$(JOBS) (processes that test)'

install: $(INSTALLED)

demo: $(INSTALLED) $(WEIGHTS)
	$(BIN)/python -m demo.run $(DEMO_MODEL)

serve: $(INSTALLED)
	$(if $(MODEL),,$(error Which model? make serve MODEL=org/name or MODEL=directory))
	$(BIN)/python -m demo.server '$(MODEL)' $(ARGS)

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

test: $(INSTALLED) $(WEIGHTS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(INSTALLED): pyproject.toml setup.py demo/install.sh $(wildcard csrc/*)
	demo/install.sh $(PYTHON) $(VENV)
	touch $@

$(WEIGHTS): demo/fetch_model.py | $(INSTALLED)
	$(BIN)/python -m demo.fetch_model $(DEMO_MODEL)
