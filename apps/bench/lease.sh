#!/usr/bin/env bash
# A GPU for a few minutes: bash apps/bench/lease.sh [OUT] [SECONDS] [-- options of genattn.apps.bench.gpu]
# Installs the wheels that were carried along in wheels/ (none is needed where torch, triton and numpy are there), runs the
# benchmark, and leaves rows, log.txt and verdict.md in OUT.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-${OUT:-$root/out/gpu}}
seconds=${2:-290}
shift $(($# < 2 ? $# : 2))
mkdir -p "$out"
python=$(command -v python3 || command -v python)
{ date -u; "$python" --version; nvidia-smi -L; } >"$out/machine.txt" 2>&1
if compgen -G "$root/wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$root/build/carried" "$root"/wheels/*.whl >>"$out/machine.txt" 2>&1
fi
# the checkout's folders under the name that they import as
mkdir -p "$root/build/lease/genattn"
for folder in "$root"/genattn/* "$root"/kernels "$root"/guidance "$root"/pipelines "$root"/apps; do
  ln -sfn "$folder" "$root/build/lease/genattn/$(basename "$folder")"
done
export PYTHONPATH="$root/build/lease:$root/build/carried${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$root/build/triton}" GENATTN_CACHE="${GENATTN_CACHE:-$root/build/cache}"
exec "$python" -m genattn.apps.bench.lease --seconds "$seconds" "$out" "$@"
