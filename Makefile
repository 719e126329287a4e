# make demo and make test do all the set-up on a fresh machine. PYTHON names the interpreter to build the
# environment from; PIP_ARGS adds options to pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What is imported is compiled then; compiling all that is installed takes nearly half of the time.
PIP := -m pip install --quiet --no-compile
# Tests run in so many processes, of one thread each.
WORKERS ?= 2
# The exact versions exist for Python 3.11 and newer; an older one takes what fits pyproject.toml.
LOCK := $(shell $(PYTHON) -c "import sys; print('--constraint constraints.txt' if sys.version_info >= (3, 11) else '')")

.PHONY: demo test slow check docs dist fix clean

$(STAMP): pyproject.toml constraints.txt shim/_lmprune_lm_eval.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(LOCK) $(PIP_ARGS) --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lmprune demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The docs as a site in build/site. Needs no network but to install; a dead link fails it.
docs: $(VENV)/.docs
	$(BIN)/python scripts/make_docs.py

$(VENV)/.docs: $(STAMP)
	$(BIN)/python $(PIP) $(LOCK) $(PIP_ARGS) --editable '.[docs]'
	touch $(VENV)/.docs

# What is uploaded: the wheel is built from the sdist.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
