"""Records of routing: a model's entropies at the first tokens of its samples, and the mode chosen by them.

Produced by ``stages.route``. Entropies are one Parquet file a part of the evaluation; choices are one Parquet file with
the table of results (``RESULTS``) beside it, which ``stages.report`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from eopd.storage.records import named, read_record, write_rows

ENTROPIES = "entropies.parquet"
CHOICES = "choices.parquet"
RESULTS = "routing.json"

_RESPONSE = [
    pa.field("benchmark", pa.string(), nullable=False),
    pa.field("problem_id", pa.string(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
]
ENTROPIES_SCHEMA = pa.schema(
    [
        *_RESPONSE,
        # of the distribution before each of the first tokens, at temperature 1 over the full vocabulary, nats
        pa.field("entropy", pa.list_(pa.float32()), nullable=False),
    ],
    metadata=named("entropies"),
)
CHOICES_SCHEMA = pa.schema(
    [
        *_RESPONSE,
        pa.field("calibration", pa.bool_(), nullable=False),  # the rule was fitted to it, and no figure has it
        pa.field("mode", pa.string(), nullable=False),  # chosen
        pa.field("oracle", pa.string()),  # the right mode with the fewest tokens; null if none is right
        # null where the response is too short
        pa.field("entropy", pa.float64()),  # sum, nats
        pa.field("trend", pa.float64()),
        pa.field("roughness", pa.float64()),
    ],
    metadata=named("routing_choices"),
)


def write_entropies(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part's entropies (possibly none) to ``folder``."""
    write_rows(folder / ENTROPIES, ENTROPIES_SCHEMA, rows)


def read_entropies(folder: Path) -> pa.Table:
    """Read what was written to ``folder``.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / ENTROPIES, ENTROPIES_SCHEMA)


def write_choices(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row a response to ``folder``."""
    write_rows(folder / CHOICES, CHOICES_SCHEMA, rows)


def read_choices(folder: Path) -> pa.Table:
    """Read what was written to ``folder``. Raises as ``read_entropies``."""
    return read_record(folder / CHOICES, CHOICES_SCHEMA)
