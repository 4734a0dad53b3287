# `make demo` and `make test` need CPython 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PART := .ci/part
PYTEST := $(BIN)/pytest -q --durations=5 --durations-min=5
# Byte code is written where it is first used: compiling all of torch and Ray takes longer than it saves.
INSTALL := -m pip install -q --no-compile

.PHONY: demo test protos clean lint types imports protos-fresh unit kernels transfer sampling explorer explorer-deep cluster chaos clients

demo: .venv/.runtime
	$(BIN)/baton demo

# What needs one core runs two at a time; what starts clusters has the machine to itself.
test: .venv/.dev
	@$(PART) --begin
	@$(MAKE) --no-print-directory -j2 --output-sync=target explorer unit kernels types transfer sampling lint imports protos-fresh
	@$(MAKE) --no-print-directory cluster chaos clients
	@$(PART) --summary

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Baton needs CPython 3.11 or newer, $$($(PYTHON) --version) found; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) -e .[dev]
	@touch $@ .venv/.runtime

# Each part prints what it took of its budget in seconds on two cores; they add up to more than it takes, since half of them run side by side.
lint: .venv/.dev
	@$(PART) lint 30 sh -c '$(BIN)/ruff check . && $(BIN)/ruff format --check .'

types: .venv/.dev
	@$(PART) types 120 $(BIN)/mypy

imports: .venv/.dev
	@$(PART) imports 30 $(BIN)/lint-imports

protos-fresh: .venv/.dev
	@$(PART) protos-fresh 20 $(BIN)/python protos/generate.py --check

unit: .venv/.dev
	@$(PART) unit 420 $(PYTEST) tests/unit

kernels: .venv/.dev
	@$(PART) kernels 180 $(PYTEST) tests/kernels

transfer: .venv/.dev
	@$(PART) transfer 150 $(PYTEST) tests/transfer --ignore=tests/transfer/test_mutants.py --ignore-glob=*/test_explorer* 

sampling: .venv/.dev
	@$(PART) sampling 60 $(PYTEST) tests/sampling

explorer: .venv/.dev
	@$(PART) explorer 400 $(PYTEST) -s -m 'not slow' tests/transfer/test_explorer.py tests/transfer/test_explorer_reduction.py tests/transfer/test_mutants.py

cluster: .venv/.dev
	@$(PART) cluster 240 $(PYTEST) tests/cluster

chaos: .venv/.dev
	@$(PART) chaos 240 $(PYTEST) tests/chaos

# Clients whose requirements exclude the server's live in an environment of their own (1.2 GB, most of it lm-eval's).
.venv-clients/.installed: .venv/bin/python tests/clients/requirements.txt
	$(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python $(INSTALL) -r tests/clients/requirements.txt
	@touch $@

clients: .venv/.dev .venv-clients/.installed
	@$(PART) clients 150 $(PYTEST) tests/clients

# Also the worlds of the hand-over protocol that are too long for `explorer`.
explorer-deep: .venv/.dev
	$(BIN)/python -m tests.transfer.explorer --deep

protos: .venv/.dev
	$(BIN)/python protos/generate.py

clean:
	rm -rf .venv .venv-clients build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
