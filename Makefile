# Everything a newcomer or a developer runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0
GPU_GRID ?= --length 4096 --length 16384 --length 131072

.PHONY: help demo plans test test-slow zoo wheel-check lint bench-gpu clean
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# An installed torch in range (a GPU machine's own, with --system-site-packages) is kept; else the CPU build is taken.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

demo: $(STAMP) ## the main job: a trained model reads real text, dense and sparse, side by side
	$(BIN)/python -m examples.demo

plans: $(STAMP) ## plan a pattern for every head of two trained models, beside one window for all
	$(BIN)/python -m examples.plan_reader
	$(BIN)/python -m examples.plan_minilm

test: $(STAMP) ## the tests, on two cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal

test-slow: $(STAMP) ## the exhaustive tests
	$(BIN)/python -m pytest -m "slow"

zoo: $(STAMP) ## walk every model of tests/zoo, and write the README's table from it (about 20 minutes)
	$(BIN)/python -m tests.zoo --write
	$(BIN)/python -m tests.zoo --held-out --no-dynamic --write

wheel-check: $(STAMP) ## build the wheel and use it from outside the checkout
	tests/check_wheel.sh $(BIN)/python

lint: $(STAMP) ## style only
	$(BIN)/ruff check .

# The machine's own python, torch and Triton, if they are in range.
bench-gpu: ## on a GPU machine: numerics first, then the grid and decoding; results go to examples/results/
	$(PYTHON) -m pip install --quiet --no-build-isolation --editable . "pytest>=8" "pytest-xdist>=3.6"
	$(PYTHON) -m pytest -m gpu -n 8 tests/test_triton_gpu.py
	$(PYTHON) -m sparsify bench --grid --device cuda --dtype bfloat16 $(GPU_GRID) --json examples/results --plot examples/results
	$(PYTHON) -m sparsify bench --decode --device cuda --json examples/results

clean: ## remove what make made
	rm -rf $(VENV) build dist out *.egg-info
