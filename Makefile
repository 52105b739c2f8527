# Everything from a fresh machine with Python 3.11+ and make: `make demo` runs the main job, `make test` the tests.
# The first that runs and is new enough; `make setup PYTHON=…` names another.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$name -c '$(RECENT)' >/dev/null 2>&1 && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.calque-setup
DEMO := build/quill-onnxruntime-fp32
PROMPT := The function returns

.PHONY: setup check test demo quill conformance
.DEFAULT_GOAL := setup

setup: $(STAMP)

# Newer than both files: the environment is up to date and nothing is asked of the network.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer was found; name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(RECENT)' || { echo "Calque needs Python 3.11 or newer, and $(PYTHON) is none" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[convert,coreml,dev,tensorrt-rtx]'
	@touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -n 2

demo: setup
	$(BIN)/calque convert --target onnxruntime builtin:quill -o $(DEMO) --force
	$(BIN)/calque generate $(DEMO) -p "$(PROMPT)" --max-new-tokens 24

# Every type that transformers has for a task, shrunken, through the whole gate: an hour on two cores; goes on where it stopped.
# A type that fails makes the command fail, and the page shows it.
conformance: setup
	-$(BIN)/calque conformance --task text-generation-with-past --results docs/support.json
	-$(BIN)/calque conformance --task fill-mask --results docs/support.json
	-$(BIN)/calque conformance --target tensorrt --max-length 64 --results docs/targets/tensorrt-support.json
	$(BIN)/python docs/support.py

# Trains the built-in model anew, from nothing but the package index: most of an hour on one core.
quill: setup
	$(BIN)/python -m benchmarks.quill.train --work build/quill --out calque/models/quill
