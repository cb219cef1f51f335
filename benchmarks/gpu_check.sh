#!/usr/bin/env bash
# What needs a GPU, in parts of one command and under nine minutes each: what is here, then the part, and a short table.
#
#   bash benchmarks/gpu_check.sh kernels         # the default: GPU tests, then, if they pass, subspace attention and
#                                                # ISTA against their peers
#   bash benchmarks/gpu_check.sh models          # growth with N, then whole models: CRATE, CRATE-MAE
#   bash benchmarks/gpu_check.sh models L/16 S/8 # these models alone; rows of others from the same commit stay
#   bash benchmarks/gpu_check.sh emergence       # the experiment of docs/emergence/protocol.md at its full size, or as
#                                                # much of it as fits. The next call continues: on another machine with the
#                                                # runs that were not finished from their start. Needs pycocotools
#
# The models have a gate of their own instead of the tests. Compiling takes most of their time: B/16 and B/8 come
# first, and where the time is up peers are left out, which a second call with the models' names makes good.
# Results go to benchmarks/results/, or to $OUT where that is set.
#
# Needs no network and no installation: Python with torch, triton, timm, einops and pytest ($PYTHON, else python3).
# $COMMIT names the commit where this copy of the tree is not a git checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
limit=520 # seconds for all of it
status=0
part=${1:-kernels}
models=("${@:2}")
if [[ ! $part =~ ^(kernels|models|emergence)$ ]] || [[ $part != models && ${#models[@]} -gt 0 ]]; then
    echo "usage: gpu_check.sh [kernels | models [MODEL ...] | emergence]" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

left() { # seconds left, at least 30
    local seconds=$((limit - SECONDS))
    echo $((seconds > 30 ? seconds : 30))
}

measure() { # per cent of the time left after which it tries to end, and after which it is ended; script and arguments
    local soft=$1 hard=$2 script=$3 seconds
    shift 3
    echo "== $script $*"
    seconds=$(left)
    timeout "$((seconds * hard / 100))" "$python" "benchmarks/$script" --rounds 3 --budget "$((seconds * soft / 100))" \
        --output "$results" ${COMMIT:+--commit "$COMMIT"} "$@" && return
    echo "$script: exit status $? (124: its time was up; what it had measured is kept)" >&2
    status=1
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

if [[ $part == emergence ]]; then
    report=docs/emergence/full # with the results of earlier calls
    "$python" -m crate_fast.cli reproduce emergence --size full --output runs/emergence/full --report "$report" \
        --minutes $((limit / 60)) || status=1
    if [[ -n ${OUT:-} && -d $report ]]; then
        tar -czf "$OUT/emergence_full.tar.gz" "$report"
    fi
    echo "== after $SECONDS s; results in ${OUT:+$OUT/emergence_full.tar.gz, as }$report"
    exit "$status"
elif [[ $part == models ]]; then
    if [[ ${#models[@]} -gt 0 ]]; then
        measure 85 100 bench_model.py --append --models "${models[@]}"
    else
        measure 20 30 bench_model.py --growth
        measure 85 100 bench_model.py
    fi
else
    echo "== GPU tests"
    others=$(grep -l "mark\.gpu" tests/test_*.py | grep -v tests/test_gpu.py || true)
    # shellcheck disable=SC2086  # the other files are words
    if ! CRATE_FAST_REQUIRE_GPU=1 timeout 240 "$python" -m pytest -o addopts="-ra --strict-markers" \
        -p no:cacheprovider -q -m gpu tests/test_gpu.py $others; then
        echo "the GPU tests fail: no numbers" >&2
        exit 1
    fi
    measure 45 60 bench_mssa.py
    measure 80 100 bench_ista.py
fi

echo "== after $SECONDS s; results in $results"
"$python" benchmarks/update_readme.py --show "$results"
exit "$status"
