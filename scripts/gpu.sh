#!/bin/sh
# Measure on one GPU what can only be measured there, in under 8 minutes; without a network and without vLLM.
#
#   scripts/gpu.sh                  # writes benchmarks/results/gpu.json, after every part
#   scripts/gpu.sh --rehearse       # the same code on the CPU with tiny shapes
#   scripts/gpu.sh --parts head     # some parts only; --seconds 300 leaves out what would not fit
#   scripts/gpu.sh --wheels         # before, where there is a network: fetch what the machine may lack, under 60 MB, into
#                                   # build/gpu-wheels (git ignores it; copy it along); --python 3.12 for that version
#
# Parts, in order, with the seconds that each is expected to take on one H100 (PARTS in benchmarks/gpu.py):
#   parity     40   scoring and every objective on the GPU against the CPU; float32 to 1e-5, bfloat16 as printed
#   tests      45   tests that are skipped without a GPU
#   head       60   head and loss at [8192, 4096, 151936] against dense torch, and Liger if it is installed
#   scoring   100   8B-shaped random weights: forward pass, with logits, whole score stage to Zarr; peak memory
#   training  120   a step of the 1.7B and 0.6B students, cached and with a live 8B teacher
#   sampling   50   the transformers engine on a 1.7B student
#
# PYTHON chooses the interpreter (default: .venv/bin/python), which must have torch for CUDA and transformers. Other packages
# that it lacks are unpacked from build/gpu-wheels (WHEELS names another folder); nothing is installed into it.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
wheels=${WHEELS:-build/gpu-wheels}
if [ "${1:-}" = --wheels ]; then
    shift
    exec "$python" scripts/gpu_wheels.py fetch "$wheels" "$@"
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$wheels" ]; then
    "$python" scripts/gpu_wheels.py unpack "$wheels" build/gpu-packages
    PYTHONPATH="$PYTHONPATH:$PWD/build/gpu-packages"
fi
HF_HUB_OFFLINE=1
export PYTHONPATH HF_HUB_OFFLINE
exec "$python" -m benchmarks.gpu "$@"
