"""The student top-k record: the student's most probable tokens at every response position, by rollout part.

Produced by ``stages.rollout`` from the stored tokens and the policy that sampled them; read by ``stages.score``,
which asks the teacher for the same ids. One Parquet file a part.
Letters: S responses, T response tokens, k ids a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eopd.storage.records import check_columns, named, read_record, write_record
from eopd.storage.untrusted import naming_misfits

FILE_NAME = "student_topk.parquet"
_METADATA = named("student_topk")


@dataclass(frozen=True)
class StudentTopk:
    """Ids and log-probs for the responses of one rollout part, in its order."""

    lengths: NDArray[np.int32]  # [S] tokens of each response
    ids: NDArray[np.int32]  # [T, k] most probable first
    logprobs: NDArray[np.float32]  # [T, k] full softmax at the sampling temperature, nats

    def __post_init__(self) -> None:
        assert self.ids.shape == self.logprobs.shape, (self.ids.shape, self.logprobs.shape)
        assert self.ids.shape[0] == int(self.lengths.sum()), (self.ids.shape, int(self.lengths.sum()))


def write_student_topk(folder: Path, topk: StudentTopk) -> None:
    """Write one part's ids (possibly of no response) to ``folder``."""
    offsets = np.concatenate([[0], np.cumsum(topk.lengths)]).astype(np.int32)
    k = topk.ids.shape[1]
    columns = {
        "ids": _nested(offsets, pa.array(topk.ids.reshape(-1)), k),
        "logprobs": _nested(offsets, pa.array(topk.logprobs.reshape(-1)), k),
    }
    table = pa.table(columns).replace_schema_metadata({**_METADATA, b"eopd.k": str(k).encode()})
    write_record(folder / FILE_NAME, table)


def read_student_topk(folder: Path) -> StudentTopk:
    """Read one part.

    Raises:
        WrongArtifact, NewerSchema: the file holds another record or a newer version of it.
    """
    path = folder / FILE_NAME
    table = read_record(path, pa.schema([], _METADATA))
    with naming_misfits(str(path)):
        k = int(table.schema.metadata[b"eopd.k"])
        kinds = {"ids": pa.int32(), "logprobs": pa.float32()}
        fields = [pa.field(name, pa.list_(pa.list_(kind, k)), nullable=False) for name, kind in kinds.items()]
        check_columns(path, table, pa.schema(fields))
        ids, logprobs = (table.column(name).combine_chunks() for name in kinds)
        return StudentTopk(
            lengths=np.diff(ids.offsets.to_numpy()).astype(np.int32),
            ids=ids.flatten().flatten().to_numpy().reshape(-1, k),
            logprobs=logprobs.flatten().flatten().to_numpy().reshape(-1, k),
        )


def _nested(offsets: NDArray[np.int32], values: pa.Array, k: int) -> pa.Array:
    """Return [S] lists of tokens, each a list of ``k``."""
    return pa.ListArray.from_arrays(pa.array(offsets), pa.FixedSizeListArray.from_arrays(values, k))
