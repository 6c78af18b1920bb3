# Every target sets up what it needs: Python 3.11 and make are enough on a new machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo check test soak docs lock clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

setup: $(READY)  ## virtual environment with the tested set

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "llmemb_ray is tested on Python 3.11; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[test]'
	touch $(READY)

demo: $(READY)   ## embed, verify, search and report on the documentation of Python's standard library
	$(BIN)/llmemb demo demo-output

check: $(READY)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(READY)   ## unit and end-to-end tests
	$(BIN)/pytest

soak: $(READY)   ## the long proofs, about an hour; their records go to benchmarks/records
	$(BIN)/python benchmarks/memory.py plan 50000
	$(BIN)/python benchmarks/memory.py rows 100000 1000000
	$(BIN)/python benchmarks/memory.py rows 10000000 --kill

docs: $(READY)   ## write docs/reference.md from the commands
	$(BIN)/python docs/make_reference.py

lock: $(READY)   ## write the versions installed now into the lock file
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock

clean:           ## remove what the targets made
	rm -rf $(VENV) demo-output build dist *.egg-info
