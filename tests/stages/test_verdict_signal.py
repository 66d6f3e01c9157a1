"""The signal check: summed log-ratios of right and wrong responses, from stored scores, rollouts and verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from eopd.pipeline.cli.store import app
from eopd.stages.report.gather import RoundArtifacts, _signal
from eopd.stages.score.run import run
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import JointCache
from eopd.storage.verdict_signal import auc, sources_of, verdict_signal
from tests.stages.score_case import response_row, rollouts, score_job
from tests.stages.test_teacher_contexts import judged
from tests.stages.tiny_models import save_teacher

LOGPROBS: list[list[float] | None] = [[-1.0, -2.0], [-3.0, float("nan")], [-0.5, -0.5], None, [-4.0, -0.25]]
CORRECT = [True, False, False, True, True]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """Rollouts of two parts, and their scores."""
    store = tmp_path_factory.mktemp("store")
    save_teacher("llama", store / "teacher")
    rows: list[Any] = [response_row(n, [40 + n, 50], logprobs=one) for n, one in enumerate(LOGPROBS)]
    source = rollouts(store, [rows[:3], rows[3:]])
    job = score_job(store, store / "teacher", source)
    identity = Identity("scores", 1, 2, inputs={"rollouts": source.key}, coverage=job.settings.coverage())
    job = score_job(store, store / "teacher", source, output=Artifact(store, identity))
    run(job)
    return source, job.output


def verdicts_on(source: Artifact, store: Path) -> Artifact:
    made = judged(store, source, [CORRECT[:3], CORRECT[3:]])
    keyed = Artifact(store, Identity("verdicts", 1, 2, inputs={"rollouts": source.key}))
    for part in range(2):
        with keyed.write_part(part, inputs=made.marker(part).inputs) as folder:
            for file in made.part_folder(part).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
    return keyed


def test_sums_are_over_tokens_that_the_student_sampled(scored: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    source, scores = scored
    cache = JointCache([scores])
    rows = [cache.read_part(part) for part in range(2)]
    teacher = np.concatenate([one.sampled_logprob for one in rows]).reshape(5, 2).astype(float)
    sums = [(teacher[n] - np.asarray(one))[np.isfinite(one)].sum() for n, one in enumerate(LOGPROBS) if one is not None]
    right, wrong = [sums[0], sums[3]], [sums[1], sums[2]]
    signal = verdict_signal(cache, source, verdicts_on(source, tmp_path))
    assert (signal.right, signal.wrong, signal.left_out) == (2, 2, 1)
    assert signal.auc == np.mean([one > other for one in right for other in wrong])
    assert signal.mean_right == pytest.approx(np.mean(right))
    assert signal.mean_wrong == pytest.approx(np.mean(wrong))
    alone = verdict_signal(cache, source, verdicts_on(source, tmp_path / "other"), [1])
    assert (alone.right, alone.wrong, alone.auc) == (1, 0, None)
    assert "there are 1 right and 0 wrong" in alone.text()


def test_stats_and_the_report_show_it(scored: tuple[Artifact, Artifact]) -> None:
    source, scores = scored
    store = source.folder.parents[1]
    arguments = ["stats", f"scores/{scores.key}", "--store", str(store)]
    assert sources_of(store, scores) is None
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["signal"] is None
    verdicts = verdicts_on(source, store)
    assert [one.key for one in sources_of(store, scores) or ()] == [source.key, verdicts.key]
    expected = verdict_signal(JointCache([scores]), source, verdicts)
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["signal"] == expected.to_json()
    assert "between 2 right and 2 wrong responses (1 left out)" in CliRunner().invoke(app, arguments).output
    item = RoundArtifacts(0, None, rollouts=source, scores=(scores,), made={"judge": verdicts})
    assert _signal(item)["signal"].value == expected.auc
    assert _signal(RoundArtifacts(0, None, rollouts=source, scores=(scores,))) == {}


def test_scores_of_other_rollouts_are_refused(scored: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    source, scores = scored
    rows = [response_row(n, [40 + n, 51], logprobs=[-1.0, -1.0]) for n in range(5)]
    other = rollouts(tmp_path, [rows[:3], rows[3:]])
    with pytest.raises(DamagedPart, match="scored from other rollouts"):
        verdict_signal(JointCache([scores]), other, verdicts_on(other, tmp_path))
    assert source.key == other.key


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [([2.0, 3.0], [1.0], 1.0), ([1.0], [1.0], 0.5), ([0.0, 2.0], [1.0, 2.0], 0.375), ([], [1.0], None)],
)
def test_auc_counts_ties_by_half(right: list[float], wrong: list[float], expected: float | None) -> None:
    assert auc(right, wrong) == expected
