"""The LM head: what turns a final hidden state into logits, with every trait an architecture adds after it.

Read by the statistics head (``stages.score``) and by the student head (``stages.train``).
Letters: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LMHead:
    """``logits = scale * softcap(hidden @ weight.T + bias)`` over exactly the model's own ``vocab_size`` rows.

    A padded vocabulary (151,936 rows for 151,669 tokens) keeps its padding: the model's distribution has it.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    vocab_size: int

    def __post_init__(self) -> None:
        if self.weight.shape[0] != self.vocab_size:
            raise ValueError(
                f"the LM head has {self.weight.shape[0]} rows, the model's config.vocab_size is {self.vocab_size}: "
                "the model folder and its config do not belong together"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden [T, D], in float32 whatever the inputs' dtype; temperature is not applied.

        Differentiable. Products of low-precision inputs are exact in float32 and are accumulated there: rounding
        logits to bfloat16 costs 0.03 nats a token.
        """
        bias = None if self.bias is None else self.bias.float()
        return self.finish(F.linear(hidden.float(), self.weight.float(), bias))

    def logits_into(self, out: Tensor, hidden: Tensor, ids: slice, temperature: float) -> None:
        """Logits of the head's rows ``ids`` at a temperature, written to ``out`` [T, ids]; not differentiable.

        From hidden [T, D] of the head's dtype, which on a CPU is float32.
        """
        weight = self.weight[ids]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=out)
        else:  # CUDA: low-precision operands, products exact and summed in float32
            out.copy_(torch.mm(hidden, weight.T, out_dtype=torch.float32))
        if self.bias is not None:
            out.add_(self.bias[ids].float())
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        factor = self.scale / temperature
        if factor != 1.0:
            out.mul_(factor)

    def finish(self, raw: Tensor) -> Tensor:
        """Soft-capping and scale of ``raw = hidden @ weight.T + bias`` (any shape), out of place."""
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw if self.scale == 1.0 else raw * self.scale

    def to(self, device: torch.device | str) -> LMHead:
        """The same head on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def float(self) -> LMHead:
        """The same head with float32 weights (one copy for many calls), without gradient."""
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().float(), bias=bias)


@dataclass(frozen=True)
class HeadTraits:
    """What an architecture does to logits after the matrix product, read from its config."""

    scale: Callable[[Any], float] = lambda config: 1.0
    softcap: Callable[[Any], float | None] = lambda config: None


_PLAIN = HeadTraits()
_CAPPED = HeadTraits(softcap=lambda config: config.final_logit_softcapping)
_MULTIPLIED = HeadTraits(scale=lambda config: float(config.logit_scale))
_DIVIDED = HeadTraits(scale=lambda config: 1.0 / float(config.logits_scaling))

# Every entry is covered by the parity test against the model's own logits: add one together with its test.
ARCHITECTURES: dict[str, HeadTraits] = {
    "CohereForCausalLM": _MULTIPLIED,
    "Cohere2ForCausalLM": _MULTIPLIED,
    "GemmaForCausalLM": _PLAIN,
    "Gemma2ForCausalLM": _CAPPED,
    "Gemma3ForCausalLM": _CAPPED,
    "GPT2LMHeadModel": _PLAIN,
    "GraniteForCausalLM": _DIVIDED,
    "GraniteMoeForCausalLM": _DIVIDED,
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "MixtralForCausalLM": _PLAIN,
    "Olmo2ForCausalLM": _PLAIN,
    "PhiForCausalLM": _PLAIN,  # with an LM-head bias
    "Phi3ForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen2MoeForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
}


def head_traits(architecture: str, source: str) -> HeadTraits:
    """Traits of a model class known to be right.

    Raises:
        ValueError: the architecture is not known; naming it, ``source`` and the known ones.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{source}: architecture {architecture!r} is refused, because nobody has shown that its logits are "
            f"scale * softcap(hidden @ W.T + b) with known traits. Known: {', '.join(sorted(ARCHITECTURES))}. "
            "Add it to stages/models/lm_head.py together with its parity test."
        )
    return ARCHITECTURES[architecture]


def unwrap(model: nn.Module) -> Any:
    """The causal model inside wrappers: DistributedDataParallel, torch.compile and PEFT."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):  # PEFT puts its adapters into the base model's own layers
            inner = inner.get_base_model()
        elif type(inner).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def architecture_of(model: nn.Module) -> str:
    """Class name of the causal model inside ``model``; FSDP2 puts a prefix before it, which is dropped."""
    return type(unwrap(model)).__name__.removeprefix("FSDP")


def lm_head_of(model: nn.Module) -> LMHead:
    """The LM head of a loaded model; it shares the model's weights, gradients included.

    Raises:
        ValueError: an unknown architecture, or an output layer that is no plain linear layer (a quantised or
            adapter-wrapped one).
    """
    inner = unwrap(model)
    config = inner.config
    traits = head_traits(architecture_of(model), str(getattr(config, "_name_or_path", "") or "model"))
    layer = inner.get_output_embeddings()
    if type(layer).__name__.removeprefix("FSDP") != "Linear":
        raise ValueError(
            f"{type(inner).__name__}: its output layer is a {type(layer).__name__}, not a plain linear layer, and is "
            "refused: keep the LM head out of quantisation and of adapters"
        )
    config = config.get_text_config()
    return LMHead(layer.weight, layer.bias, traits.scale(config), traits.softcap(config), config.vocab_size)
