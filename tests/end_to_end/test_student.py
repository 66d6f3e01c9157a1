"""`eopd student`: a trained model as a folder that transformers loads, and clear words where there is none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from eopd.pipeline.config import load_config
from eopd.pipeline.errors import RunError
from eopd.pipeline.export import copy_student, find_student, newest, where_students_are
from eopd.pipeline.run import Run, open_run
from eopd.stages.models.model_config import stop_ids_in
from eopd.storage.garbage import prune
from eopd.storage.paths import METRICS_FILE, TRAINING_FILE, WEIGHTS
from eopd.storage.places import open_place
from eopd.storage.remote import copy
from tests import s3
from tests.end_to_end.conftest import World, eopd

KEPT = (METRICS_FILE, TRAINING_FILE)


def test_the_newest_student_is_named_and_copied(world: World, undisturbed: str, tmp_path: Path) -> None:
    config, target = world.config(undisturbed), tmp_path / "models" / "trained"
    named = eopd("student", config)
    folder = Path(named.stdout.strip())
    assert folder.is_relative_to(world.store(undisturbed) / "checkpoints")
    assert named.stderr.startswith("student 2 of 2 (trained in round 1)\nresponses end at ")
    ended = eopd("run", config).stderr.splitlines()[-1]
    assert ended == f"student 2 of 2 (trained in round 1): {folder}; `eopd student RUN --to FOLDER` copies it"

    copied = eopd("student", undisturbed, "--runs", world.folder / undisturbed / "runs", "--to", target)
    assert copied.stdout.strip() == str(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert AutoTokenizer.from_pretrained(target)("Ann")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(theirs[name].equal(value) for name, value in model.state_dict().items())
    assert not {"optimizer.safetensors", "metrics.jsonl", "training.json"} & set(os.listdir(target))
    assert os.listdir(target.parent) == ["trained"]
    refused = eopd("student", config, "--to", target, check=False)
    assert refused.returncode == 1
    assert "there is something already: name a folder that is new or empty" in refused.stderr


@pytest.fixture
def run(world: World, undisturbed: str) -> Run:
    return open_run(load_config(str(world.config(undisturbed))))


def lose_weights(run: Run, round_: int) -> None:
    """What ``retention.prune_old`` leaves of a student."""
    prune(run.artifact(run.plan.job("train", round_).output), WEIGHTS, lambda name: name not in KEPT)


def test_an_earlier_student_and_the_first_one(world: World, run: Run, tmp_path: Path) -> None:
    earlier, first = find_student(run, 1), find_student(run, 0)
    assert str(earlier) == "student 1 of 2 (trained in round 0)"
    assert earlier.folder.parent != find_student(run, 2).folder.parent
    assert first.folder == world.folder / "student"
    (tmp_path / "empty").mkdir()
    copy_student(first, tmp_path / "empty")
    assert AutoTokenizer.from_pretrained(tmp_path / "empty")("Ann")["input_ids"]
    assert set(stop_ids_in(tmp_path / "empty")) == set(run.facts.stop_ids)
    with pytest.raises(RunError, match="students 0 to 2, and no student 3"):
        find_student(run, 3)


def test_a_student_that_is_not_there_is_said_not_to_be(world: World, run: Run) -> None:
    more = open_run(load_config(str(world.config("more", store=str(run.store), rounds=2)), ["seed=7"]))
    with pytest.raises(RunError, match=r"no student of its own yet.*eopd run CONFIG"):
        newest(more)
    with pytest.raises(RunError, match=r"student 1 is not trained yet; those that are there: none"):
        find_student(more, 1)


def test_a_pruned_student_is_said_to_be(world: World, tmp_path: Path) -> None:
    run = open_run(load_config(str(world.config("pruned-student", evaluate=None))))
    for round_ in (0, 1):
        artifact = run.artifact(run.plan.job("train", round_).output)
        for part in (0, 1):
            with artifact.write_part(part) as folder:
                (folder / "model.safetensors").write_bytes(b"weights")
    assert newest(run) == 2
    lose_weights(run, 0)
    with pytest.raises(RunError, match=r"weights of student 1 were pruned.*those that are there: 2\."):
        find_student(run, 1)


def test_a_complete_sweep_whose_student_was_pruned_ends_well(world: World, one_round: str, tmp_path: Path) -> None:
    shutil.copytree(world.store(one_round), tmp_path / "store")
    config = world.config("seen-again", rounds=1, evaluate=None, store=str(tmp_path / "store"))
    run = open_run(load_config(str(config)))
    lose_weights(run, 0)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("sweep: [{name: a}, {name: b}]")
    ended = eopd("run", config, "--sweep", sweep).stderr
    for name in ("a", "b"):
        assert f"seen-again-{name}: no folder of student 1 of 1: the weights of student 1 were pruned" in ended
        assert (world.folder / "seen-again" / "runs" / f"seen-again-{name}" / "report" / "index.html").is_file()


def test_a_student_in_a_bucket_is_fetched_when_it_is_asked_for(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="needs obstore (the extra objectstore)")
    pytest.importorskip("moto", reason="needs moto, a server that speaks S3")
    with s3.server() as endpoint:
        for name, value in s3.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3.client(endpoint).create_bucket(Bucket="team")
        for job in run.plan.jobs:
            if job.stage.name == "train":
                copy(run.artifact(job.output), open_place("s3://team/store"))
        own = tmp_path / "store"
        config = world.config("from-a-bucket", store=[str(own), "s3://team/store"])
        other = open_run(load_config(str(config)))
        assert "student 2 of 2 lies in a bucket" in where_students_are(other)
        assert not (own / ".fetched").exists()
        student = find_student(other, newest(other))
        assert student.folder.is_relative_to(own / ".fetched")
        assert AutoModelForCausalLM.from_pretrained(student.folder)
        assert where_students_are(other).startswith(f"student 2 of 2 (trained in round 1): {student.folder}; ")
