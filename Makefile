# `make demo` and `make test` need CPython 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PART := .ci/part
PYTEST := $(BIN)/pytest -q --durations=5 --durations-min=5
# Byte code is written where it is first used: compiling all of torch and Ray takes longer than it saves. Written it must
# be, whatever the environment says: the tests start hundreds of processes, each of which would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install -q --no-compile

.PHONY: demo test protos clean lint types imports protos-fresh unit kernels transfer sampling explorer explorer-deep cluster chaos clients

demo: .venv/.runtime
	$(BIN)/baton demo

# What starts clusters or watches a clock comes in the order of IN_FRONT, at most two at a time and clusters one at a time.
# What only computes, and the installation of the clients, fills the time that is left, at a lower priority.
IN_FRONT := chaos cluster unit transfer sampling clients
BEHIND := lint imports protos-fresh types kernels explorer
ifdef ALL
YIELDING := --behind
PATIENT := -o timeout=900 -o faulthandler_timeout=880
cluster: | chaos
unit transfer: | cluster
sampling: | transfer
clients: | sampling
imports: | lint
protos-fresh: | imports
types: | protos-fresh
kernels: | types
explorer: | kernels
endif

test: .venv/bin/python
	@$(PART) --begin
	@$(MAKE) --no-print-directory -j4 --output-sync=target ALL=1 $(IN_FRONT) .venv-clients/.installed $(BEHIND)
	@$(PART) --summary

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Baton needs CPython 3.11 or newer, $$($(PYTHON) --version) found; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv

.venv/.runtime: .venv/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python $(INSTALL) -e .[dev]
	@touch $@ .venv/.runtime

# Each part prints what it took of its budget in seconds on two cores; they add up to more than it takes, since they run side by side.
lint: .venv/.dev
	@$(PART) $(YIELDING) lint 60 sh -c '$(BIN)/ruff check . && $(BIN)/ruff format --check .'

types: .venv/.dev
	@$(PART) $(YIELDING) types 200 $(BIN)/mypy

imports: .venv/.dev
	@$(PART) $(YIELDING) imports 60 $(BIN)/lint-imports

protos-fresh: .venv/.dev
	@$(PART) $(YIELDING) protos-fresh 60 $(BIN)/python protos/generate.py --check

unit: .venv/.dev
	@$(PART) unit 420 $(PYTEST) tests/unit

kernels: .venv/.dev
	@$(PART) $(YIELDING) kernels 300 $(PYTEST) $(PATIENT) tests/kernels

transfer: .venv/.dev
	@$(PART) transfer 150 $(PYTEST) tests/transfer --ignore=tests/transfer/test_mutants.py --ignore-glob=*/test_explorer* 

sampling: .venv/.dev
	@$(PART) sampling 60 $(PYTEST) tests/sampling

explorer: .venv/.dev
	@$(PART) $(YIELDING) explorer 500 $(PYTEST) $(PATIENT) -s -m 'not slow' tests/transfer/test_mutants.py tests/transfer/test_explorer_reduction.py tests/transfer/test_explorer.py

cluster: .venv/.dev
	@$(PART) cluster 240 $(PYTEST) tests/cluster

chaos: .venv/.dev
	@$(PART) chaos 240 $(PYTEST) tests/chaos

# Clients whose requirements exclude the server's live in an environment of their own (1.2 GB, most of it lm-eval's).
.venv-clients/.installed: .venv/bin/python tests/clients/requirements.txt
	$(BIN)/python -m venv --upgrade-deps .venv-clients
	@$(PART) $(YIELDING) clients-setup 200 .venv-clients/bin/python $(INSTALL) -r tests/clients/requirements.txt
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
