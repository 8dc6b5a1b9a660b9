# The two commands of the README are `make demo` and `make test`; each sets up .venv by itself.
SHELL := /bin/bash
BIN := .venv/bin
SOURCES := plugin/steerscope tests dashboards

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz serve oracle test-matrix fmt lint type protos dashboards dashboards-previews metrics-reference bench

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

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

fuzz: setup ## fuzz every decoder, guided by coverage (half an hour; RUNS=20000 for a short run)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[fuzz]"
	@$(BIN)/python tests/fuzz/fuzz_run.py $(if $(RUNS),--runs $(RUNS)) $(TARGETS)

bench: setup ## what Steerscope costs beside plain compiled vLLM, step by step (an idle machine; an hour and three quarters)
	@$(BIN)/python tests/bench/bench.py $(BENCH_ARGS)

test-matrix: setup ## the seams and parity on several releases of vLLM
	@scripts/test_matrix.sh $(VERSIONS)

fmt: setup ## format the code
	@$(BIN)/ruff check --fix -q $(SOURCES)
	@$(BIN)/ruff format -q $(SOURCES)

lint: setup ## ruff, import contracts, protos, and whether what is generated is up to date
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check -q $(SOURCES)
	@$(BIN)/lint-imports
	@$(BIN)/buf lint proto
	@$(BIN)/buf breaking proto --against proto/baseline.binpb
	@scripts/generate_protos.sh --check
	@scripts/generate_dashboards.sh --check
	@scripts/generate_metrics_reference.sh --check

type: setup ## mypy, strict
	@$(BIN)/mypy
	@scripts/generate_dashboards.sh --types

protos: setup ## regenerate plugin/steerscope/api from proto/
	@scripts/generate_protos.sh

dashboards: setup ## regenerate dashboards/generated (Grafana, rules) from dashboards/settings.yaml
	@scripts/generate_dashboards.sh

metrics-reference: setup ## regenerate docs/metrics.md from the exporter's instruments and dashboards/generated
	@scripts/generate_metrics_reference.sh

dashboards-previews: setup ## draw dashboards/previews from a real Prometheus (PROMETHEUS=url for your own)
	@scripts/install_prometheus.sh
	@$(BIN)/python tests/dashboards/make_previews.py $(PROMETHEUS)
