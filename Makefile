PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast test-long test-torch docs docs-links docs-reference lint format clean

# Pre-train SimSiam on scikit-learn's digits: about a minute on two cores.
quickstart: $(VENV)/installed
	$(BIN)/python -m simsiam_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# Tests of single functions, for the inner loop.
FAST := architecture config files hlo knn launch same_run words
test-fast: $(VENV)/installed-test
	$(BIN)/python -m pytest --dist worksteal $(FAST:%=tests/test_%.py) -k 'not builds_and_steps and not moved_folder'

# Tests that take half a minute or more; `make test` skips them.
test-long: $(VENV)/installed-test
	$(BIN)/python -m pytest -m long

# Conversions against PyTorch, torchvision and timm; `make test` skips them if these are not installed.
test-torch: $(VENV)/installed-torch
	$(BIN)/python -m pytest --dist worksteal tests/test_convert_torch.py

# The documentation, in build/docs; any warning is an error. The tutorials are run.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

# The pages of the reference that follow from the code: keys and commands.
docs-reference: $(VENV)/installed-test
	$(BIN)/python -m docs.generate

# Links to other sites; needs the network.
docs-links: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -b linkcheck -q -D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer docs build/docs-links

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build docs/benchmarks docs/reference/modules *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0] + "; expected 3.11 or later. Run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.py simsiam_jax/_version.py
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/installed-torch: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable '.[test,torch]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --editable '.[test,docs]'
	touch $@
