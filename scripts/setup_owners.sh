#!/usr/bin/env bash
# Fetch the libraries whose files we read, for tests/formats: `scripts/setup_owners.sh [OWNER...]`.
#
# Each gets .owners/<owner>, which goes before .venv on the path: what it pins against us (repeng
# needs numpy 1) is hidden there, and torch and transformers come from .venv, which is left alone.
# Installed without dependencies: what follows an owner's name is what its own modules import and
# .venv lacks. About 360 MB in all, under a minute. Does nothing for an owner
# that is there.
#
# Prints what belongs on PYTHONPATH for each. An owner that cannot be had is told in one line; the
# others are still fetched, and it fails at the end.
set -uo pipefail
cd "$(dirname "$0")/.."

declare -A PINS=(
  [datasets]="datasets==5.2.0 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 xxhash==4.1.0
    simple-parsing==0.1.9"   # not an owner: what two of them share
  [sae_lens]="sae-lens==6.54.0 transformer-lens==3.9.0 better-abc==0.0.3 jaxtyping==0.3.11
    platformdirs==4.14.7 wandb==0.31.0"
  [sparsify]="eai-sparsify==1.3.3 accelerate==1.15.0 natsort==8.4.0 schedulefree==1.4.1"
  [circuit_tracer]="circuit-tracer==0.5.0"
  [repeng]="repeng==0.4.0 numpy==1.26.4"
)
OWNERS=(sae_lens sparsify circuit_tracer repeng)
[ $# -eq 0 ] || OWNERS=("$@")

python=.venv/bin/python
version=$("$python" -c 'import sys; print("python", *sys.version_info[:2])') || exit 1

fetch() { # FOLDER: unpack its wheels where they are not there yet; all or nothing
  local folder=.owners/$1 want="$version ${PINS[$1]}"
  [ "$(cat "$folder/.pins" 2>/dev/null)" != "$want" ] || return 0
  echo "owners: fetching $1" >&2
  rm -rf "$folder" "$folder.part"
  # shellcheck disable=SC2086
  "$python" -m pip --disable-pip-version-check -q --retries 1 --timeout 20 install --no-deps \
    --no-compile --only-binary :all: --target "$folder.part" ${PINS[$1]} 2>"$folder.log" || return 1
  echo "$want" > "$folder.part/.pins"
  mv "$folder.part" "$folder"
}

status=0
mkdir -p .owners
for owner in "${OWNERS[@]}"; do
  [ -n "${PINS[$owner]:-}" ] || { echo "owners: nobody knows $owner" >&2; exit 2; }
  folders=("$owner")
  case $owner in sae_lens | sparsify) folders+=(datasets) ;; esac
  for folder in "${folders[@]}"; do
    fetch "$folder" && continue
    echo "owners: $owner: $(grep -v WARNING ".owners/$folder.log" | tail -n 1)" >&2
    status=1
    continue 2
  done
  (IFS=: && echo "${folders[*]/#/$PWD/.owners/}")
done
exit $status
