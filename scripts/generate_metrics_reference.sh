#!/usr/bin/env bash
# Generate docs/metrics.md from the exporter's instruments and dashboards/generated; with --check,
# only say whether it is up to date. Other arguments: --out FILE.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHONPATH=dashboards exec .venv/bin/python -m steerscope_dashboards.reference "$@"
