# `make` lists the targets. Everything happens in .venv, which is made on first use.

PYTHON ?= python3
# An open range of torch pulls several GB of GPU packages; any requirement may be given, as TORCH="torch>=2.8".
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
# A stamp of what is installed: when this hash changes, the next target installs again.
HASH := $(shell (cat pyproject.toml constraints.txt && echo '$(TORCH)') | (sha256sum 2>/dev/null || shasum -a 256) | cut -c1-12)
RUNTIME := $(VENV)/.runtime-$(HASH)
DEV := $(VENV)/.dev-$(HASH)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo install install-runtime test check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME)  ## train, distill, calibrate and report a small Pong agent (ARGS="..." for `rlexit run`)
	@$(BIN)/rlexit run pong_demo $(ARGS)

install: $(DEV)  ## make .venv with rlexit (editable), and what tests and checks need

install-runtime: $(RUNTIME)  ## the same without test and check tools

test: check  ## checks, then the tests (no network, no GPU); ARGS="..." for pytest
	@$(BIN)/python -m pytest $(ARGS)

check: $(DEV)  ## formatting, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(DEV)  ## measure speed as ratios (benchmarks/speed.py); ARGS="training distill ..." for some
	@$(BIN)/python benchmarks/speed.py $(ARGS)

clean:  ## remove .venv, builds and caches (never runs/)
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find agents benchmarks rlexit tests vision -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "rlexit: needs Python 3.11 or newer, found no '$(PYTHON)'. Install it, or say PYTHON=/path/to/python." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("rlexit: needs Python 3.11 or newer, \
	got %d.%d from $(PYTHON). Say PYTHON=/path/to/a/newer/python." % v[:2])'
	@"$(PYTHON)" -m venv --clear $(VENV)

$(RUNTIME): | $(BIN)/python
	@echo "rlexit: installing $(TORCH) and the runtime into $(VENV) (once; a minute or more)"
	@rm -f $(VENV)/.runtime-* $(VENV)/.dev-*
	@(sed '/^torch==/d' constraints.txt && echo '$(TORCH)') > $(VENV)/constraints.txt
	@$(PIP) '$(TORCH)'
	@$(PIP) --constraint $(VENV)/constraints.txt --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "rlexit: installing the tools of tests and checks into $(VENV) (once)"
	@$(PIP) --constraint $(VENV)/constraints.txt --editable '.[dev,vision,export]'
	@touch $@
