# syntax=docker/dockerfile:1
# eopd with the GPU builds of torch (CUDA 13) and vLLM. The driver comes from the host, through the NVIDIA Container Toolkit.
#
#   docker build --build-arg VERSION=$(git describe --tags --abbrev=0 | tr -d v) -t eopd .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/experiment" -v "$HOME/.cache/huggingface:/huggingface" eopd run mine.yaml
FROM python:3.12-slim-bookworm

# Triton compiles kernels at run time; python:3.12 has Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/*

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
ENV UV_SYSTEM_PYTHON=1 UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy HF_HOME=/huggingface

# What eopd depends on: this layer is made again only if these files change, not with the code.
WORKDIR /source
COPY pyproject.toml ./
COPY scripts/constraints-gpu.txt scripts/overrides-gpu.txt scripts/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --torch-backend=cu130 --constraint scripts/constraints-gpu.txt --override scripts/overrides-gpu.txt \
        --requirements pyproject.toml --extra vllm --extra all

COPY . .
ARG VERSION=0.1.0
RUN --mount=type=cache,target=/root/.cache/uv \
    SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION" uv pip install --no-deps . \
 && eopd plan quickstart

WORKDIR /experiment
ENTRYPOINT ["eopd"]
CMD ["doctor"]
