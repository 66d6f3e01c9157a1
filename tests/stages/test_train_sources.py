"""Training on responses that the student did not write, or not alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from eopd.stages.rollout.settings import OFF_POLICY
from eopd.stages.score.run import run as score
from eopd.stages.train.job import TrainJob
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.stages.train.responses import refuse_other_writers
from eopd.stages.train.run import run
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.identity import Identity
from eopd.storage.paths import WEIGHTS
from eopd.storage.records import Writer, write_rollouts
from tests.bounds import forward_rounding
from tests.raises import raises
from tests.stages.score_case import Lines, random_responses, score_job
from tests.stages.tiny_models import save_teacher
from tests.stages.train_case import KillAfter, Killed, make_world, part_bytes, read_rows, train_job


def written(folder: Path, name: str, writer: Writer, prefix: int = 10**6) -> Artifact:
    """The responses of ``make_world``, of which ``writer`` wrote the first ``prefix`` tokens."""
    rows = random_responses(8, seed=3, most=12)
    for row in rows:
        length = len(row["response_token_ids"])
        count = min(length, prefix)
        row["written"] = [int(writer)] * count + [0] * (length - count)
        if count < length:
            row["logprobs"] = [float("nan")] * count + [-1.0] * (length - count)
    artifact = Artifact(folder / "store", Identity("rollouts", 1, 2, settings={"name": name}))
    for part, of_part in enumerate((rows[:5], rows[5:])):
        with artifact.write_part(part) as target:
            write_rollouts(target, of_part, writers=True)
    return artifact


def weights_of(job: TrainJob) -> dict[str, Any]:
    return load_file(job.output.part_folder(WEIGHTS) / "model.safetensors")


def test_supervised_training_needs_no_scores(tmp_path: Path) -> None:
    make_world(tmp_path)
    settings = {"objective": {"name": "sft"}}
    scored, own = train_job(tmp_path, "scored", **settings), written(tmp_path, "data", Writer.DATA)
    run(scored)
    job = train_job(tmp_path, "unscored", **settings, rollouts=own, scores=(), source="data")
    run(job)
    first, other = read_rows(job)[0], read_rows(scored)[0]
    for figure in ("loss", "grad_norm", "student_entropy"):  # a head is summed in another order than the rest
        assert first[figure] == pytest.approx(other[figure], rel=forward_rounding(10.0))
    assert not {"teacher_entropy", "retained_mass", "fkl", "staleness_k1"} & first.keys()
    refused = train_job(tmp_path, "refused", rollouts=own, scores=(), source="data", objective={"name": "fkl"})
    with raises(InputError, "'fkl'", setting="train.objective.name"):
        run(refused)


@pytest.mark.parametrize("objective", ["fkl", "jsd"])
def test_a_divergence_does_not_ask_who_wrote_the_tokens(tmp_path: Path, objective: str) -> None:
    make_world(tmp_path)
    own = written(tmp_path, "teacher", Writer.TEACHER)
    score(score_job(tmp_path / "store", tmp_path / "teacher", own, name="of-teacher"))
    scores = score_job(tmp_path / "store", tmp_path / "teacher", own, name="of-teacher").output
    settings = {"objective": {"name": objective}}
    job = train_job(tmp_path, "own", **settings, rollouts=own, scores=(scores,), source="teacher")
    run(job)
    sampled = train_job(tmp_path, "sampled", **settings)
    run(sampled)
    ours, theirs = weights_of(job), weights_of(sampled)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def prefix_world(folder: Path) -> dict[str, Any]:
    make_world(folder)
    own = written(folder, "prefix", Writer.TEACHER, prefix=4)
    job = score_job(folder / "store", folder / "teacher", own, name="of-prefix")
    score(job)
    return {"rollouts": own, "scores": (job.output,), "source": "prefix", "max_logprob_gap": 100.0}


def test_prefixes_are_counted_and_their_log_probs_compared_with_nobody_s(tmp_path: Path) -> None:
    world = prefix_world(tmp_path)
    job = train_job(tmp_path, "eopd", **world)
    run(job)
    rows = read_rows(job)
    lengths = [len(row["response_token_ids"]) for row in random_responses(8, seed=3, most=12)]
    share = sum(min(length, 4) for length in lengths) / sum(lengths)
    tokens = np.asarray([row["tokens"] for row in rows])
    fractions = np.asarray([row["prefix_fraction"] for row in rows])
    assert (fractions * tokens)[:2].sum() / tokens[:2].sum() == pytest.approx(share)
    assert all(np.isfinite(row["loss"]) for row in rows)
    aged = train_job(tmp_path, "aged", **world, age=1)
    run(aged)
    assert all(np.isfinite(row["staleness_k1"]) for row in read_rows(aged))


def test_the_weight_of_prefixes_matters_and_resumed_training_is_the_same(tmp_path: Path) -> None:
    world = prefix_world(tmp_path)
    whole = train_job(tmp_path, "whole", **world, objective={"name": "fkl", "prefix_beta": 0.5})
    run(whole)
    none = train_job(tmp_path, "none", **world, objective={"name": "fkl", "prefix_beta": 0.0})
    run(none)
    assert any(not np.array_equal(weights_of(whole)[name], value) for name, value in weights_of(none).items())
    broken = train_job(tmp_path, "broken", **world, objective={"name": "fkl", "prefix_beta": 0.5})
    with pytest.raises(Killed):
        run(replace(broken, progress=KillAfter(3)))
    run(broken)
    ours, theirs = part_bytes(broken.output, WEIGHTS), part_bytes(whole.output, WEIGHTS)
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_a_teacher_with_another_head_still_trains_the_tokens_of_a_prefix(tmp_path: Path) -> None:
    make_world(tmp_path)
    save_teacher("llama", tmp_path / "other", seed=4)
    own = written(tmp_path, "prefix", Writer.TEACHER, prefix=4)
    job = score_job(tmp_path / "store", tmp_path / "other", own, name="other")
    score(job)
    trained = train_job(
        tmp_path,
        "tropd",
        rollouts=own,
        scores=(job.output,),
        source="prefix",
        max_logprob_gap=100.0,
        objective={"name": "tropd", "k": 1},
    )
    run(trained)
    assert all(row["loss_prefix"] != 0 for row in read_rows(trained))


def test_an_objective_of_one_s_own_that_reads_the_round_s_start_is_refused() -> None:
    objective = make_objective(ObjectiveSettings.model_validate({"name": "fkl"}))
    reads = replace(objective, per_round=frozenset({"q_old", "token_key"}))
    for source in OFF_POLICY:
        refuse_other_writers(objective, source)
        with raises(InputError, "'fkl' reads q_old", setting="rollout.source"):
            refuse_other_writers(reads, source)
    refuse_other_writers(reads, "prefix")


@pytest.mark.parametrize(("prefix", "warned"), [(10**6, True), (1, False)])
def test_steps_of_prefixes_alone_are_told(tmp_path: Path, prefix: int, warned: bool) -> None:
    make_world(tmp_path)
    own = written(tmp_path, "prefix", Writer.TEACHER, prefix=prefix)
    job = score_job(tmp_path / "store", tmp_path / "teacher", own, name="of-prefix")
    score(job)
    lines = Lines()
    changes = {"rollouts": own, "scores": (job.output,), "source": "prefix", "max_logprob_gap": 100.0}
    run(train_job(tmp_path, "told", **changes, objective={"name": "fkl"}, progress=lines))
    assert any("4 steps hold nothing but tokens that the teacher wrote" in line for line in lines.lines) == warned
