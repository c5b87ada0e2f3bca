# make demo: edit a picture.  make test: check everything.  Each sets up what it needs: .venv as a user has it, .venv-dev with the tools,
# .venv-deploy with those that rent cards.
PYTHON ?= python3
INSTALL := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEV := .venv-dev/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check format docs bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1@/p' $(MAKEFILE_LIST) | column -t -s @

.venv/bin/python .venv-dev/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or later is wanted, found {sys.version.split()[0]}; set PYTHON=")'
	$(PYTHON) -m venv $(@D:/bin=)

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python $(INSTALL) --editable ".[engine]"
	@touch $@

.venv-dev/ready: pyproject.toml constraints.txt | .venv-dev/bin/python
	$(DEV)/python $(INSTALL) --editable ".[engine,dev]"
	@# packs Nunchaku's files; of its forty dependencies that part needs none
	$(DEV)/python $(INSTALL) --no-deps deepcompressor-toolkit
	@touch $@

# only the files of deploy/ are read with these, each by its own tool's parser
.venv-deploy/ready: tests/deploy/constraints.txt
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/deploy/constraints.txt skypilot dstack
	@touch $@

demo: .venv/ready ## edit examples/shirt.png with the embedded model
	@mkdir -p out
	.venv/bin/millicent edit examples/shirt.png "make the shirt navy blue" -o out/navy-shirt.png --seed 7 --strip
	@echo "The navy shirt is in out/navy-shirt.png; before and after, side by side: out/navy-shirt-strip.png"

check: .venv-dev/ready ## style, types and layers
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy
	$(DEV)/lint-imports

test: check .venv-deploy/ready ## check, and every test that needs no GPU
	$(DEV)/python -m pytest -m "not gpu" --numprocesses auto

test-gpu: .venv-dev/ready ## the tests that need a CUDA card
	$(DEV)/python -m pytest -m gpu

format: .venv-dev/ready ## put the code in shape
	$(DEV)/ruff check --fix .
	$(DEV)/ruff format .

docs: .venv-dev/ready ## write docs/cli.md again from the commands themselves
	$(DEV)/python docs/write_cli.py

bench: .venv-dev/ready ## time each stage of an edit, and loading, on this machine
	$(DEV)/python -m benchmarks.edit
	$(DEV)/python -m benchmarks.load

clean: ## remove what make made
	rm -rf .venv .venv-dev .venv-deploy out .pytest_cache .ruff_cache .mypy_cache .hypothesis
