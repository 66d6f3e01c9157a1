"""Scores from captures of other tools, and training on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eopd.stages.job import NullProgress
from eopd.stages.models.settings import CaptureSettings
from eopd.stages.score.captured import CapturedJob, run
from eopd.stages.train.run import run as train
from eopd.storage.artifacts import Artifact
from eopd.storage.coverage import NeedNotMet
from eopd.storage.errors import InputError
from eopd.storage.exchange import export_sequences
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts
from eopd.storage.teacher_cache import TeacherCache
from tests.raises import raises
from tests.stages.score_case import STOPS, random_responses
from tests.stages.train_case import make_world, read_rows, train_job


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of training jobs, and `kd.parquet` with what its teacher said."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    job = train_job(folder, "any")
    assert job.scores
    export_sequences(TeacherCache(job.scores[0]), job.rollouts, folder / "kd.parquet")
    return folder


def captured(folder: Path, name: str, **changes: Any) -> CapturedJob:
    job = train_job(folder, "any")
    fields = {field: changes.pop(field) for field in list(changes) if field in CapturedJob.__dataclass_fields__}
    made = CapturedJob(
        output=Artifact(folder / "store", Identity("scores", 1, 2, {"captured": name})),
        parts=range(2),
        progress=NullProgress(),
        rollouts=job.rollouts,
        capture=CaptureSettings.model_validate({"path": str(folder / "kd.parquet"), **changes}),
        fingerprint="capture",
        tokenizer=str(folder / "student"),
        temperature=1.0,
    )
    return replace(made, **fields)


def test_heads_are_those_of_the_teacher_that_was_captured(world: Path) -> None:
    run(job := captured(world, "heads"))
    scores = train_job(world, "any").scores[0]
    assert scores is not None
    ours, theirs = TeacherCache(job.output), TeacherCache(scores)
    for part in range(2):
        mine, his = ours.read_part(part), theirs.read_part(part)
        for field in ("response_offsets", "token_ids", "head_offsets", "head_ids"):
            assert getattr(mine, field).tolist() == getattr(his, field).tolist()
        np.testing.assert_allclose(mine.head_logprobs, his.head_logprobs, atol=1e-6)
        header = ours.header(part)
        assert (header.teacher, header.temperature) == ("capture", 1.0)
        assert header.rollout_checksum == job.rollouts.marker(part).checksum
        assert job.output.marker(part).info["tokens"] == his.tokens
    assert not ours.coverage.sampled
    before = job.output.marker(0).checksum
    run(job)
    assert job.output.marker(0).checksum == before


def test_training_on_a_capture_is_training_on_its_teacher(world: Path) -> None:
    """Of a capture no log-probs of stops are known, so several stop ids stay tokens."""
    run(job := captured(world, "trained"))
    settings = {"objective": {"name": "fkl"}, "batch_responses": 8, "epochs": 1}
    ours = train_job(
        world, "on-capture", scores=(job.output,), student_stop_ids=STOPS, teacher_stop_ids=STOPS, **settings
    )
    theirs = train_job(world, "on-teacher", student_stop_ids=STOPS[:1], teacher_stop_ids=STOPS[:1], **settings)
    for one in (ours, theirs):
        train(one)
    (mine,), (his,) = read_rows(ours), read_rows(theirs)
    for figure in ("loss", "fkl", "rkl", "retained_mass", "grad_norm"):
        assert mine[figure] == pytest.approx(his[figure], rel=0.02)
    refused = train_job(world, "refused", scores=(job.output,), objective={"name": "eopd"})
    with pytest.raises(NeedNotMet, match="entropy"):
        train(refused)


def test_a_response_that_the_capture_lacks_is_named_by_its_prompt(world: Path, tmp_path: Path) -> None:
    rows = random_responses(8, seed=3, most=12)
    rows[2]["response_token_ids"][0] += 1
    other = Artifact(tmp_path, Identity("rollouts", 1, 1, settings={"name": "other"}))
    with other.write_part(0) as folder:
        write_rollouts(folder, rows)
    job = captured(world, "other", rollouts=other, output=Artifact(tmp_path, Identity("scores", 1, 1)), parts=[0])
    with raises(InputError, file="kd.parquet", row=2, prompt=rows[2]["prompt_id"]):
        run(job)
    assert not job.output.committed()


def test_tokens_with_fewer_entries_than_are_promised_are_refused(world: Path) -> None:
    sizes = [len(entries) for row in pq.read_table(world / "kd.parquet").to_pylist() for entries in row["target_mask"]]
    with raises(InputError, r"response token \d+", setting="teacher.capture.top_k", file="kd.parquet"):
        run(captured(world, "narrow", top_k=max(sizes) + 1))


def test_columns_may_be_named(world: Path, tmp_path: Path) -> None:
    table = pq.read_table(world / "kd.parquet")
    renamed = {"tokens": table["input_ids"], "k": table["target_token_ids"], "v": table["target_logprobs"]}
    pq.write_table(pa.table(renamed), tmp_path / "own.parquet")
    own = {"path": str(tmp_path / "own.parquet"), "ids": "tokens", "top_ids": "k", "top_logprobs": "v"}
    run(job := captured(world, "named", **own))
    run(usual := captured(world, "usual"))
    for part in range(2):
        mine, other = (TeacherCache(one.output).read_part(part) for one in (job, usual))
        assert mine.head_ids.tolist() == other.head_ids.tolist()
        assert mine.head_logprobs.tolist() == other.head_logprobs.tolist()
