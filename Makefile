# make quickstart   set up, then run the main job (11 to 20 minutes on 2 cores)
# make test         set up, then pass the tests
# make test-slow    tests that take minutes each: the real model, offload, many kills
# make check        lint and types
# make lock         pin anew what the packages of requirements*.txt bring with them

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test test-slow check lock setup

quickstart: setup
	$(BIN)/python launch/quickstart.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/pip install --upgrade pip
	.venv-lock/bin/pip install -r requirements-dev.txt
	{ echo "# What the packages of requirements-dev.txt bring with them, as pip chose them last: make lock"; \
	  .venv-lock/bin/pip freeze --all | grep -v '^torch==\|^pip=='; } > constraints.txt
	rm -r .venv-lock

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt requirements-data.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "This needs Python 3.11 or newer with its venv module. On Debian: apt-get install python3 python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -r requirements-dev.txt -c constraints.txt
	$(BIN)/pip install --no-deps -r requirements-data.txt -e .
	touch $(READY)
