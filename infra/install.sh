#!/usr/bin/env bash
# For infra/Dockerfile: the packages of one kind of image, `cpu` or `cuda`, into the Python that is first on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1

pip install --constraint constraints.txt setuptools ninja py-cpuinfo packaging
if [ "$kind" = cpu ]; then
  pip install --constraint constraints.txt --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" torch
else
  pip install --constraint constraints.txt torch # PyPI's is the one for CUDA
fi

# DeepSpeed compiles for the very processor that builds the image. This compiler has the last word: any with AVX2.
compiler=$(mktemp)
trap 'rm -f "$compiler"' EXIT
# shellcheck disable=SC2016 # "$@" is the compiler's
printf '#!/bin/sh\nexec g++ "$@" -march=x86-64-v3 -mtune=generic -U__AVX512__ -D__AVX256__\n' >"$compiler"
chmod +x "$compiler"
CC=$compiler CXX=$compiler DS_ACCELERATOR=cpu DS_BUILD_CPU_ADAM=1 DS_BUILD_SHM_COMM=1 \
  pip install --constraint constraints.txt --no-deps --no-build-isolation --no-cache-dir deepspeed
if [ "$kind" = cuda ]; then
  # The Adam of CPU memory is the same beside a GPU; DeepSpeed takes it if it is said to be for one. To build it as such
  # would want the whole toolkit of CUDA.
  deepspeed=$(python -c 'from importlib.util import find_spec; print(*find_spec("deepspeed").submodule_search_locations)')
  sed -i "s/^accelerator_name='cpu'$/accelerator_name='cuda'/" "$deepspeed/git_version_info_installed.py"
fi

touch README.md # which pyproject.toml names, and which changes more often than packages do
pip install --constraint constraints.txt --editable '.[all]'
