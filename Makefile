# Everything here sets itself up: `make demo` and `make test` work on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
INSTALLED = $(VENV)-package
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install demo demo-train test test-versions soak fuzz lint package test-package docs bench peer peer-check peer-suites mutants evaluate-demo clean

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

demo: $(READY)  ## does it remember what it was told, with and without TTT: table, picture, sound
	$(BIN)/python examples/remember.py

demo-train: $(READY)  ## fine-tune the tiny model on the sample dialogues, evaluate, reload and talk to it
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/demo.py

test: $(READY)  ## lint, types and the whole test suite (slow soaks left out)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow" -n 2 --dist worksteal

# Other Pythons: make test-versions ENVIRONMENTS="lowest newest:python3.13"
test-versions:  ## the quick core of the suite with the lowest and the newest libraries allowed
	$(PYTHON) tests/version_matrix.py $(ENVIRONMENTS)

soak: $(READY)  ## the slow tests
	$(PYTEST) -m slow

fuzz: $(READY)  ## mutated inputs for every reader of strangers' files (minutes); findings go to tests/fuzz_corpus
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(READY)  ## wheel and source distribution into dist/, checked
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# The project's tests and demonstration without its source: both run on what the wheel has installed.
test-package: package  ## the whole test suite and the demonstration, on the installed wheel in .venv-package
	rm -rf $(INSTALLED) && $(BIN)/python -m venv $(INSTALLED)
	$(INSTALLED)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(INSTALLED)/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[dev]"
	mkdir $(INSTALLED)/project && tar xzf dist/*.tar.gz --strip-components 1 -C $(INSTALLED)/project && rm -r $(INSTALLED)/project/modeling_moshi_ttt
	cd $(INSTALLED)/project && OMP_NUM_THREADS=1 ../bin/pytest -m "not slow" -n 2 --dist worksteal
	$(INSTALLED)/bin/moshi-ttt init $(INSTALLED)/work
	cd $(INSTALLED)/work && PATH="$(abspath $(INSTALLED)/bin):$$PATH" ../bin/python examples/demo.py

docs: $(READY)  ## the documentation into build/docs, warnings as errors
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env --builder html docs build/docs

bench: $(READY)  ## the CPU benchmarks, as ratios against benchmarks/baseline.json
	$(BIN)/python benchmarks/run.py

peer:  ## Kyutai's own package into .venv-peer, for what is measured or checked beside it
	benchmarks/install_peer.sh

peer-check: $(READY) peer  ## model and codec beside Kyutai's own package, into benchmarks/PEER.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peer_check.py --table benchmarks/PEER.md

# Their files use marks of their own, hence not this project's strict options.
peer-suites: $(READY)  ## transformers' and PEFT's own tests, of the installed versions, over the tiny model
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,peer-suites]'
	$(PYTEST) -o addopts=--import-mode=importlib -W ignore -q -n 2 tests/peer_suites/suite_transformers.py tests/peer_suites/suite_peft.py

mutants: $(READY)  ## change the code in small ways and see whether a test notices (hours; MUTANTS='*.frames_moshi_ttt.*' for a part)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutants]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1 $(MUTANTS)
	$(BIN)/python tests/mutants.py

evaluate-demo: $(READY)  ## every evaluation on the tiny model, with its report
	$(BIN)/python examples/evaluate_demo.py

clean:  ## remove what was built
	rm -rf $(VENV) $(INSTALLED) .versions-* .peer-suites build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
