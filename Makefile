# make quickstart   train, compare and inspect a mixture on a real 4-bit model, from nothing (about 10 minutes)
# make test         the whole test suite
# make lint         ruff and mypy
# make dev          editable install with the tools of `test` and `lint`, and links that let type checkers see the layout
# make bench        times of linears, FFN blocks and whole models against the frozen ones, PEFT and loops over experts
#                   (make bench BENCH=block for one of them; the figures also go to runs/bench/*.json)
#
# PYTHON: the interpreter that makes the virtual environment. VENV: where it lies. ARGS: passed on to the command.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH ?= linear block model block_model
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
TYPED := experts model_cards routers trainers

.PHONY: quickstart test lint dev bench

quickstart: $(VENV)/.quickstart
	$(BIN)/moelora quickstart $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dev: $(VENV)/.dev
	@for room in $(TYPED); do ln -sfn ../$$room moelora/$$room; done

bench: $(VENV)/.dev
	@mkdir -p runs/bench
	@for name in $(BENCH); do $(BIN)/python scripts/bench/$$name.py --json runs/bench/$$name.json $(ARGS) || exit 1; done

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "moelora needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The stamps make an installation run again when the dependencies have changed.
$(VENV)/.quickstart $(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[$(subst .,,$(@F))]'
	@touch $@
