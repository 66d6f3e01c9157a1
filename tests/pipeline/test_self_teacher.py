"""Teachers that are students: of the run itself, or of another run. Plans, keys, pruning and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eopd.pipeline.checks import check_other_students, idle_teacher
from eopd.pipeline.config import ConfigError, RunSettings, load_config, parse_settings
from eopd.pipeline.doctor_inputs import check_inputs
from eopd.pipeline.errors import RunError
from eopd.pipeline.export import find_student
from eopd.pipeline.plan import Plan
from eopd.pipeline.retention import note, note_of, prune_old
from eopd.pipeline.run import Run, open_run
from eopd.stages.experiment import Facts
from eopd.storage.paths import OPTIMIZER, WEIGHTS
from tests.pipeline.plan_case import RAW, commit, make_facts, make_settings, plan_of, run_of
from tests.raises import raises
from tests.stages.tiny_models import save_teacher

SHOWN: dict[str, Any] = {
    "prompts": {"path": "p.jsonl", "columns": {"answer": "answer"}},
    "score": {"teacher_prompt": {"opening": "{{answer}} "}},
}


def own(folder: Path | None = None) -> Facts:
    """Facts of a run whose student is its teacher."""
    facts = make_facts() if folder is None else make_facts(folder=folder)
    return replace(facts, teacher=facts.student)


def self_taught(rounds: int = 5, **teacher: Any) -> RunSettings:
    raw = {**RAW["evaluate"], "alignment": {}}
    settings = make_settings(rounds=rounds, evaluate=raw, **SHOWN)
    return RunSettings.model_validate({**settings.model_dump(), "teacher": teacher})


def taught_by(plan: Plan, stage: str, rounds: int) -> list[int | None]:
    """For each round, which student the jobs of a stage read as the teacher; None: the external model."""
    students = {plan.job("train", round_).output.key: round_ + 1 for round_ in range(rounds)}
    collected: list[int | None] = []
    for round_ in range(rounds):
        job = plan.job(stage, round_)
        input_ = job.inputs.get("teacher")
        collected.append(None if input_ is None else students[input_.identity.key])
        assert job.output.inputs["teacher"] == ("s0" if input_ is None else input_.identity.key)
        assert input_ is None or input_.needed() == {WEIGHTS}
    return collected


@pytest.mark.parametrize(
    ("teacher", "students"),
    [
        ({"student": "initial"}, [None] * 5),
        ({"student": "latest"}, [None, 1, 2, 3, 4]),
        ({"student": "latest", "renewed": 2}, [None, None, 2, 2, 4]),
        ({"student": "latest", "renewed": 9}, [None] * 5),
    ],
)
def test_which_student_teaches(teacher: dict[str, Any], students: list[int | None]) -> None:
    plan = plan_of(self_taught(**teacher), own())
    assert taught_by(plan, "score", 5) == students
    assert taught_by(plan, "align", 5) == students


def test_score_jobs_come_after_their_teacher_and_rollouts_are_shared() -> None:
    plans = [plan_of(self_taught(student="latest", renewed=renewed), own()) for renewed in (1, 2)]
    for plan in plans:
        names = [job.name for job in plan.jobs]
        assert names.index("train 1") < names.index("score 2")
    keys = [{job.name: job.output.key for job in plan.jobs} for plan in plans]
    assert keys[0]["score 0"] == keys[1]["score 0"]
    assert keys[0]["rollout 1"] == keys[1]["rollout 1"]
    assert keys[0]["score 1"] != keys[1]["score 1"]


def test_a_teacher_that_later_rounds_read_is_not_pruned(tmp_path: Path) -> None:
    settings = self_taught(student="latest", renewed=3).model_dump()
    settings |= {"store": str(tmp_path / "store"), "runs": str(tmp_path / "runs")}
    settings["train"] |= {"keep_checkpoints": 1, "keep_optimizer_states": 1}
    run = run_of(RunSettings.model_validate({**settings, "rounds": 6, "evaluate": None}), own(tmp_path))
    for job in run.plan.jobs:
        if job.round < 5 and job.name != "score 4":
            commit(run, job)
    rounds = {job.output.key: job.round for job in run.plan.jobs if job.is_prunable}
    gone = {(rounds[key], part) for key, part in run.unwanted()}
    assert (2, WEIGHTS) not in gone, "student 3 is still to score rounds 4 and 5"
    assert (1, WEIGHTS) in gone
    teacher = run.artifact(run.plan.job("train", 2).output)
    teacher.drop_part(WEIGHTS)
    assert run.ready_parts(run.plan.job("score", 4)) == set(), "all parts wait for the teacher"
    with raises(RunError, artifact=f"{teacher.kind}/{teacher.key}", remedy="eopd train CONFIG --round 2"):
        run.check_inputs(run.plan.job("score", 4), [0])


@pytest.mark.parametrize(
    ("teacher", "changes", "setting"),
    [
        ({}, {}, "teacher"),
        ({"path": "t", "student": "initial"}, {}, "teacher"),
        ({"student": "first"}, {}, "teacher.student"),
        ({"student": "initial", "renewed": 2}, SHOWN, "teacher.renewed"),
        ({"student": "initial", "dtype": "bfloat16"}, SHOWN, "teacher.dtype"),
        ({"path": "t", "renewed": 2}, {}, "teacher.renewed"),
        ({"run": "phase1", "tokenizer": "t"}, {}, "teacher.tokenizer"),
        ({"student": "latest"}, {}, "teacher.student"),
        ({"student": "latest", "renewed": 1}, {}, "teacher.student"),
        (
            {"student": "latest"},
            {
                "prompts": {"suffix": " Go.", "template": "plain"},
                "score": {"teacher_prompt": {"kind": "template", "template": "plain", "suffix": " Go."}},
            },
            "teacher.student",
        ),
    ],
)
def test_teachers_that_cannot_be_are_refused(teacher: dict[str, Any], changes: dict[str, Any], setting: str) -> None:
    raw = {**RAW, **changes, "teacher": teacher}
    raw["prompts"] = {**RAW["prompts"], **changes.get("prompts", {})}
    with raises(ConfigError, setting=setting):
        parse_settings(raw, "test")


def test_a_student_by_no_name_is_refused() -> None:
    with raises(ConfigError, setting="student"):
        parse_settings({**RAW, "student": {}}, "test")


def test_a_teacher_that_says_what_the_student_says_is_warned_about(tmp_path: Path) -> None:
    def warning(**changes: Any) -> str | None:
        raw = {**RAW, **changes, "teacher": {"student": "initial"}}
        return idle_teacher(run_of(RunSettings.model_validate(raw), own(tmp_path)))

    assert "in round 0 every log-ratio is 0" in (warning() or "")
    assert warning(**SHOWN) is None
    hot = {"temperature": 0.5, "allow_other_temperature": True}
    assert warning(score=hot) is None


# -- students of other runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("student", "teacher"):
        save_teacher("llama", folder / name, seed=len(name))
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in range(6)))
    return folder


def phase(models: Path, folder: Path, name: str, **changes: Any) -> Path:
    raw: dict[str, Any] = {
        "name": name,
        "rounds": 2,
        "store": str(folder / "store"),
        "runs": str(folder / "runs"),
        "student": {"path": str(models / "student"), "dtype": "bfloat16"},
        "teacher": {"path": str(models / "teacher")},
        "prompts": {"path": str(models / "p.jsonl"), "columns": {"answer": "answer"}},
        "rollout": {"prompts_per_round": 4, "rows_per_part": 2},
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def opened(path: Path) -> Run:
    return open_run(load_config(str(path)))


def test_phases_follow_each_other_with_keys_known_before_work(models: Path, tmp_path: Path) -> None:
    first = opened(phase(models, tmp_path, "one"))
    path = phase(
        models,
        tmp_path,
        "two",
        student={"run": str(tmp_path / "one.yaml")},
        teacher={"student": "initial"},
        score={"teacher_prompt": {"opening": "{{answer}}"}},
    )
    second = opened(path)
    student = first.plan.job("train", 1).output
    rollout, score, train = (second.plan.job(name, 0) for name in ("rollout", "score", "train"))
    assert rollout.output.inputs["policy"] == score.output.inputs["teacher"] == student.key
    assert train.output.inputs["student"] == student.key
    assert [
        job.inputs[role].identity for job, role in ((rollout, "policy"), (score, "teacher"), (train, "policy"))
    ] == [student] * 3
    assert train.inputs["policy"].needed() == {WEIGHTS}, "the optimiser of a run begins anew"
    assert second.plan.job("train", 1).inputs["policy"].needed() == {WEIGHTS, OPTIMIZER}
    assert second.facts.stop_ids == first.facts.stop_ids

    with raises(ConfigError, setting="student.run", remedy="run one first"):
        check_other_students(second, [second])
    check_other_students(second, [first, second])
    with raises(RunError, remedy="Another run makes it"):
        second.check_inputs(rollout, [0])
    with pytest.raises(RunError, match="student 0 is student 2 of the run one"):
        find_student(second, 0)
    assert second.ready_parts(rollout) == set()

    commit(first, first.plan.job("train", 1))
    check_other_students(second, [second])
    assert second.ready_parts(rollout) == {0, 1}
    assert find_student(second, 0).folder == second.artifact(student).part_folder(WEIGHTS)
    assert second.student(0).fingerprint == student.key
    assert second.context(score, [0], None).teacher.path == second.student(0).path  # type: ignore[arg-type]


def test_responses_that_come_with_the_prompts_need_no_weights_of_a_student(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(phase(models, tmp_path, "one"))
    second = opened(
        phase(
            models,
            tmp_path,
            "two",
            student={"run": str(tmp_path / "one.yaml")},
            rollout={"source": "data"},
            prompts={"path": str(models / "p.jsonl"), "columns": {"response": "answer"}},
            train={"objective": "sft"},
        )
    )
    rollout, jobs = second.plan.job("rollout", 0), []
    monkeypatch.setattr("eopd.stages.rollout.run.run", jobs.append)
    rollout.stage.run(second.context(rollout, [0], None))  # type: ignore[arg-type]
    assert rollout.inputs == {}
    assert jobs[0].policy.path == str(models / "student")
    assert second.plan.job("train", 0).inputs["policy"].identity == first.plan.job("train", 1).output


def test_a_student_that_another_run_reads_is_kept(models: Path, tmp_path: Path) -> None:
    keeping = {"keep_checkpoints": 1, "keep_optimizer_states": 1}
    first = opened(phase(models, tmp_path, "one", rounds=3, train=keeping))
    first.paths.folder.mkdir(parents=True)
    first.paths.config.write_text(yaml.safe_dump(first.settings.model_dump(mode="json")))
    second = opened(phase(models, tmp_path, "two", teacher={"run": "one", "round": 1}))
    teacher = first.plan.job("train", 0).output
    assert second.plan.job("score", 1).output.inputs["teacher"] == teacher.key
    assert second.plan.job("rollout", 0).inputs == {}
    guided = opened(
        phase(
            models,
            tmp_path,
            "guided",
            teacher={"run": "one"},
            rollout={"source": "teacher"},
            train={"objective": "sft"},
        )
    )
    assert guided.plan.job("rollout", 0).inputs["teacher"].identity == first.plan.job("train", 2).output
    noted = note_of(second)
    assert (teacher.kind, teacher.key) in noted.artifacts
    assert (teacher.key, WEIGHTS) in noted.wanted
    for job in first.plan.jobs:
        commit(first, job)
    second.paths.folder.mkdir(parents=True)
    second.paths.config.write_text(yaml.safe_dump(second.settings.model_dump(mode="json")))
    note(second)
    prune_old(first)
    assert WEIGHTS not in first.artifact(teacher).pruned()
    assert WEIGHTS in first.artifact(first.plan.job("train", 1).output).pruned()
    for job in second.plan.jobs:
        commit(second, job)
    assert (teacher.key, WEIGHTS) not in note_of(second).wanted, "it has been read by all that read it"


@pytest.mark.parametrize(
    ("student", "setting"),
    [
        ({"run": "nowhere"}, "student.run"),
        ({"run": "one.yaml", "round": 3}, "student.round"),
        ({"run": "two.yaml"}, "student.run"),
        ({"run": "three.yaml"}, "student.run"),
    ],
)
def test_runs_that_cannot_be_read_are_refused(
    models: Path, tmp_path: Path, student: dict[str, Any], setting: str
) -> None:
    phase(models, tmp_path, "one")
    phase(models, tmp_path, "three", teacher={"run": str(tmp_path / "two.yaml")})
    named = {**student, "run": student["run"] if "." not in student["run"] else str(tmp_path / student["run"])}
    path = phase(models, tmp_path, "two", student=named)
    with raises(ConfigError, setting=setting):
        opened(path)
    findings = {one.name: one for one in check_inputs(load_config(str(path)))}
    assert findings["student"].state == "broken" or "three" in student["run"], "doctor follows students only"


def test_doctor_shows_a_self_teacher(models: Path, tmp_path: Path) -> None:
    path = phase(models, tmp_path, "one", teacher={"student": "initial"})
    findings = {one.name: one for one in check_inputs(load_config(str(path)))}
    assert findings["teacher"].state == "ok"
    assert "teacher.weights" not in findings
    assert {"student.weights", "tokens", "prompts (teacher)"} <= findings.keys()
