"""Fixtures of the stages' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture
def attention_in_half_precision() -> Iterator[None]:
    """Let attention work in half precision where instructions of the processor are forbidden.

    Torch's fused kernel looks at the processor alone, and fails on one with AMX that may not use it.
    """
    limited = not {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"}.isdisjoint(os.environ)
    with sdpa_kernel(SDPBackend.MATH) if limited else nullcontext():
        yield


@pytest.fixture(autouse=True)
def vllm_inspects_models_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the process that vLLM starts for each architecture it has not met, about 10 s each in a fresh home.

    It protects vLLM's own process from initialising CUDA.
    """
    if request.node.get_closest_marker("vllm") and not torch.cuda.is_available():
        registry = pytest.importorskip("vllm.model_executor.models.registry", reason="needs vLLM")
        monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
