# `make demo` and `make test` need CPython 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PART := .ci/part

.PHONY: demo test protos clean lint types imports protos-fresh unit kernels transfer cluster

demo: .venv/.runtime
	$(BIN)/baton demo

test: lint types imports protos-fresh unit kernels transfer cluster
	@$(PART) --summary

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Baton needs CPython 3.11 or newer, $$($(PYTHON) --version) found; set PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.runtime: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .[dev]
	@touch $@ .venv/.runtime

# Each part prints what it took of its budget in seconds on two cores, and is ended when it takes more.
lint: .venv/.dev
	@$(PART) lint 60 sh -c '$(BIN)/ruff check . && $(BIN)/ruff format --check .'

types: .venv/.dev
	@$(PART) types 240 $(BIN)/mypy

imports: .venv/.dev
	@$(PART) imports 60 $(BIN)/lint-imports

protos-fresh: .venv/.dev
	@$(PART) protos-fresh 60 $(BIN)/python protos/generate.py --check

unit: .venv/.dev
	@$(PART) unit 240 $(BIN)/pytest -q tests/unit

kernels: .venv/.dev
	@$(PART) kernels 240 $(BIN)/pytest -q tests/kernels

transfer: .venv/.dev
	@$(PART) transfer 420 $(BIN)/pytest -q tests/transfer

cluster: .venv/.dev
	@$(PART) cluster 420 $(BIN)/pytest -q tests/cluster tests/chaos

protos: .venv/.dev
	$(BIN)/python protos/generate.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
