# make demo    pictures -> one token each -> answers and a heatmap       make check   ruff, mypy, import layers
# make test    the tests: CPU, offline                                    make table   rebuild the tables from results/
# The first target that runs makes .venv from scratch.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Worker processes of `make test`; each runs torch on one thread (tests/conftest.py).
JOBS ?= 2
DEMO_OUT ?= runs/demo
BIN := .venv/bin
READY := .venv/.ready

export HF_HUB_OFFLINE := 1

.PHONY: help demo test check table clean

help:
	@sed -n '1,3s/^# //p' Makefile

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py --out $(DEMO_OUT)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations 10

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

table: $(READY)
	$(BIN)/python study/page.py
	$(BIN)/python study/readme.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
