"""The alignment record: sums over the tokens of one response in one bin of teacher entropy.

Produced by ``stages.evaluate.alignment``; read by its own summary and by ``stages.report``. One Parquet file a part of
problems, without rows for empty bins; the part's marker names the bins' edges. The last part of the artifact holds the
summary (``RESULTS``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    metadata={b"eopd.record": b"alignment_sums", b"eopd.version": b"1"},
)


def write_sums(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (possibly none)."""
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA), path, compression="zstd")


def read_sums(path: Path) -> pa.Table:
    """Read one part's file.

    Raises:
        ValueError: the file holds another record or another version of it.
    """
    found = pq.read_schema(path).metadata or {}
    for name in (b"eopd.record", b"eopd.version"):
        if found.get(name) != SCHEMA.metadata[name]:
            raise ValueError(f"{path}: {name.decode()} is {found.get(name)!r}, not {SCHEMA.metadata[name]!r}")
    return pq.read_table(path)
