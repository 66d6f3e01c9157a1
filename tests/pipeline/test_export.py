"""Which files a student is made of, and what is said where it has no folder any more."""

from __future__ import annotations

import json
from pathlib import Path

from eopd.pipeline.export import copy_student, ends_of, find_student, where_students_are
from eopd.pipeline.run import Run
from eopd.stages.models.model_config import stop_ids_in
from eopd.storage.garbage import prune
from eopd.storage.paths import WEIGHTS
from tests.pipeline.plan_case import commit, make_run


def trained(folder: Path, **changes: object) -> Run:
    run = make_run(folder, **{"rounds": 2, **changes})
    for round_ in range(2):
        commit(run, run.plan.job("train", round_))
    return run


def test_a_student_without_a_folder_is_no_error_at_the_end_of_a_run(tmp_path: Path) -> None:
    """A longer run over the same store pruned it; or its files are damaged."""
    run = trained(tmp_path)
    artifact = run.artifact(run.plan.job("train", 1).output)
    assert where_students_are(run).endswith(
        f"{artifact.part_folder(WEIGHTS)}; `eopd student RUN --to FOLDER` copies it"
    )
    data = artifact.part_folder(WEIGHTS) / "data"
    data.write_text("cut short")
    assert "no folder of student 2 of 2: checkpoints/" in where_students_are(run)
    assert "verify --repair" in where_students_are(run)
    data.write_bytes(b"x" * 1000)
    prune(artifact, WEIGHTS, lambda name: True)
    assert where_students_are(run).startswith("no folder of student 2 of 2: the weights of student 2 were pruned")


def test_the_code_of_a_model_is_copied_with_it_where_it_is_trusted(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling_own.py", "tokenization_own.py"):
        (tmp_path / name).write_text("the first one's")
    (tmp_path / "config.json").write_text("{}")
    trusting = {"student": {"path": str(tmp_path), "trust_remote_code": True}}
    run = trained(tmp_path, **trusting)
    artifact = run.artifact(run.plan.job("train", 1).output)
    artifact.drop_part(WEIGHTS)
    with artifact.write_part(WEIGHTS) as folder:
        (folder / "modeling_own.py").write_text("as it was saved")
        (folder / "config.json").write_text("{}")
    for round_, words in ((0, "the first one's"), (2, "as it was saved")):
        target = tmp_path / f"copied {round_}"
        copy_student(find_student(run, round_), target)
        assert (target / "modeling_own.py").read_text() == words
        assert (target / "tokenization_own.py").exists()
        assert stop_ids_in(target) == [2, 5]
    plain = make_run(tmp_path, student={"path": str(tmp_path)})
    assert not [file for file in find_student(plain, 0).files if file.suffix == ".py"]


def test_where_responses_end_is_told_with_the_names_of_the_ids(tmp_path: Path) -> None:
    run = trained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 2, "content": "<eos>"}]}))
    student = find_student(run, 2)
    assert "end at 2 <eos>, 5, but generation_config.json of this folder names []" in ends_of(run, student)
    (student.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert ends_of(run, student) == "responses end at 2 <eos>, 5"
