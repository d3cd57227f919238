# fastkernels: `make generate` and `make test` do all that they need; `make help` lists the rest.
# Needs Python 3.11 or newer and GCC 12 or newer. Everything made lies in .venv/, build/ and beside the package.

PYTHON     ?= python3
CMAKE_ARGS ?=
ARGS       ?=

VENV  := .venv
PY    := $(VENV)/bin/python
BUILD := build/local
CPP    = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# cmake and ninja are those of .venv, whoever calls.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help generate test build lint format cuda-check bench wheel clean
.DEFAULT_GOAL := help

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

generate: build  ## Let the demo model continue a line of Python; ARGS='--prompt "import os"'
	@$(PY) -m fastkernels.generate $(ARGS) </dev/null

test: build $(VENV)/.test  ## The tests; ARGS="tests/ops -k rope"
	@$(PY) -m pytest $(ARGS)

build: $(BUILD)/build.ninja  ## The C++ library, beside the package; builds what changed
	@env -u MAKEFLAGS cmake --build $(BUILD)  # ninja shares the work out itself
	@cmake --install $(BUILD) --prefix python >$(BUILD)/install.log

lint: $(VENV)/.lint  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@echo clang-format --dry-run -Werror csrc
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.lint  ## Let ruff and clang-format rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@echo clang-format -i csrc
	@$(VENV)/bin/clang-format -i $(CPP)

cuda-check:  ## Compile every kernel for sm_80 and sm_90a: no GPU, no torch, only nvcc
	@$(PYTHON) tools/cuda_check.py $(ARGS)

bench: build  ## The benchmarks; ARGS="ops --json"
	@$(PY) -m benchmarks $(ARGS)

wheel: $(VENV)/.base  ## A wheel in dist/
	@rm -rf build/lib build/lib.* build/bdist.* build/temp.*  # setuptools would pack what a file left there
	$(PY) -m pip wheel --no-deps --no-build-isolation -w dist .

clean:  ## Remove everything made, .venv too
	rm -rf $(VENV) build dist python/*.egg-info python/fastkernels/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- what the targets stand on: stamp files, so that a second run installs nothing ---------------------------------

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "fastkernels needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# The build's requirements, then the package itself without its library, which `build` makes in place.
$(VENV)/.base: pyproject.toml setup.py | $(PY)
	@echo "installing what the build and the package need (torch is large; the first time takes a while)"
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    >$(VENV)/build-requirements.txt
	@$(PY) -m pip install -q "cmake>=3.24" -r $(VENV)/build-requirements.txt
	@FASTKERNELS_SKIP_CMAKE=1 $(PY) -m pip install -q --no-build-isolation -e .
	@touch $@

$(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.base
	@echo "installing what 'make $*' needs"
	@FASTKERNELS_SKIP_CMAKE=1 $(PY) -m pip install -q --no-build-isolation -e '.[$*]'
	@touch $@

# Without the cache, what an earlier CMAKE_ARGS said is forgotten; objects that are still right stay.
$(BUILD)/build.ninja: $(VENV)/.base $(BUILD)/cmake_args
	@rm -f $(BUILD)/CMakeCache.txt
	@cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) $(CMAKE_ARGS)
	@touch $@

# Changes only when CMAKE_ARGS does.
$(BUILD)/cmake_args: FORCE
	@mkdir -p $(BUILD)
	@echo '$(CMAKE_ARGS)' | cmp -s - $@ || echo '$(CMAKE_ARGS)' >$@

.PHONY: FORCE
FORCE:
