"""The alignment record: sums over the tokens of one response in one bin of teacher entropy.

Produced by ``stages.align``, one Parquet file a part of problems, without rows for empty bins; the part's marker names
the bins' edges. The summary (``RESULTS``) is an artifact of its own, which ``stages.report`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from eopd.storage.records import named, read_record, write_rows

SUMS = "sums.parquet"
RESULTS = "alignment.json"

SCHEMA = pa.schema(
    [
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("bin", pa.int32(), nullable=False),  # of teacher entropy, from 0
        pa.field("tokens", pa.float64(), nullable=False),
        # sums over these tokens; divergences and entropies in nats
        pa.field("fkl", pa.float64(), nullable=False),
        pa.field("rkl", pa.float64(), nullable=False),
        pa.field("agreement", pa.float64(), nullable=False),  # tokens whose most probable id is the same
        pa.field("teacher_entropy", pa.float64(), nullable=False),
        pa.field("student_entropy", pa.float64(), nullable=False),
        pa.field("student_above", pa.float64(), nullable=False),  # tokens whose student entropy exceeds tau
        pa.field("teacher_outside", pa.float64(), nullable=False),  # probability on ids the student lacks
        pa.field("student_outside", pa.float64(), nullable=False),
    ],
    metadata=named("alignment_sums"),
)


def write_sums(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part's sums (possibly none) to ``folder``."""
    write_rows(folder / SUMS, SCHEMA, rows)


def read_sums(folder: Path) -> pa.Table:
    """Read what was written to ``folder``.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / SUMS, SCHEMA)
