# Everything runs from .venv, which `make setup` builds; all that the machine must bring is Python 3.11, make and gcc.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.setup-done
TESTS ?= tests
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
SOAK_ARGS ?=
SIMULATE_ARGS ?=
INTERFERENCE_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo soak simulate interference test lint format types layers wheel clean

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## build .venv with the package (editable) and all it needs, in the versions of constraints.txt

# Again only when what is to be installed has changed.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[recipes,dev]'
	@touch $@

demo: $(STAMP)  ## train GPT-2 on four local nodes, kill a worker, a node and a whole group, and compare the losses
	$(BIN)/python recipes/demo.py $(DEMO_ARGS)

soak: $(STAMP)  ## hit six local nodes with everything for 20 minutes, and check that all is right (SOAK_ARGS='--minutes 3')
	$(BIN)/python recipes/soak.py $(SOAK_ARGS)

simulate: $(STAMP)  ## search fault schedules on a virtual clock and network (SIMULATE_ARGS='--seeds 20000', '--seed 7')
	$(BIN)/python -m tests.simulation $(SIMULATE_ARGS)

# Needs root: it makes network namespaces.
interference: $(STAMP)  ## measure what checkpoints cost training at several link speeds (INTERFERENCE_ARGS='quick=true')
	$(BIN)/python recipes/experiments/interference.py $(INTERFERENCE_ARGS)

test: $(STAMP)  ## run the tests (TESTS=tests/core: some of them; PYTEST_ARGS=-x: pytest's options)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS) $(TESTS)

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## check the types of the package, strictly
	$(BIN)/mypy

layers: $(STAMP)  ## check that imports point down
	$(BIN)/lint-imports

# `build/` is emptied first: setuptools would pack modules that are gone from the tree.
wheel: $(STAMP)  ## build the wheel into dist/ and check what is in it
	rm -rf build dist
	$(BIN)/python -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean:  ## remove what builds, tests and runs left, but not .venv
	rm -rf build dist runs outputs multirun lightning_logs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
