"""The hidden-state protocol: token ids in, the hidden states that predict the response tokens out.

    engine = open_hidden_engine("auto", teacher, longest=4096, log_dir=logs, ...)
    for batch in engine.hidden(sequences):
        ...
    engine.close()

An engine also gives the LM head that belongs to its hidden states, and a second opinion on a distribution, against
which the first batch is checked. Letters: T scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eopd.stages.engines.sampling import EngineOptions, torch_device
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import LMHead, lm_head_of, unwrap
from eopd.stages.models.loading import load_model, model_folder
from eopd.stages.models.memory import free_memory, give_back_gpu_memory, weight_bytes
from eopd.stages.models.packing import Sequence, final_hidden, forget_lengths, layout_of, pack
from eopd.stages.models.weight_files import is_quantised
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from eopd.stages.models.lm_head import LMHead


@dataclass(frozen=True)
class HiddenBatch:
    """Hidden states of some of the sequences, sequence after sequence."""

    hidden: Tensor  # [T, D] final norm applied; the state before each response token
    order: tuple[int, ...]  # number of each sequence in the request
    lengths: tuple[int, ...]  # response tokens of each


class OwnLogits(NamedTuple):
    """Independent logits to check an engine's distributions against."""

    logits: list[Tensor]  # [T, V] float32, of each sequence
    source: str  # where they come from, in words


class HiddenEngine(Protocol):
    """A model opened for reading."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def dtype(self) -> str:
        """Dtype of the forward pass."""

    @property
    def head(self) -> LMHead: ...

    @property
    def note(self) -> str:
        """Line for the log about how sequences are read; empty if nothing is unusual."""

    @property
    def is_open(self) -> bool:
        """True until the engine is closed, or ended by the closing of another engine of its process."""

    checked: bool
    """Whether its first batch was compared with ``own_logits`` since it was opened (by the score stage)."""

    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        """Read every sequence that has a response; batches come in any order, each sequence once."""

    def own_logits(self, sequences: SequenceOf[Sequence]) -> OwnLogits | None:
        """Return the full model's logits of each sequence, read alone, independently of ``hidden`` and ``head``.

        None if the machine cannot compute them.
        """

    def close(self) -> None:
        """Free the model. The engine cannot be used again."""


# -- check ------------------------------------------------------------------------------------------------------------

# Checks of an engine's output: its first batch against the full model's own logits, and no uniform distribution.
#
# A wrong head, a forgotten scale or lost weights are found before anything is stored.


MOST_SEQUENCES, MOST_TOKENS, MOST_INPUT = 4, 128, 512
"""Limits of the check: sequences, response tokens each, and tokens of any but the shortest (a CPU has to read them)."""
UNIFORM = 3e-5
"""Nats from the entropy of equally probable tokens: rounding of float32."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean total variation distance (probability) by dtype of the forward pass. Two honest kernels differ by float
rounding; a forgotten soft-cap, scale, bias, mask or sliding window moves far more mass than that."""


class Head(Protocol):
    """An LM head."""

    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.inference_mode()
def check_first_batch(engine: HiddenEngine, head: Head, sequences: SequenceOf[Sequence], setting: str | None) -> str:
    """Compare distributions of a few sequences read side by side with those of the full model, which reads each alone.

    Args:
        setting: the one that names the engine, for the message; None: no setting does.

    Returns:
        A line that says what was compared.

    Raises:
        InputError: they disagree; with the numbers.
    """
    chosen = _choose(sequences)
    reference = engine.own_logits(chosen)
    if reference is None:
        return "not checked against the full model's logits: it does not fit this machine's memory, or is quantised"
    # logits that are not finite are the model's own fault, and are reported by the part that holds them
    finite = [number for number, own in enumerate(reference.logits) if bool(torch.isfinite(own).all())]
    if not finite:
        return "not checked against the full model's logits: they are NaN or infinite"
    logits = _side_by_side(engine, head, [chosen[number] for number in finite])
    pairs = [
        (engine_logits, reference.logits[number].cpu()) for engine_logits, number in zip(logits, finite, strict=True)
    ]
    distance = torch.cat([_total_variation(engine_logits, own) for engine_logits, own in pairs])
    tolerance = TOLERANCE[engine.dtype]
    mean, largest = float(distance.mean()), float(distance.max())
    if not mean <= tolerance:
        gap = max(float((engine_logits - own).abs().max()) for engine_logits, own in pairs)
        raise InputError(
            f"engine {engine.name} {engine.version} disagrees with the full model's own logits ({reference.source}) "
            f"on {len(distance)} tokens ({engine.dtype}): total variation distance {mean:.3g} on average and "
            f"{largest:.3g} at most, {tolerance:g} allowed; logits differ by up to {gap:.3g}. Nothing was stored",
            setting=setting,
            remedy=f"Set {setting} to the other engine." if setting else "",
        )
    return (
        f"checked against the full model's logits ({reference.source}): total variation distance {mean:.1e} on "
        f"{len(distance)} tokens of {len(pairs)} sequences read side by side"
    )


def _choose(sequences: SequenceOf[Sequence]) -> list[Sequence]:
    """Choose the shortest sequence with a response and longer ones of other lengths; at least two, of which one may be
    a prefix of the other."""
    ordered = sorted((one for one in sequences if len(one.response_ids)), key=lambda sequence: sequence.input_length)
    shortest = ordered[0]
    first = Sequence(shortest.context_ids, shortest.response_ids[:MOST_TOKENS])
    others = [one for one in ordered[1:] if one.input_length <= MOST_INPUT]
    if not others:
        return [first, Sequence(first.context_ids, first.response_ids[: -(-len(first.response_ids) // 2)])]
    places = np.linspace(0, len(others) - 1, min(MOST_SEQUENCES - 1, len(others))).astype(int)
    return [first, *(_ending(others[place]) for place in places)]


def _ending(sequence: Sequence) -> Sequence:
    """Return the sequence with at most the last ``MOST_TOKENS`` ids as its response."""
    ids = [*sequence.context_ids, *sequence.response_ids]
    count = min(MOST_TOKENS, len(sequence.response_ids))
    return Sequence(ids[:-count], ids[-count:])


def _side_by_side(engine: HiddenEngine, head: Head, sequences: SequenceOf[Sequence]) -> list[Tensor]:
    """Return the engine's logits [T, V] of each sequence, on the CPU, read in as few batches as it makes."""
    logits: dict[int, Tensor] = {}
    for batch in engine.hidden(sequences):
        pieces = batch.hidden.tensor_split(np.cumsum(batch.lengths)[:-1].tolist())
        for number, hidden in zip(batch.order, pieces, strict=True):
            logits[number] = head.logits(hidden).cpu()
    return [logits[number] for number in range(len(sequences))]


def refuse_uniform(entropy: NDArray[Any], vocab_size: int, path: str, setting: str, merged: int = 0) -> None:
    """Refuse a teacher that gives every token of the vocabulary the same probability everywhere.

    Args:
        entropy: [T] nats.
        setting: the one that names the engine, for the message.
        merged: how many ids the entropies count as one outcome.

    Raises:
        InputError: all entropies are those of the uniform distribution, which no trained model has; names the folder.
    """
    uniform = math.log(vocab_size)
    expected = uniform - (merged * math.log(merged) / vocab_size if merged else 0.0)
    if len(entropy) and float(np.abs(entropy - expected).max()) < UNIFORM:
        raise InputError(
            f"all {len(entropy)} tokens have the entropy ln {vocab_size} = {uniform:.4f} nats, as if the teacher's "
            "weights were zero or lost",
            setting=setting,
            file=path,
            remedy=f"Check its files, or set {setting} to another engine.",
        )


def _total_variation(engine_logits: Tensor, own: Tensor) -> Tensor:
    """Return half the sum of absolute differences of two softmaxes [T]; NaN logits give NaN."""
    p, q = (torch.softmax(logits.double(), 1) for logits in (engine_logits, own))
    return (p - q).abs().sum(1) / 2


# -- hidden transformers ----------------------------------------------------------------------------------------------

# Hidden states from a transformers model over packed rows. Letters: T scored tokens, V vocabulary.


CPU_BATCH_TOKENS = 1024
"""Most tokens of a forward pass on a CPU: with more, its activations leave the cache (docs/log.md)."""
MEMORY_FOR_CHECK = 1.5
"""A checkpoint is loaded once more, for the check, if this many times its weights' size is free."""


class TransformersHiddenEngine:
    """A ``HiddenEngine`` on a model that transformers loads."""

    name = "transformers"
    checked = False

    def __init__(self, ref: ModelRef, *, options: EngineOptions, batch_tokens: int, row_tokens: int) -> None:
        self.version = version("transformers")
        self._device = torch_device(options)
        self._batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS) if self._device == "cpu" else batch_tokens
        self._row_tokens = min(row_tokens, self._batch_tokens)
        self._model: Any = load_model(ref, self._device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._ref = replace(ref, dtype=self.dtype)
        self.head: LMHead = lm_head_of(self._model)
        self._layout = layout_of(self._model)
        self.note = self._layout.describe()

    @property
    def is_open(self) -> bool:
        return self._model is not None

    @torch.inference_mode()
    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        assert self._model is not None, "the engine is closed"
        row_tokens = self._row_tokens
        if len(sequences) > MOST_SEQUENCES:  # so few share a row in any case, for the check of the first batch
            # attention costs tokens * row: a row longer than the longest sequence would only add to it
            row_tokens = min(row_tokens, max(sequence.input_length for sequence in sequences))
        few_widths = self._device == "cpu"
        for packed in pack(sequences, row_tokens, self._batch_tokens, self._layout, few_widths=few_widths):
            yield HiddenBatch(final_hidden(self._model, packed.to(self._device)), packed.order, packed.lengths)

    @torch.inference_mode()
    def own_logits(self, sequences: SequenceOf[Sequence]) -> OwnLogits:
        reloaded = reloaded_logits(self._ref, sequences)
        if reloaded is not None:
            return reloaded
        logits = [full_model_logits(self._model, sequence, self._device) for sequence in sequences]
        return OwnLogits(logits, "the model in memory; there is no room to load it again")

    def close(self) -> None:
        self._model = None
        del self.head
        give_back_gpu_memory()


@torch.inference_mode()
def reloaded_logits(ref: ModelRef, sequences: SequenceOf[Sequence]) -> OwnLogits | None:
    """Compute logits from the checkpoint, loaded again by transformers on the CPU; nothing is shared with any engine.

    None if the checkpoint is quantised, or does not fit the memory that is free.
    """
    folder = model_folder(ref.path, ref.revision)
    if is_quantised(folder) or weight_bytes(folder) * MEMORY_FOR_CHECK > free_memory():
        return None
    model = load_model(ref, "cpu")
    return OwnLogits([full_model_logits(model, sequence, "cpu") for sequence in sequences], "the checkpoint")


def full_model_logits(model: Any, sequence: Sequence, device: str) -> Tensor:
    """Return logits [T, V] float32 of one unpacked sequence, by the model's own forward pass."""
    ids, count = [*sequence.context_ids, *sequence.response_ids[:-1]], len(sequence.response_ids)
    # of the whole context they could be larger than the model
    kept = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    forget_lengths(unwrap(model))
    logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **kept).logits
    own: Tensor = logits[0, -count:].float()
    return own
