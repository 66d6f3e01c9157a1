"""Search for the token whose logits are not finite."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.models.packing import Sequence
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_batch import NotFinite, TokenBatch


def first_not_finite(
    engine: HiddenEngine, head: StatisticsHead, sequences: SequenceOf[Sequence], suspects: SequenceOf[int]
) -> tuple[int, int]:
    """Find which of ``suspects``, read together with NaN or infinite logits, is the cause: (its number, response
    token).

    Attention multiplies masked values by 0, and 0 * NaN is NaN: one bad token spoils its whole row, neighbours and
    earlier tokens too. So each sequence is read alone, and its first bad position is found by bisection over prefixes.
    """
    for number in suspects:
        length = len(sequences[number].response_ids)
        if not _is_finite(engine, head, sequences[number], length):
            good, bad = 0, length
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if _is_finite(engine, head, sequences[number], middle) else (good, middle)
            return number, bad - 1
    return suspects[0], 0  # gone when read alone: named by the first of them


def _is_finite(engine: HiddenEngine, head: StatisticsHead, sequence: Sequence, length: int) -> bool:
    prefix = Sequence(sequence.context_ids, sequence.response_ids[:length])
    [batch] = list(engine.hidden([prefix]))
    ids = np.asarray(prefix.response_ids, np.int64)
    try:
        head(batch.hidden, TokenBatch(ids, ids.astype(np.uint64)))
    except NotFinite:
        return False
    return True
