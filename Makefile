PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

SEG = deepmoe_resnet18_street_scenes
SANITIZERS = -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined
NATIVE_TESTS = $(addprefix tests/test_sparse_,native.py winograd.py engine.py fuzz.py head.py)

.PHONY: help demo demo-seg test slow sanitize lint docs clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## set up and train a small wide-DeepMoE network on real digits
	$(BIN)/deepmoe demo

demo-seg: $(VENV)/.mmseg ## set up, train a small gated segmentor on generated street scenes, test it and draw
	$(BIN)/deepmoe street-scenes data/street_scenes
	$(BIN)/deepmoe train $(SEG) --work-dir output/demo-seg --cfg-options randomness.seed=0
	$(BIN)/deepmoe test $(SEG) output/demo-seg/iter_1000.pth --work-dir output/demo-seg \
		--show-dir output/demo-seg/pictures
	@echo 'Pictures (input, ground truth, prediction) are in output/demo-seg/pictures/'

test: $(VENV)/.test ## set up and run the tests
	$(BIN)/python -m pytest

slow: $(VENV)/.test ## set up and run the tests that take minutes
	$(BIN)/python -m pytest -m slow

sanitize: $(VENV)/.test ## set up and run the tests of native code under GCC's sanitizers of addresses and undefined behaviour
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 DEEPMOE_CXXFLAGS='$(SANITIZERS)' \
	$(BIN)/python -m pytest -n0 $(NATIVE_TESTS)

lint: $(VENV)/.dev ## set up and run the linter, the format check and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/.docs ## set up and build the documentation site in site/
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo $(VENV)/.mmseg $(VENV)/.test $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean: ## remove the virtual environment and the outputs
	rm -rf $(VENV) output data/street_scenes
