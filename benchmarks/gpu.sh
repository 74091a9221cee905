#!/bin/sh
# Measure this project on a machine with a GPU, from a source tree that is not installed: see gpu.py. PYTHON chooses a Python.
root=$(dirname "$(dirname "$(realpath "$0")")")
PYTHONPATH="$root:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
