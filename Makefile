# make demo    pictures -> one token each -> answers and a map          make check   ruff, mypy, import layers
# make test    the tests: CPU, offline                                make docs    the documentation site, strict
# make study   tests of the study and the benchmarks                  make wheel   build the wheel, install it alone, use it
# make slow    the slow tests                                         make table   rebuild pages and plots from results
# make repeat  the tests RUNS times (10), to find flaky ones         make demo-photo  ask a trained `photo` (docs/photo.md)
# The first target that runs makes .venv from scratch.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Worker processes of the tests; each runs torch on one thread (tests/conftest.py).
JOBS ?= 2
DEMO_OUT ?= runs/demo
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations 10

export HF_HUB_OFFLINE := 1

RUNS ?= 10

.PHONY: help demo demo-photo test repeat study slow page wheel docs check table clean

help:
	@sed -n '1,6s/^# //p' Makefile

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py --out $(DEMO_OUT)

# No weights are shipped for it: make demo-photo MODEL=runs/photo/model PHOTO=cat.jpg (docs/photo.md).
MODEL ?= photo
PHOTO ?= examples/pictures/chelsea.jpg
demo-photo: $(READY)
	$(BIN)/htc-vlm ask $(PHOTO) "What is this?" "What kind of thing is this?" "Is there a cat?" --model $(MODEL)

test: $(READY)
	$(PYTEST) tests src --ignore tests/benchmarks

repeat: $(READY)
	scripts/repeat_tests.sh $(RUNS)

wheel: $(READY)
	$(BIN)/python -m pytest -q -m slow tests/test_wheel.py

# The server's page in Debian's Chromium, and a server process from start to SIGTERM.
page: $(READY)
	$(BIN)/python -m pytest -q -m slow tests/serve tests/cli/test_serve.py

study: $(READY)
	$(PYTEST) study tests/benchmarks

slow: $(READY)
	$(PYTEST) -m slow tests src study

docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

table: $(READY)
	$(BIN)/python -m study.pages

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build
