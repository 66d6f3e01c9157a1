"""The verdict record: whether one response of a rollout is right, and why not.

Produced by ``stages.judge``, part by part, from rollouts; read by ``stages.train``. One Parquet file a part, a row for
each row of the rollouts' part, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.records import named, read_record, write_rows

FILE_NAME = "verdicts.parquet"

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("form", pa.string()),  # equal for correct responses that are the same solution
        pa.field("reason", pa.string()),  # why it is not correct, in words
    ],
    metadata=named("verdicts"),
)


def write_verdicts(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part's verdicts (possibly none) to ``folder``."""
    write_rows(folder / FILE_NAME, SCHEMA, rows)


def read_verdicts(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it. DamagedPart: it cannot be
            read.
    """
    return read_record(folder / FILE_NAME, SCHEMA, columns)


def read_correct(verdicts: Artifact, rollouts: Artifact, part: int, table: pa.Table) -> list[bool]:
    """Read whether each response of a part of ``rollouts``, whose rows are in ``table``, is right.

    Raises:
        DamagedPart: the verdicts are of other responses.
    """
    judged = read_verdicts(verdicts.part_folder(part), ("prompt_id", "sample", "correct")).to_pydict()
    expected = list(zip(*(table.column(name).to_pylist() for name in ("prompt_id", "sample")), strict=True))
    same_source = verdicts.marker(part).inputs.get("rollouts") == rollouts.marker(part).checksum
    if not same_source or list(zip(judged["prompt_id"], judged["sample"], strict=True)) != expected:
        raise DamagedPart(
            f"{verdicts} part {part} holds verdicts on other responses than those of {rollouts}",
            **verdicts.place(part),
            remedy="`eopd store verify --repair` re-queues them.",
        )
    correct: list[bool] = judged["correct"]
    return correct
