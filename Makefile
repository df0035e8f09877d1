# Needs Python 3.11 or newer, pip, make and gcc; everything else goes into .venv.
#   make PYTHON=python3.12 test     another interpreter
#   make WORKERS=4 test             more processes

PYTHON  ?= python3
WORKERS ?= 2
BIN     := .venv/bin
STAMP   := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test bench lint format types clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## the environment in .venv, with the exact versions of constraints.txt

# torch comes first and by itself: it is the one package with several builds (CPU, CUDA), and whichever pip is set up to
# choose is then kept by everything that follows.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "preftune needs Python 3.11 or newer: make PYTHON=…"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## the whole story on a small world, in minutes on a laptop's CPU
	$(BIN)/preftune demo

test: $(STAMP)  ## all tests that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

bench: $(STAMP)  ## the same training steps by TRL beside ours, compared with the table in docs/ (an hour; data in PREFTUNE_DATA)
	$(BIN)/python benchmarks/peer.py --json runs/bench.json --compare docs/performance.json

lint: $(STAMP)  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## ruff: rewrites the layout, and what the rules can mend
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy --strict preftune

clean:  ## removes everything that make and the tools have made; runs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
