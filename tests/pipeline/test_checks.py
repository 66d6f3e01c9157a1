"""What a run is refused for before anything is sampled: scores that lack what it reads, a disk or memory too small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eopd.pipeline.checks import check_machine, check_needs, check_runs, check_selection, other_sft_teacher
from eopd.pipeline.config import ConfigError
from eopd.pipeline.forecast import forecast
from eopd.pipeline.run import Run
from eopd.stages.rollout.stage import drawn_rows
from tests.pipeline.plan_case import make_facts, make_run
from tests.raises import raises


def run_with(folder: Path, objective: dict[str, Any], vocab: int = 1000, **changes: Any) -> Run:
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    return make_run(folder, train={"objective": objective}, **changes)


def needs_of_round(run: Run, round_: int) -> None:
    check_needs(run, run.plan.job("train", round_))


def test_the_message_names_the_objective_and_the_command(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"name": "tropd"})
    with raises(ConfigError, setting="train.objective.name", remedy="eopd run CONFIG --set score.head.k_max=64"):
        needs_of_round(run, 0)
    head = {"k_max": 64, "full_head_above": -1.0}
    needs_of_round(run_with(tmp_path, {"name": "tropd"}, score={"head": head}), 0)


def test_what_is_covered_passes(tmp_path: Path) -> None:
    for name in ("eopd", "opd", "fkl", "sft", "jsd"):
        needs_of_round(run_with(tmp_path, {"name": name}), 2)
    whole = {"k_max": 32, "full_head_above": -1.0}
    needs_of_round(run_with(tmp_path, {"name": "tropd"}, vocab=32, score={"head": whole}), 0)


def test_rollouts_that_cut_their_distribution_are_refused_before_they_are_sampled(tmp_path: Path) -> None:
    sampled = {"top_p": 0.95, "prompts_per_round": 10, "samples_per_prompt": 2, "rows_per_part": 4}
    run = run_with(tmp_path, {"name": "eopd"}, rollout=sampled)
    with raises(ConfigError, setting="rollout.top_p", remedy="rollout.top_p=1"):
        needs_of_round(run, 0)
    needs_of_round(run_with(tmp_path, {"name": "fkl"}, rollout=sampled), 0)


def test_a_round_whose_prompts_are_all_left_out_is_refused(tmp_path: Path) -> None:
    """Three rounds draw all but one of the prompts' 25 rows among them, 8 each."""
    rows = {"prompts_per_round": 8}
    changes: dict[str, Any] = {"rollout": rows, "train": {"select": {"where": {"topic": ["sums"]}}}}
    drawn = {row for part in drawn_rows(make_run(tmp_path, **changes).experiment, 1) for row in part}
    run = make_run(tmp_path, replace(make_facts(folder=tmp_path), selected_prompts=frozenset(drawn)), **changes)
    check_selection(run, run.plan.job("train", 1))
    for round_ in (0, 2):
        with raises(ConfigError, f"round {round_}", setting="train.select.where", remedy="rollout.prompts_per_round"):
            check_selection(run, run.plan.job("train", round_))


def test_the_students_own_ids_must_be_stored(tmp_path: Path) -> None:
    objective = {"name": "rkl_topk", "student_topk": 8}
    with raises(ConfigError, remedy="--set rollout.student_topk=8"):
        needs_of_round(run_with(tmp_path, objective), 0)
    sampled = {"student_topk": 8, "prompts_per_round": 10, "samples_per_prompt": 2, "rows_per_part": 4}
    needs_of_round(run_with(tmp_path, objective, rollout=sampled), 0)


@pytest.mark.parametrize(
    ("objective", "top_k", "lacking"),
    [
        ({"name": "eopd", "rkl": "topk"}, 64, "entropy"),
        ({"name": "rs_kd"}, 64, "draws"),
        ({"name": "fkl", "support": "renormalised"}, 1, "heads of 16 entries"),
        ({"name": "fkl", "support": "renormalised"}, 16, None),
        ({"name": "jsd"}, 1, None),
        ({"name": "opd", "rkl": "topk"}, 1, None),
    ],
)
def test_a_capture_serves_objectives_that_read_its_lists(
    tmp_path: Path, objective: dict[str, Any], top_k: int, lacking: str | None
) -> None:
    facts = make_facts(folder=tmp_path)
    student = replace(facts.student, stop_ids=(2, 7))  # two of them, of which a capture knows no log-probs
    run = make_run(
        tmp_path,
        replace(facts, student=student, teacher=replace(student, fingerprint="capture")),
        teacher={"path": None, "capture": {"path": "kd.parquet", "top_k": top_k}},
        prompts={"columns": {"response": "response"}},
        rollout={"source": "data", "samples_per_prompt": 1},
        train={"objective": objective},
        evaluate=None,
    )
    if lacking is None:
        needs_of_round(run, 0)
        return
    with raises(ConfigError, lacking, setting="train.objective.name", remedy="teacher.capture.top_k"):
        needs_of_round(run, 0)


LIGHTNING = {"objective": {"name": "lightning_opd"}}


@pytest.mark.parametrize("named", [None, "t", "./x/../t"])
def test_the_same_sft_teacher_or_none_gives_no_warning(tmp_path: Path, named: str | None) -> None:
    run = make_run(tmp_path, train=LIGHTNING, student={"path": "s", "sft_teacher": named})
    assert other_sft_teacher(run) is None


def test_another_sft_teacher_is_named(tmp_path: Path) -> None:
    student = {"path": "s", "sft_teacher": str(tmp_path)}
    warning = other_sft_teacher(make_run(tmp_path, train=LIGHTNING, student=student))
    assert warning is not None
    assert "lightning_opd" in warning
    assert f"student.sft_teacher names {tmp_path}" in warning
    assert other_sft_teacher(make_run(tmp_path, student=student)) is None  # eopd assumes nothing


def test_far_too_little_disk_is_refused_by_the_settings_that_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`samples_per_prompt: 100000` is a typo that would fill the disk in a few hours."""
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("eopd.pipeline.checks.free_memory", lambda: 0)
    monkeypatch.setattr("eopd.pipeline.forecast.shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    check_machine(forecast([make_run(tmp_path)]))
    with raises(ConfigError, setting="store", remedy="rollout.samples_per_prompt"):
        check_machine(forecast([make_run(tmp_path, rollout={"samples_per_prompt": 100_000})]))
    with raises(ConfigError, setting="store", remedy="evaluate.samples"):
        check_machine(forecast([make_run(tmp_path, evaluate={"samples": 100_000})]))
    monkeypatch.setattr("eopd.stages.train.stage._shapes", lambda _: {"weight": (100_000_000,)})
    with raises(ConfigError, setting="store", remedy="keep_checkpoints"):
        check_machine(forecast([make_run(tmp_path)]))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rollout": {"samples_per_prompt": 1_000_000}}, "rollout.samples_per_prompt"),
        ({"evaluate": {"samples": 100_000}}, "evaluate.samples"),
    ],
)
def test_a_part_that_memory_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], setting: str
) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("eopd.pipeline.checks.free_memory", lambda: 2 * 10**8)
    monkeypatch.setattr("eopd.pipeline.forecast.shutil.disk_usage", lambda _: SimpleNamespace(free=10**18))
    check_machine(forecast([make_run(tmp_path)]))
    with raises(ConfigError, setting=setting):
        check_machine(forecast([make_run(tmp_path, **changes)]))
    check_machine(forecast([make_run(tmp_path, **changes, launcher={"kind": "slurm"})]))


def test_an_evaluation_is_not_asked_for_what_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for check in ("check_prompts", "check_weights", "check_same_tokens"):
        monkeypatch.setattr(f"eopd.pipeline.checks.{check}", lambda *_, **__: None)
    save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    run = run_with(tmp_path, {"name": "tropd"})
    check_runs([run], run.plan.of_command("evaluate", 0))
    for command in ("rollout", "score", "train"):
        with raises(ConfigError, setting="train.objective.name"):
            check_runs([run], run.plan.of_command(command, 0))
