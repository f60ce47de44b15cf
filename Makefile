# Two commands on a fresh machine (Python ≥ 3.11): `make demo` and `make test`. For contributors: `make check`, `make
# coverage`, `make docs`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process a core, a thread a process. A process that dies is not started again: its file fails by name, and the
# other process goes on.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0
# What pip resolves is decided by pyproject.toml alone; the stamp re-installs when it changes.
STAMP := $(VENV)/.installed

.PHONY: demo test check lint style coverage docs clean fuzz

demo: $(STAMP)
	$(BIN)/ptsim demo --out demo

test: lint
	$(PYTEST)

# mypy beside the tests: without its cache it computes for a minute, with it for 8 s
check: style
	@$(BIN)/mypy & types=$$!; $(PYTEST) -m "not slow"; tests=$$?; wait $$types && exit $$tests

lint: style
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ptsim needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*

fuzz: $(STAMP)  ## an hour of damaged inputs; FUZZ_SECONDS=600 for less; what is found is kept in build/fuzz
	PTSIM_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),3600) $(BIN)/python -m pytest tests/fuzz -q
