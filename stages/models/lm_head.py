"""The LM head: final hidden states to logits, with every trait that an architecture adds after the product.

Used by the statistics head (``stages.score``) and by the student head (``stages.train``). Letters: T tokens, V
vocabulary, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eopd.stages.models.weight_files import StoredTensor, read_tensors
from eopd.storage.errors import InputError


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
        """Return logits [T, V] of hidden [T, D], in float32 whatever the inputs' dtype; temperature is not applied.

        Differentiable. Products of low-precision inputs are exact in float32 and are accumulated there: rounding
        logits to bfloat16 costs 0.03 nats a token.
        """
        bias = None if self.bias is None else self.bias.float()
        return self.finish(F.linear(hidden.float(), self.weight.float(), bias))

    def logits_into(self, out: Tensor, hidden: Tensor, ids: slice, temperature: float) -> None:
        """Write logits of the head's rows ``ids`` at a temperature to ``out`` [T, ids]; not differentiable.

        From hidden [T, D] of the head's dtype, which on a CPU is float32.
        """
        weight = self.weight[ids]
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=out)
        else:  # CUDA: low-precision operands, products exact and summed in float32
            torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
        if self.bias is not None:
            out.add_(self.bias[ids].float())
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        factor = self.scale / temperature
        if factor != 1.0:
            out.mul_(factor)

    def finish(self, raw: Tensor) -> Tensor:
        """Apply soft-capping and scale to ``raw = hidden @ weight.T + bias`` (any shape), out of place."""
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw if self.scale == 1.0 else raw * self.scale

    def to(self, device: torch.device | str) -> LMHead:
        """Return the same head on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def float(self) -> LMHead:
        """Return the same head with float32 weights (one copy for many calls), without gradient."""
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().float(), bias=bias)


@dataclass(frozen=True)
class HeadTraits:
    """Scales and soft-capping that an architecture applies to logits after the matrix product, read from its config."""

    scale: Callable[[Any], float] = lambda config: 1.0
    softcap: Callable[[Any], float | None] = lambda config: None


_PLAIN = HeadTraits()
_CAPPED = HeadTraits(softcap=lambda config: config.final_logit_softcapping)
_MULTIPLIED = HeadTraits(scale=lambda config: float(config.logit_scale))
_DIVIDED = HeadTraits(scale=lambda config: 1.0 / float(config.logits_scaling))

# Needed only when the head is read from a model folder without loading the model (vLLM); a loaded model is measured.
STORED_ARCHITECTURES: dict[str, HeadTraits] = {
    "Cohere2ForCausalLM": _MULTIPLIED,
    "CohereForCausalLM": _MULTIPLIED,
    "Ernie4_5ForCausalLM": _PLAIN,
    "Exaone4ForCausalLM": _PLAIN,
    "Gemma2ForCausalLM": _CAPPED,
    "Gemma3ForCausalLM": _CAPPED,
    "GemmaForCausalLM": _PLAIN,
    "Glm4ForCausalLM": _PLAIN,
    "Glm4MoeForCausalLM": _PLAIN,
    "GPT2LMHeadModel": _PLAIN,
    "GPTJForCausalLM": _PLAIN,  # with an LM-head bias
    "GptOssForCausalLM": _PLAIN,
    "GraniteForCausalLM": _DIVIDED,
    "GraniteMoeForCausalLM": _DIVIDED,
    "LlamaForCausalLM": _PLAIN,
    "Ministral3ForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "MixtralForCausalLM": _PLAIN,
    "NemotronForCausalLM": _PLAIN,
    "Olmo2ForCausalLM": _PLAIN,
    "OlmoeForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _PLAIN,
    "PhiForCausalLM": _PLAIN,  # with an LM-head bias
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen2MoeForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
    "StableLmForCausalLM": _PLAIN,
}


def head_traits(architecture: str, folder: Path) -> HeadTraits:
    """Return traits of a model class whose LM head may be read without loading the model.

    Raises:
        InputError: the architecture is not known.
    """
    if architecture not in STORED_ARCHITECTURES:
        raise InputError(
            f"the LM head of architecture {architecture!r} cannot be read from its folder alone, because what the "
            f"model does to its logits is known only for {', '.join(sorted(STORED_ARCHITECTURES))}",
            setting="score.engine",
            file=folder,
            remedy="Set score.engine: transformers, which measures it.",
        )
    return STORED_ARCHITECTURES[architecture]


def unwrap(model: nn.Module) -> Any:
    """Return the causal model inside wrappers: DistributedDataParallel, torch.compile and PEFT."""
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


def lm_head_of(model: nn.Module) -> LMHead:
    """Return the LM head of a loaded model; it shares the model's weights, gradients included.

    The first call for a model measures it (``traits_of``), so make it before the model is wrapped or sharded.

    Raises:
        ValueError: a model whose logits are not ``scale * softcap(hidden @ W.T + b)``, or an output layer that is no
            plain linear layer (a quantised or adapter-wrapped one).
    """
    inner = unwrap(model)
    traits = traits_of(inner)
    layer = inner.get_output_embeddings()
    return LMHead(layer.weight, layer.bias, traits.scale, traits.softcap, inner.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class ModelTraits:
    """The path of a loaded model from token ids to logits."""

    decoder: Any  # the module whose last hidden state the LM head reads: of a multimodal model, its language model
    takes_positions: bool  # whether the decoder accepts position_ids
    hidden_scale: float  # the LM head reads this many times the decoder's last hidden state
    scale: float
    softcap: float | None


_MEASURED: WeakKeyDictionary[nn.Module, ModelTraits] = WeakKeyDictionary()
_WIDEST_TEST_LOGIT = 64.0
_PROBE_TOKENS = 6


def traits_of(inner: Any) -> ModelTraits:
    """Measure the traits of an unwrapped model, once, by two short forward passes.

    In the model's own forward pass the output of its LM head is replaced by a ramp of known logits, so what the model
    makes of them shows its scale and soft-cap exactly, whatever its weights and dtype. The input of the LM head shows
    which module's hidden states it reads.

    Raises:
        ValueError: the model does something else between hidden states and logits; it names the class.
    """
    if inner not in _MEASURED:
        with torch.no_grad(), evaluating(inner), torch.autocast(inner.device.type, enabled=False):
            _MEASURED[inner] = _measure(inner)
    return _MEASURED[inner]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode for the block, then restore the mode of each."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def probe_ids(config: Any, count: int) -> list[int]:
    """Return fixed pseudo-random token ids, without the special ones that the config names (image tokens, padding)."""
    special = {
        int(value)
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if "token" in name and isinstance(value, int) and not isinstance(value, bool)
    }
    plain = [token for token in range(config.get_text_config().vocab_size) if token not in special]
    return [plain[int(word % len(plain))] for word in np.random.PCG64(count).random_raw(count)]


def refusal(model: Any, problem: str, remedy: str = "") -> InputError:
    """Return an error about a loaded model, which names its class and its folder."""
    name = type(model).__name__.removeprefix("FSDP")
    return InputError(f"{name}: {problem}", file=model.name_or_path or None, remedy=remedy)


def _measure(inner: Any) -> ModelTraits:
    layer = inner.get_output_embeddings()
    if type(layer).__name__.removeprefix("FSDP") != "Linear":
        problem = f"its output layer is a {type(layer).__name__}, not a plain linear layer, and is refused"
        raise refusal(inner, problem, "keep the LM head out of quantisation and of adapters")
    ids = torch.tensor([probe_ids(inner.config, _PROBE_TOKENS)], device=layer.weight.device)
    seen: list[Tensor] = []

    def replace_logits(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen[:] = [inputs[0], _ramp_like(output)]
        return seen[1]

    hook = layer.register_forward_hook(replace_logits)
    try:
        logits = inner(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise refusal(inner, f"it cannot read text alone, and is refused: {error}") from error
    finally:
        hook.remove()
    if not seen or logits.shape != seen[1].shape:
        raise refusal(inner, "its logits do not come from its LM head, so it is refused")
    scale, softcap = _fit_head(inner, seen[1], logits)
    decoder, takes_positions, hidden_scale = _find_decoder(inner, ids, seen[0])
    return ModelTraits(decoder, takes_positions, hidden_scale, scale, softcap)


def _ramp_like(logits: Tensor) -> Tensor:
    ramp = torch.linspace(-_WIDEST_TEST_LOGIT, _WIDEST_TEST_LOGIT, logits.shape[-1], device=logits.device)
    return ramp.to(logits.dtype).expand(logits.shape).contiguous()


def _fit_head(inner: Any, raw: Tensor, logits: Tensor) -> tuple[float, float | None]:
    """Find the scale and soft-cap, among the config's numbers, that turn ``raw`` into ``logits``."""
    caps = [None, *_numbers(inner.config, r"^(?!attn).*(softcap|soft_cap)")]
    scales = _multiples(inner.config)
    given, wanted = raw.double(), logits.double()
    fits = []
    for cap in caps:
        capped = given if cap is None else torch.tanh(given / cap) * cap
        for scale in scales:
            fits.append((float((capped * scale - wanted).norm() / wanted.norm()), scale, cap))
    error, scale, cap = min(fits, key=lambda fit: fit[0])
    if not error <= _rounding(logits.dtype):
        raise refusal(
            inner,
            "its logits are not scale * softcap(hidden @ W.T + b) with a scale and a soft-cap from its config (the "
            f"closest is {error:.1%} off), so it is refused",
        )
    return scale, cap


def _find_decoder(inner: Any, ids: Tensor, wanted: Tensor) -> tuple[Any, bool, float]:
    """Find the module whose last hidden state, times a number of the config, is the LM head's input (``wanted``)."""
    candidates = [inner.get_decoder(), inner.base_model, getattr(inner, "model", None)]
    candidates += [getattr(candidate, "model", None) for candidate in candidates]  # of a causal model in a larger one
    multiples = _multiples(inner.config)
    for candidate in candidates:
        if candidate is None or candidate is inner:
            continue
        takes_positions = "position_ids" in signature(candidate.forward).parameters
        positions = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None]} if takes_positions else {}
        try:
            hidden = candidate(input_ids=ids, use_cache=False, **positions).last_hidden_state.double()
        except (TypeError, ValueError, AttributeError, RuntimeError):
            continue
        if hidden.shape != wanted.shape:
            continue
        given = wanted.double()
        error, multiple = min((float((hidden * value - given).norm() / given.norm()), value) for value in multiples)
        # values that are not finite come from the weights, and are reported with the response that shows them
        if error <= _rounding(wanted.dtype) or not torch.isfinite(given).all():
            return candidate, takes_positions, multiple
    raise refusal(
        inner,
        "what its LM head reads is not the last hidden state of its decoder, times a number of its config, so it is "
        "refused",
    )


def _multiples(config: Any) -> list[float]:
    """List factors that the config may mean: 1, and its scales and multipliers, which some classes divide by."""
    return [1.0, *(value for number in _numbers(config, "scal|multiplier") for value in (number, 1.0 / number))]


def _numbers(config: Any, pattern: str) -> list[float]:
    """List positive numbers of a config, properties included, whose name matches ``pattern``."""
    numbers: list[float] = []
    for part in (config.get_text_config(), config):
        names = {*part.to_dict(), *(key for key in dir(type(part)) if isinstance(getattr(type(part), key), property))}
        for key in sorted(key for key in names if re.search(pattern, key)):
            value = getattr(part, key, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                numbers.append(float(value))
    return list(dict.fromkeys(numbers))


def _rounding(dtype: torch.dtype) -> float:
    """Return the relative error that a few operations in ``dtype`` leave."""
    return max(1e-5, 4 * torch.finfo(dtype).eps)


# -- the head in a model folder --------------------------------------------------------------------------------------

# Reading the LM head from a model folder, without loading the model. Letters: V vocabulary, D hidden size.


_UNTIED = ("lm_head", "output_layer", "embed_out")
_EMBEDDINGS = ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte", "gpt_neox.embed_in")


def stored_lm_head(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> LMHead:
    """Return the LM head as the model would use it in ``dtype`` (such as bfloat16).

    Raises:
        ValueError: an unknown architecture, weights that are missing or quantised.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    architecture = (config.architectures or ["none named in config.json"])[0]
    traits = head_traits(architecture, folder)
    text = config.get_text_config()
    names = _EMBEDDINGS if text.tie_word_embeddings else _UNTIED
    stored = read_tensors(folder)
    for name in names:
        if f"{name}.weight" in stored:
            weight = _read(f"{name}.weight", stored)
            bias = _read(f"{name}.bias", stored) if name in _UNTIED and f"{name}.bias" in stored else None
            break
    else:
        raise InputError(
            f"no LM head among its tensors (looked for {', '.join(f'{name}.weight' for name in names)}; "
            f"tie_word_embeddings is {text.tie_word_embeddings})",
            file=folder,
            remedy="Set score.engine: transformers.",
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise InputError(
            f"its LM head is stored as {weight.dtype}, quantised, and is refused",
            file=folder,
            remedy="use a checkpoint that leaves the LM head out of quantisation",
        )
    precision = getattr(torch, dtype)
    bias = None if bias is None else bias.to(precision)
    return LMHead(weight.to(precision), bias, traits.scale(text), traits.softcap(text), text.vocab_size)


def _read(name: str, tensors: Mapping[str, StoredTensor]) -> Tensor:
    from safetensors import safe_open

    with safe_open(tensors[name].file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor
