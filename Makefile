# make demo: edit a picture.  make test: check everything.  Both set up what they need in .venv, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check format docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1@/p' $(MAKEFILE_LIST) | column -t -s @

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is wanted, found {sys.version.split()[0]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/engine: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[engine]"
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable ".[engine,dev]"
	@touch $@ $(VENV)/engine

demo: $(VENV)/engine ## edit examples/shirt.png with the embedded model
	@mkdir -p out
	$(BIN)/millicent edit examples/shirt.png "make the shirt navy blue" -o out/navy-shirt.png --seed 7 --strip
	@echo "The navy shirt is in out/navy-shirt.png; before and after, side by side: out/navy-shirt-strip.png"

check: $(VENV)/dev ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## check, and every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" --numprocesses auto

test-gpu: $(VENV)/dev ## the tests that need a CUDA card
	$(BIN)/python -m pytest -m gpu

format: $(VENV)/dev ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev ## write docs/cli.md again from the commands themselves
	$(BIN)/python docs/write_cli.py

bench: $(VENV)/dev ## time each stage of an edit on this machine
	$(BIN)/python -m benchmarks.edit

clean: ## remove what make made
	rm -rf $(VENV) out .pytest_cache .ruff_cache .mypy_cache .hypothesis
