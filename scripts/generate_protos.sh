#!/usr/bin/env bash
# Generate plugin/steerscope/api/v1 from proto/; with --check, only say whether it is up to date.
#
# The generators are the oldest that serve: the protobuf runtime refuses generated code that is
# newer than itself, and the plugin goes into environments whose runtime we do not choose.
#
# proto/baseline.binpb is the API as last released; `make lint` refuses what breaks it. At a
# release: .venv/bin/buf build proto --exclude-source-info -o proto/baseline.binpb
set -euo pipefail
cd "$(dirname "$0")/.."

tools=(grpcio-tools==1.71.2 grpcio==1.71.2 protobuf==5.29.6 mypy-protobuf==3.6.0 "setuptools<80")
venv=.cache/protos-venv
out=plugin/steerscope/api/v1

if [[ "$(cat "$venv/tools" 2>/dev/null)" != "${tools[*]}" ]]; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${tools[@]}"
  echo "${tools[*]}" >"$venv/tools"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -W ignore -m grpc_tools.protoc -I proto \
  --python_out="$work" --grpc_python_out="$work" --mypy_out="quiet:$work" \
  --mypy_grpc_out="quiet:$work" proto/steerscope/v1/*.proto

# The proto package is steerscope.v1; its Python home is steerscope.api.v1.
generated="$work/steerscope/v1"
sed -i -e 's/from steerscope\.v1 import/from steerscope.api.v1 import/' \
  -e 's/steerscope\.v1\.\([a-z]*_pb2\)/steerscope.api.v1.\1/g' "$generated"/*
echo '"""Generated from proto/steerscope/v1 by scripts/generate_protos.sh; do not edit."""' \
  >"$generated/__init__.py"

if [[ "${1:-}" == --check ]]; then
  diff -ru --exclude=__pycache__ "$out" "$generated" >&2 || {
    echo "generated stubs differ from proto/: run scripts/generate_protos.sh" >&2
    exit 1
  }
else
  mkdir -p "$out"
  rm -f "$out"/*.py "$out"/*.pyi
  cp "$generated"/* "$out"
fi
