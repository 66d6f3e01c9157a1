"""Records in Parquet: rows come back as they went, and a file that is another's is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage import records as rollouts
from eopd.storage import student_topk
from eopd.storage.errors import NewerSchema, StoreError, WrongArtifact
from eopd.storage.records import named
from tests.raises import raises

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "rollouts": (rollouts.FILE_NAME, rollouts.read_rollouts),
    "student_topk": (student_topk.FILE_NAME, student_topk.read_student_topk),
    "evaluation_samples": (evaluations.SAMPLES.file_name, evaluations.SAMPLES.read),
    "evaluation_problems": (evaluations.PROBLEMS.file_name, evaluations.PROBLEMS.read),
    "alignment_sums": (analyses.ALIGNMENT_SUMS.file_name, analyses.ALIGNMENT_SUMS.read),
}


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [
        {
            "benchmark": "b",
            "problem_id": str(n),
            "samples": 8,
            "correct": n,
            "distinct_correct": 1,
            "self_bleu": None,
            "distinct_4": 0.5,
            "response_tokens": 12.25,
            "truncated": 0,
        }
        for n in range(3)
    ]
    evaluations.PROBLEMS.write(tmp_path, rows)
    assert evaluations.PROBLEMS.read(tmp_path).to_pylist() == rows
    assert evaluations.PROBLEMS.read(tmp_path, ["correct"]).to_pydict() == {"correct": [0, 1, 2]}
    evaluations.PROBLEMS.write(tmp_path, [])
    assert evaluations.PROBLEMS.read(tmp_path).num_rows == 0


@pytest.mark.parametrize("record", READERS)
@pytest.mark.parametrize(
    ("metadata", "error", "said"),
    [
        (lambda _: None, WrongArtifact, "no record of eopd, not {}"),
        (lambda _: named("weights"), WrongArtifact, "weights, not {}"),
        (lambda record: named(record, 3), NewerSchema, "version 3.* up to [12]"),
        (lambda record: named(record, 0), WrongArtifact, "version 0"),
    ],
)
def test_what_another_wrote_is_refused(
    tmp_path: Path, record: str, metadata: Callable[[str], Any], error: type[StoreError], said: str
) -> None:
    file, read = READERS[record]
    pq.write_table(pa.table({"ids": [1]}).replace_schema_metadata(metadata(record)), tmp_path / file)
    with raises(error, said.format(record), file=tmp_path / file):
        read(tmp_path)
