#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: what is here, the GPU tests, then, if they pass,
# subspace attention and ISTA against their peers, and a short table.
#
#   bash benchmarks/gpu_check.sh     # results to benchmarks/results/, or to $OUT where that is set
#
# Needs no network and no installation: Python with torch, triton, timm, einops and pytest ($PYTHON, else python3).
# $COMMIT names the commit where this copy of the tree is not a git checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
limit=520 # seconds for all of it
status=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

left() { # seconds left, at least 30
    local seconds=$((limit - SECONDS))
    echo $((seconds > 30 ? seconds : 30))
}

echo "== environment"
"$python" -m crate_fast.env
"$python" - <<'PYTHON'
import os

import triton

version = tuple(int(number) for number in triton.__version__.split(".")[:2])
if version < (3, 9) and not os.environ.get("TRITON_PTXAS_PATH"):
    print(
        f"warning: triton {triton.__version__} brings a ptxas older than 13.3, which can miscompile register-operand "
        "WGMMA on Hopper without a word (triton issue 9433): set TRITON_PTXAS_PATH to a newer one"
    )
PYTHON

echo "== GPU tests"
others=$(grep -l "mark\.gpu" tests/test_*.py | grep -v tests/test_gpu.py || true)
# shellcheck disable=SC2086  # the other files are words
if ! CRATE_FAST_REQUIRE_GPU=1 timeout 240 "$python" -m pytest -o addopts="-ra --strict-markers" -p no:cacheprovider \
    -q -m gpu tests/test_gpu.py $others; then
    echo "the GPU tests fail: no numbers" >&2
    exit 1
fi

measure() { # script, per cent of the time left after which it tries to end, and after which it is ended
    echo "== $1"
    local seconds
    seconds=$(left)
    timeout "$((seconds * $3 / 100))" "$python" "benchmarks/$1" --rounds 3 --budget "$((seconds * $2 / 100))" \
        --output "$results" ${COMMIT:+--commit "$COMMIT"} && return
    echo "$1: exit status $? (124: its time was up; what it had measured is kept)" >&2
    status=1
}
measure bench_mssa.py 45 60
measure bench_ista.py 80 100

echo "== after $SECONDS s; results in $results"
"$python" benchmarks/update_readme.py --show "$results"
exit "$status"
