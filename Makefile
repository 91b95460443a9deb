PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

SEG = configs/mmseg/deepmoe_resnet18_street_scenes.py

.PHONY: help demo demo-seg test slow lint clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## set up and train a small wide-DeepMoE network on real digits
	$(BIN)/python tools/demo.py

demo-seg: $(VENV)/.mmseg ## set up, train a small gated segmentor on generated street scenes, test it and draw
	$(BIN)/python tools/street_scenes.py data/street_scenes
	$(BIN)/python tools/train.py $(SEG) --work-dir output/demo-seg --cfg-options randomness.seed=0
	$(BIN)/python tools/test.py $(SEG) output/demo-seg/iter_1000.pth --work-dir output/demo-seg \
		--show-dir output/demo-seg/pictures
	@echo 'Pictures (input, ground truth, prediction) are in output/demo-seg/pictures/'

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

$(VENV)/.demo $(VENV)/.mmseg $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean: ## remove the virtual environment and the outputs
	rm -rf $(VENV) output data/street_scenes
