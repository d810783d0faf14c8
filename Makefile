# Two commands on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install demo test lint types contracts docs unit notebooks compatibility user-code stress format clean

help:
	@echo "make demo    train a small ResNet dense and low-rank, compare, write a report (about 2 minutes)"
	@echo "make test    everything that CI runs: lint, types, import contracts, documentation, tests"
	@echo "make docs    the documentation as HTML, in docs/_build"
	@echo "make notebooks  run the notebooks"
	@echo "make compatibility  write docs/compatibility.md from the tests"
	@echo "make stress  kill runs, damage files, malform arguments; write docs/reliability.md (about 20 minutes)"
	@echo "make user-code  write docs/user-code.md from the tests"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the virtual environment and what the demo wrote"

# The stamp depends on what is installed, so a changed requirement installs again and an unchanged one does not.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "==> Installing into $(VENV), versions from constraints.txt (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: otherwise another package's open bound may choose a larger build of it.
	@$(PIP) install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)" -c constraints.txt
	@$(PIP) install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@

install: $(VENV)/installed

demo: install
	@echo "==> lightning-svd demo"
	@$(BIN)/lightning-svd demo

test: lint types contracts docs unit

lint: install
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install
	@echo "==> mypy"
	@$(BIN)/mypy

contracts: install
	@echo "==> import contracts"
	@$(BIN)/lint-imports

docs: install
	@echo "==> sphinx"
	@$(BIN)/sphinx-build -W --keep-going -E -q docs docs/_build

unit: install
	@echo "==> pytest"
	@$(BIN)/python -m pytest --doctest-modules tests lightning_svd

notebooks: install
	@$(BIN)/python -m pytest tests/test_notebooks.py

compatibility: install
	@$(BIN)/python tests/compatibility.py

user-code: install
	@$(BIN)/python tests/user_code.py

stress: install
	@for script in constructors damage kills; do \
		$(BIN)/python tests/stress/$$script.py --json tests/stress/results/$$script.json || exit 1; done
	@$(BIN)/python tests/stress/pages.py

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build lightning-svd-demo
