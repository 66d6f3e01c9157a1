"""The hidden-state protocol: token ids in, the hidden states that predict the response tokens out.

    engine = open_hidden_engine("auto", teacher, longest=4096, log_dir=logs, ...)
    for batch in engine.hidden(sequences):
        ...
    engine.close()

An engine also gives the LM head that belongs to its hidden states, and a second opinion on a distribution, against
which the first batch is checked. Letters: T scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from eopd.stages.models.packing import Sequence

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
