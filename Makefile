# Everything here sets itself up: `make demo` and `make test` work on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo test test-versions soak lint bench peer evaluate-demo clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(READY)  ## the package and its tools into .venv

# torch first and by its version: an unpinned torch would bring gigabytes of GPU libraries along.
$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## fine-tune, evaluate, reload and talk to the tiny model
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/demo.py

test: $(READY)  ## lint, types and the whole test suite (slow soaks left out)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow" -n 2 --dist worksteal

# Other Pythons: make test-versions ENVIRONMENTS="lowest newest:python3.13"
test-versions:  ## the quick core of the suite with the lowest and the newest libraries allowed
	$(PYTHON) tests/version_matrix.py $(ENVIRONMENTS)

soak: $(READY)  ## the slow tests
	$(PYTEST) -m slow

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## the CPU benchmarks, as ratios against benchmarks/baseline.json
	$(BIN)/python benchmarks/run.py

peer:  ## Kyutai's own package into .venv-peer, for the benchmarks that stand beside it
	benchmarks/install_peer.sh

evaluate-demo: $(READY)  ## every evaluation on the tiny model, with its report
	$(BIN)/python examples/evaluate_demo.py

clean:  ## remove what was built
	rm -rf $(VENV) .versions-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
