# Everything a fresh clone needs: `make demo` to see it work, `make test` to check it. `make help` lists the rest.
#
# The tools live in .venv, which `setup` makes once, and again when pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test certify lint format docs bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# The first interpreter that is new enough; another one: make setup PYTHON=/path/to/python3
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p; done))

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(STAMP) ## make .venv with the package and its tools, versions as in constraints.txt
	@:

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Castalia needs Python 3.11 or newer: install it, or name it: make setup PYTHON=..." >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	@# A folder that was moved, or a set-up that was cut short, is made anew.
	@$(BIN)/python -c 'import pip' 2>/dev/null || { rm -rf $(VENV); "$(PYTHON)" -m venv $(VENV); }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## train a small model on this machine and show what it does (CORPUS=FILE for your own text, MINUTES=3)
	@$(BIN)/castalia demo $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(MINUTES),--minutes "$(MINUTES)")

test: setup ## the test suite (ARGS="-k store" for a part)
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

certify: setup ## the long matrix of checks; dated tables under docs/certificates/
	@$(BIN)/python -m castalia.tools.certify $(ARGS)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: setup ## mend what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: setup ## write the pages that are generated from the code
	@$(BIN)/python -m castalia.tools.docs $(ARGS)

bench: setup ## run the scripts in benchmarks/ one after another
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean: ## remove .venv, caches and build results; data/ and runs/ stay
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
