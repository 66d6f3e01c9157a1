"""Fixtures of the stages' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """Attention by torch's plain operations.

    Its fused kernel for bfloat16 looks at the processor alone, and fails on one with AMX for which
    ``ATEN_CPU_CAPABILITY`` or ``ONEDNN_MAX_CPU_ISA`` forbids those instructions.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def vllm_inspects_models_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the process that vLLM starts for each architecture it has not met, about 10 s each in a fresh home.

    It protects vLLM's own process from initialising CUDA.
    """
    if request.node.get_closest_marker("vllm") and not torch.cuda.is_available():
        registry = pytest.importorskip("vllm.model_executor.models.registry", reason="needs vLLM")
        monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
