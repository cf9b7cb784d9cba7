# Every target works as the first command in a fresh clone: it needs only make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs

.PHONY: help install demo docs test test-all test-ray lint format bench check-install check-installs clean distclean

help:
	@echo "make demo       compress the small model that ships inside the package"
	@echo "make test       run the fast tests"
	@echo "make test-all   run all tests, the slow ones too"
	@echo "make test-ray   install Ray (70 MB) and run the tests that need it"
	@echo "make lint       ruff, mypy and the import rules"
	@echo "make format     let ruff rewrite what it can"
	@echo "make docs       build the documentation as a site, into site/"
	@echo "make bench      measure the SDK's own overhead on the demo model"
	@echo "make check-install   install the wheel in an empty home and try it there (5.7 GB on Linux, deleted afterwards)"
	@echo "make check-installs  the same with the newest and the lowest versions, and with each torchvision"
	@echo "make clean      remove caches and build outputs (distclean: the virtual environment too)"

install: $(STAMP)

# Debian's bare python3 has the venv module but not ensurepip, and would leave half an environment behind.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: '$(PYTHON)' is missing or older than 3.11; name another one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: '$(PYTHON) -m venv $(VENV)' failed, see above" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/ndonnx demo

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[docs]'
	@touch $@

# Strict: a link that leads nowhere, or an API name that is not there, ends it. The variable silences an advertisement.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# One thread for each test process: threads of several would wait for each other inside every operator.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

# Properties try new examples here; the fast tests always try the same ones.
test-all: $(STAMP)
	HYPOTHESIS_PROFILE=new OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# Ray is large, and only these tests need it: a cluster of several nodes on this machine, some of which die.
test-ray: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runtime/test_ray.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.overhead --demo

# Neither needs .venv: each environment is new, and goes when it was tried.
check-install:
	$(PYTHON) scripts/check_install.py

check-installs:
	$(PYTHON) scripts/check_install.py pinned broken absent newest lowest

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find ndonnx cli tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
