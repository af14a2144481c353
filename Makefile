# `make demo` and `make test` on a fresh machine do all the set-up: a virtual environment in .venv with the
# pinned versions of requirements/, made once and brought up to date when a pin changes.

VENV    ?= .venv
PYTHON  ?= python3
# Test processes; each one computes on one thread.
WORKERS ?= 2
# More arguments for the command behind a target: make test ARGS="-k layout", make bench ARGS="--help"
ARGS    ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One stamp for each value of VOCO_BUILD_CUDA (see setup.py): after make VOCO_BUILD_CUDA=0, make builds again.
EXTENSION := $(VENV)/.extension$(VOCO_BUILD_CUDA)
READY := $(EXTENSION)

# An environment that make did not make is used as it is, and never written to: make test VENV=~/envs/mine
ifneq ($(origin VENV),file)
ifneq ($(wildcard $(PY)),)
ifeq ($(wildcard $(VENV)/.made-by-make),)
READY :=
export PYTHONPATH := $(CURDIR)
endif
endif
endif

CPP := $(shell find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick types lint format bench docs docs-site wheel hub clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY)  ## digits before and after compression; a photograph, read once and asked three times
	$(PY) -m voco_model.demo $(ARGS)

test: lint  ## ruff, then every test that this machine can run
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) $(ARGS)

quick: lint  ## a useful part of the tests, in about two minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m quick $(ARGS)

types: $(READY)  ## mypy: the annotations of voco_kernels and of voco_model's public modules
	$(PY) -m mypy

bench: $(READY)  ## time masked_attention against its rivals on this machine
	$(PY) bench/attn.py $(ARGS)

lint: $(READY)  ## ruff and clang-format: lint and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(READY)  ## let ruff and clang-format mend what they can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

docs: $(READY)  ## draw docs/mask.png and the README's tables again, from code and committed results
	$(PY) docs/draw_mask.py
	$(PY) bench/report.py

docs-site: .venv-docs/.installed  ## the documentation as HTML in build/docs-site/html; dead links fail
	$(PYTHON) release/docs_site.py build/docs-site/pages
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet
	@echo "open build/docs-site/html/index.html"

.venv-docs/.installed: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r requirements/docs.txt
	touch $@

# setuptools would pack what an earlier build left in build/lib.
wheel: $(READY)  ## two wheels in dist/: with the CUDA extension for Hopper (needs nvcc), and pure Python
	rm -rf dist build/lib* build/bdist*
	VOCO_BUILD_CUDA=1 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build/lib* build/bdist*
	VOCO_BUILD_CUDA=0 $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

hub: $(READY)  ## voco_kernels in build/hub, in the layout of the Hugging Face kernels hub
	$(PY) release/hub_kernel.py build/hub

venv: $(READY)  ## only the environment, in .venv

clean:  ## remove the environment that make made, and caches
	@if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV); fi
	rm -rf .venv-docs .pytest_cache .ruff_cache .hypothesis build demo-output *.egg-info voco_kernels/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made-by-make:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer for the pinned environment (the package itself runs on 3.10), got %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip' || { echo 'expected a Python that can make environments: install its venv module (Debian: apt install python3-venv)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and on its own, then Triton where torch brought none, then the rest, which finds both there.
$(STAMP): $(VENV)/.made-by-make requirements/torch.txt requirements/triton.txt requirements/dev.txt requirements/eval.txt pyproject.toml setup.py
	$(PY) -m pip install -r requirements/torch.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install -r requirements/triton.txt
	$(PY) -m pip install -r requirements/dev.txt
	$(PY) -m pip install --no-deps -r requirements/eval.txt
	$(PY) -m pip install --no-build-isolation --no-deps -e .
	touch $@

# The line above has built the CUDA extension, or not; this shows which, and builds it again when csrc/ changes.
$(EXTENSION): $(STAMP) setup.py $(wildcard csrc/*)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@
