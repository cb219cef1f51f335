#!/usr/bin/env bash
# What needs a GPU, in one call that ends in time and brings everything back: see gpu_check.py.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
