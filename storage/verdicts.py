"""The verdict record: whether one response of a rollout is right, and why not.

Produced by ``stages.judge``, part by part, from rollouts; read by ``stages.train``. One Parquet file a part, a row for
each row of the rollouts' part, in the same order.
"""

from __future__ import annotations

import pyarrow as pa

from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.records import RowRecord, named

VERDICTS = RowRecord(
    "verdicts.parquet",
    pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("correct", pa.bool_(), nullable=False),
            pa.field("form", pa.string()),  # equal for correct responses that are the same solution
            pa.field("reason", pa.string()),  # why it is not correct, in words
        ],
        metadata=named("verdicts"),
    ),
)


def read_correct(verdicts: Artifact, rollouts: Artifact, part: int, table: pa.Table) -> list[bool]:
    """Read whether each response of a part of ``rollouts``, whose rows are in ``table``, is right.

    Raises:
        DamagedPart: the verdicts are of other responses.
    """
    judged = VERDICTS.read(verdicts.part_folder(part), ("prompt_id", "sample", "correct")).to_pydict()
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
