PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test slow lint clean

help: ## show the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## set up and train a small wide-DeepMoE network on real digits
	$(BIN)/python tools/demo.py

test: $(VENV)/.test ## set up and run the tests
	$(BIN)/python -m pytest

slow: $(VENV)/.test ## set up and run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev ## set up and run the linter, the format check and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean: ## remove the virtual environment and the outputs
	rm -rf $(VENV) output
