#!/usr/bin/env bash
# Generate dashboards/generated from dashboards/settings.yaml and the exporter's instruments; with
# --check, only say whether it is up to date. Other arguments: --settings FILE, --out FOLDER. With
# --types, check the generator's types instead.
#
# Grafana's Foundation SDK stays out of .venv: only this needs it, and its versions carry an epoch
# that names the Grafana they were made for.
set -euo pipefail
cd "$(dirname "$0")/.."

sdk='grafana-foundation-sdk==1769699796!10.4.0'
folder=.cache/dashboards
if [[ "$(cat "$folder/.pin" 2>/dev/null)" != "$sdk" ]]; then
  rm -rf "$folder"
  .venv/bin/python -m pip --disable-pip-version-check -q install --no-deps --only-binary :all: \
    --target "$folder" "$sdk"
  echo "$sdk" >"$folder/.pin"
fi
if [[ "${1:-}" == --types ]]; then
  MYPYPATH="plugin:dashboards:$folder" exec .venv/bin/mypy -p steerscope_dashboards
fi
PYTHONPATH="dashboards:$folder" exec .venv/bin/python -m steerscope_dashboards "$@"
