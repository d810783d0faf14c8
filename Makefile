# Two commands on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# What is installed: these versions, with these options of `pip install`. And how pytest is called.
CONSTRAINTS    ?= constraints.txt
INSTALL_FLAGS  ?=
PYTEST_FLAGS   ?=
CHROMIUM       ?= chromium
# How long `make fuzz` looks for what nobody thought of.
MINUTES        ?= 30
# Old versions know what has been deprecated since; that is not what they are tried for.
OLD_WARNINGS   := $(foreach kind,Deprecation PendingDeprecation Future,-W default::$(kind)Warning)

.PHONY: help install demo test lint types contracts docs unit notebooks compatibility user-code interface stress fuzz
.PHONY: pictures format clean
.PHONY: test-oldest test-newest wheel release

help:
	@echo "make demo    train a small ResNet dense and low-rank, compare, write a report (about 2 minutes)"
	@echo "make test    everything that CI runs: lint, types, import contracts, documentation, tests"
	@echo "make docs    the documentation as HTML, in docs/_build"
	@echo "make notebooks  run the notebooks"
	@echo "make compatibility  write docs/compatibility.md from the tests"
	@echo "make stress  kill runs and processes, damage files, spoil numbers; write docs/reliability.md (about 40 minutes)"
	@echo "make fuzz    random networks through random events; MINUTES=30, or as many as you like"
	@echo "make user-code  write docs/user-code.md from the tests"
	@echo "make interface  write tests/interface.txt, what versions promise about, from the package"
	@echo "make pictures  run the demo and take the pictures of its report, in Chromium"
	@echo "make test-oldest  the tests with the oldest versions that pyproject.toml allows, in .venv-oldest"
	@echo "make test-newest  the tests with the newest versions there are, in .venv-newest"
	@echo "make wheel   build the wheel, install it by itself, and test that"
	@echo "make release VERSION=1.2.3  check and build a release, and say what to tag; nothing is uploaded"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the virtual environment and what the demo wrote"

# The stamp depends on what is installed, so a changed requirement installs again and an unchanged one does not.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo "==> Installing into $(VENV), versions from $(CONSTRAINTS) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its exact version: otherwise another package's open bound may choose a larger build of it.
	@$(PIP) install --quiet $(INSTALL_FLAGS) "torch$$(sed -n 's/^torch==/==/p' $(CONSTRAINTS))" -c $(CONSTRAINTS)
	@$(PIP) install --quiet $(INSTALL_FLAGS) --editable '.[dev]' -c $(CONSTRAINTS)
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
	@$(BIN)/python -m pytest --doctest-modules -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) tests lightning_svd

test-oldest:
	@$(MAKE) unit VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTEST_FLAGS="$(OLD_WARNINGS) $(PYTEST_FLAGS)"

# Installed anew each time: what is newest changes.
test-newest:
	@rm -f .venv-newest/installed
	@$(MAKE) unit VENV=.venv-newest CONSTRAINTS=constraints-newest.txt \
		INSTALL_FLAGS="--upgrade --upgrade-strategy eager"

wheel:
	@PYTHON=$(PYTHON) .ci/wheel

release:
	@PYTHON=$(PYTHON) .ci/release $(VERSION)

notebooks: install
	@$(BIN)/python -m pytest tests/test_notebooks.py

compatibility: install
	@$(BIN)/python tests/compatibility.py

user-code: install
	@$(BIN)/python tests/user_code.py

interface: install
	@$(BIN)/python tests/interface.py

pictures: demo
	@for scheme in report:1 report-dark:0; do \
		$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=1280,1404 --virtual-time-budget=8000 \
			--blink-settings=preferredColorScheme=$${scheme#*:} --screenshot=docs/images/$${scheme%:*}.png \
			"file://$(CURDIR)/lightning-svd-demo/report.html" || exit 1; done

stress: install
	@for script in constructors damage kills sharded_kills processes not_finite; do \
		$(BIN)/python tests/stress/$$script.py --json tests/stress/results/$$script.json || exit 1; done
	@$(BIN)/python tests/stress/reliability.py

fuzz: install
	@$(BIN)/python tests/stress/fuzz.py --minutes $(MINUTES) --json tests/stress/results/fuzz.json
	@$(BIN)/python tests/stress/reliability.py

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest dist docs/_build lightning-svd-demo
