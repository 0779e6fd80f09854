#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command of less than 9 minutes:
#     benchmarks/gpu/run.sh OUT [--device cpu --shape tiny] [--parts kernels,exactness,…]
# Needs torch >= 2.11 with CUDA and what run.py names; nothing is fetched. A missing msgspec is installed from a wheel
# in .whl/ of the repository. PYTHON chooses the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
out=${1:?usage: run.sh OUT [--device cpu --shape tiny] [--parts NAME,…]}
shift
mkdir -p "$out"
extra=$(mktemp -d)
trap 'rm -rf "$extra"' EXIT
if ! "$python" -c 'import msgspec' 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$extra" "$root"/.whl/msgspec-*.whl ||
        { echo "msgspec is missing: put a wheel of it into $root/.whl/ (pip download --no-deps msgspec)" >&2; exit 2; }
fi
if ! "$python" -c 'from importlib.metadata import version; version("polymoe")' 2>/dev/null; then
    # Run from the source tree: the package asks for its own version.
    mkdir "$extra/polymoe-0+source.dist-info"
    printf 'Metadata-Version: 2.1\nName: polymoe\nVersion: 0+source\n' > "$extra/polymoe-0+source.dist-info/METADATA"
fi
export PYTHONPATH="$root/src:$here:$extra${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
# One cache of compiled kernels and their configurations for all parts, and for the next run on this machine.
cache=${TMPDIR:-/tmp}/polymoe-gpu
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$cache}
"$python" "$here/run.py" "$out" "$@"
