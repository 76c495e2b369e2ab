#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build sdist -> wheel -> manylinux wheel in dist/, then install it in a fresh environment and try it there
# with a PATH that holds no compiler.  usage: scripts/make_wheel.sh PYTHON TORCH_REQUIREMENT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath --no-symlinks "$1")
read -ra torch <<<"$2"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --no-isolation --outdir "$work" .

# torch's own libraries are never bundled: the process has them loaded. The platform tag is the lowest that
# the symbols of this toolchain's C and C++ libraries allow.
mkdir -p dist
PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair \
    --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$work/repaired" "$work"/*.whl

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "${torch[@]}"
"$work/venv/bin/python" -m pip install --quiet "$work"/repaired/*.whl
cp scripts/smoke_test.py "$work"
(cd "$work" && env -i PATH="$work/venv/bin" HOME="$work" "$work/venv/bin/python" smoke_test.py)

cp "$work"/*.tar.gz "$work"/repaired/*.whl dist/
ls -l dist
