#!/bin/sh
# mypy cannot follow the import hook of an editable install that maps top-level folders to eopd.*; it can follow links.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .venv/typed/eopd
for package in pipeline stages storage; do ln -sfn "$PWD/$package" .venv/typed/eopd/$package; done
MYPYPATH=.venv/typed exec .venv/bin/mypy --namespace-packages --explicit-package-bases \
    -p eopd.pipeline -p eopd.stages -p eopd.storage
