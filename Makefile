# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself.
SHELL := /bin/bash
BIN := .venv/bin
SOURCES := plugin/steerscope tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test serve oracle test-matrix fmt lint type protos

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## make .venv (vLLM for CPU, the plugin, the tools)
	@scripts/setup.sh

demo: setup ## serve the embedded model and tell the whole story; leaves .demo/report.json
	@$(BIN)/steerscope demo story

serve: setup ## the demo server in the foreground: vLLM on 8000, gRPC on 50051, metrics on 9464
	@$(BIN)/steerscope demo serve

test: setup ## all tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

oracle: setup ## every exactness suite in full, one JSON line each (about 20 minutes on two cores)
	@$(BIN)/python tests/engine/suites.py $(SUITES)

test-matrix: setup ## the seams and parity on several releases of vLLM
	@scripts/test_matrix.sh $(VERSIONS)

fmt: setup ## format the code
	@$(BIN)/ruff check --fix -q $(SOURCES)
	@$(BIN)/ruff format -q $(SOURCES)

lint: setup ## ruff, import contracts, protos and their generated code
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check -q $(SOURCES)
	@$(BIN)/lint-imports
	@$(BIN)/buf lint proto
	@$(BIN)/buf breaking proto --against proto/baseline.binpb
	@scripts/generate_protos.sh --check

type: setup ## mypy, strict
	@$(BIN)/mypy

protos: setup ## regenerate plugin/steerscope/api from proto/
	@scripts/generate_protos.sh
