"""Records of attribution: the score of each document for a query set, and the table of bins computed from them.

Produced by ``stages.attribute``. Scores are one Parquet file a query set; the table (``RESULTS``) is an artifact of its
own, which ``stages.report`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from eopd.storage.records import named, read_record, write_rows

SCORES = "scores.parquet"
RESULTS = "attribution.json"

SCHEMA = pa.schema(
    [
        pa.field("document", pa.string(), nullable=False),  # its id; of a rollout "prompt id/sample"
        pa.field("query_set", pa.string(), nullable=False),
        # inner product of the document's gradient, preconditioned and of unit length, with the query set's mean
        pa.field("score", pa.float32(), nullable=False),
    ],
    metadata=named("attribution_scores"),
)


def write_scores(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a document to ``folder``, in the documents' order."""
    write_rows(folder / SCORES, SCHEMA, rows)


def read_scores(folder: Path) -> pa.Table:
    """Read what was written to ``folder``.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / SCORES, SCHEMA)
