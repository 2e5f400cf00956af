#!/usr/bin/env bash
# Sets up .venv with every version pinned. A second run takes a moment. Which build of torch it is (CPU or CUDA) is what pip
# finds on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.ready
wanted=$(cat pyproject.toml constraints.txt infra/setup.sh | sha256sum | cut -c1-16)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

missing=()
command -v python3.11 >/dev/null || missing+=(python3.11)
if command -v python3.11 >/dev/null; then
  python3.11 -c 'import ensurepip' 2>/dev/null || missing+=(python3.11-venv)
  python3.11 -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
    missing+=(python3.11-dev)
fi
for tool in g++ make git; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: missing ${missing[*]}. Install with: apt-get install -y ${missing[*]}" >&2
  exit 2
fi

echo "setup: making .venv (some minutes, once)"
python3.11 -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
# As variables they also reach the environments that pip makes to build packages in; newer pips have one for these alone.
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_BUILD_CONSTRAINT="$PWD/constraints.txt"
# torch first, so that what depends on it takes this build.
pip install torch
pip install --editable '.[dev]'

echo "setup: building DeepSpeed's operators for CPUs into .venv/torch_extensions (some minutes, once)"
.venv/bin/python - >.venv/deepspeed-build.log 2>&1 <<'PYTHON' ||
from pipelines import zero

zero.import_deepspeed(gpu=False)
for operator in ("ShareMemCommBuilder", "CPUAdamBuilder"):
    zero.load_operator(operator)
PYTHON
  { echo "setup: the build failed; see .venv/deepspeed-build.log" >&2; exit 1; }
echo "$wanted" >"$stamp"
