"""The study's mechanics: a real run at toy size, killed and resumed; its record; order, intervals, the report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eopd.pipeline.config import parse_settings
from eopd.pipeline.plan import PlannedJob
from eopd.pipeline.runner import Runner
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import FAMILY, own_file_hash
from eopd.storage.coverage import Coverage
from examples.study import anchors, compare, design, experiments, rates, report, results, tables, workers, worlds
from examples.study import run as study_run
from examples.study.__main__ import at_toy_size, in_order, main
from examples.study.design import SMOKE, Experiment, Scale, Task
from examples.study.errors import StudyError

TOY = dataclasses.replace(SMOKE, problems=12, tuning_problems=4)
TINY = Scale(iterations=2, train_problems=128, problems=12, tuning_problems=4)
RATES = rates.untuned()
ALL = tuple(experiments.EXPERIMENTS.values())


def toy(name: str, **changes: object) -> Experiment:
    return dataclasses.replace(experiments.EXPERIMENTS[name], scale=TOY, **changes)  # type: ignore[arg-type]


def tiny(name: str) -> Experiment:
    """With two rounds, or one where a setting samples once: to be run."""
    one = experiments.EXPERIMENTS[name]
    settings = tuple(dataclasses.replace(setting, refresh=min(1, setting.refresh)) for setting in one.settings)
    return dataclasses.replace(one, scale=TINY, settings=settings)


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The Markdown table whose first column is called ``first``: by row, by column."""
    lines = text.splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: "|" in line, lines[begin:])]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_no_two_settings_are_the_same_run() -> None:
    toys = [at_toy_size(one) for one in ALL]
    for chosen, known in ((ALL, rates.tuned(results.RESULTS)), (toys, RATES)):
        tasks = in_order(chosen, known, seeds=[0])
        assert len({task.key for task in tasks}) == len(tasks) == len({task.name for task in tasks})


def test_a_seed_is_finished_before_the_next_begins(tmp_path: Path) -> None:
    tasks = in_order([experiments.MAIN], RATES)
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    assert len(tasks) == 9 * 5


def test_every_borrowed_setting_exists() -> None:
    for one in ALL:
        for name in one.borrows:
            lender, setting = name.split("/")
            experiments.EXPERIMENTS[lender].setting(setting)
        names = [*one.borrows, *(setting.name for setting in one.settings)]
        assert one.reference in names or len(one.seeds) == 1, one.name


def test_every_setting_is_valid_and_its_cache_holds_what_its_objective_needs(tmp_path: Path) -> None:
    for task in in_order(ALL, RATES, seeds=[0]):
        settings = parse_settings(task.config(tmp_path), source=task.name)
        objective = make_objective(settings.train.objective)
        Coverage(settings.score.head.rule(), vocab_size=64).require(objective.needs, task.name)
        responses = settings.rounds * settings.rollout.prompts_per_round * settings.rollout.samples_per_prompt
        assert responses == task.scale.responses, task.name
        assert settings.rollout.prompts_per_round <= task.scale.train_problems, task.name


def test_a_run_does_not_change_when_a_default_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved() -> dict[str, object]:
        tasks = in_order([experiments.MAIN], RATES, seeds=[0])
        return {task.name: parse_settings(task.config(tmp_path), source=task.name).semantic() for task in tasks}

    before = resolved()
    monkeypatch.setitem(FAMILY, "opd", {**FAMILY["opd"], "advantage": "current", "ratio": "is", "k": 8})
    monkeypatch.setitem(FAMILY, "eopd", {**FAMILY["eopd"], "support": "bucket"})
    assert resolved() == before


def test_every_keyed_setting_of_a_run_is_stated(tmp_path: Path) -> None:
    """A new one is to be stated in ``stated.py``, with the value that keeps the study's runs what they were."""
    for task in in_order(ALL, RATES, seeds=[0]):
        config = task.config(tmp_path)
        resolved = parse_settings(config, source=task.name).semantic()
        objective = resolved["train"]["objective"]
        for made in ("source", "token_key"):  # of a key, not of the settings
            objective.pop(made, None)
        if ":" in objective["name"]:  # reads what EOPD reads
            resolved["train"]["objective"] = {name: objective[name] for name in FAMILY["eopd"]}
        assert not list(_unsaid(resolved, config)), task.name


def _unsaid(resolved: object, said: object, where: str = "") -> Iterator[str]:
    if isinstance(resolved, dict) and isinstance(said, dict):
        for name, value in resolved.items():
            if name in said:
                yield from _unsaid(value, said[name], f"{where}.{name}")
            else:
                yield f"{where}.{name}"
    elif isinstance(resolved, list) and isinstance(said, list):
        for one, other in zip(resolved, said, strict=True):
            yield from _unsaid(one, other, where)


def test_rounds_are_whole() -> None:
    for one in (*ALL, *map(at_toy_size, ALL)):
        for setting in one.settings:
            assert setting.rounds(one.scale) * (setting.refresh or one.scale.iterations) == one.scale.iterations
            assert (setting.rounds(one.scale) == 1) == (setting.refresh == 0), "only those that sample once have one"
    with pytest.raises(AssertionError):
        experiments.STALENESS.setting("old-ppo-every16").rounds(SMOKE)


def test_a_smoke_run_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.study.__main__.SMOKE", TOY)
    arguments = ["--smoke", "--only", "main", "--settings", "opd", "mix", "--seeds", "0", "--workers", "1"]
    assert main([*arguments, "--work", str(tmp_path)]) == 0
    text = (tmp_path / "smoke" / "study.md").read_text()
    assert "2 results, made at " in text
    levels = table(text, "setting")
    assert levels["mix"]["gate fraction"] == "1.000", "its gate is open everywhere"
    assert levels["opd"]["tokens (k)"] == "18"
    assert table(text, "against opd, in pairs")["mix"]["seeds"] == "1"
    assert not (tmp_path / "smoke" / "store-seed0").exists()


def test_a_killed_run_goes_on_after_its_last_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny("gate")
    (task,) = rates.tasks_of(experiment, experiment.setting("random"), {"eopd-0.8": 2e-4}, (100,))
    sweep = study_run._sweep

    def killed(runner: object, round_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_run, "_sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        study_run.run(task, tmp_path, tmp_path / "results")
    monkeypatch.setattr(study_run, "_sweep", sweep)
    rounds = tmp_path / "runs" / "gate.random-seed100" / "rounds.jsonl"
    rows = [json.loads(line) for line in rounds.read_text().splitlines()]
    before = {"cpu_seconds": 1000.0}
    next(row for row in rows if "seconds" in row).update(
        commit="c0ffee", **before
    )  # as by a process at another commit, and slower
    rounds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = study_run.run(task, tmp_path, tmp_path / "results")
    content = json.loads(path.read_text())
    cost = content["cost"]
    assert cost["resumed_at_round"] == 1
    assert cost["responses"] == TINY.responses
    assert cost["seconds"] > sum(cost["stage_seconds"].values()) > 0
    assert cost["cpu_seconds"] > before["cpu_seconds"], "of both processes"
    assert cost["shared"] == []
    assert content["made"]["commits"] == sorted({"c0ffee", study_run.commit()})
    result = results.read(task, tmp_path / "results")
    assert result is not None
    assert content["inputs"]["objective"] == own_file_hash(str(design.HERE / "gates.py:random_gate"))
    assert str(design.HERE) not in path.read_text(), "a result says nothing of this machine's folders"
    assert result.correct.shape == result.distinct.shape == (TOY.problems,)
    assert (result.distinct <= result.correct).all()
    assert result.correct.mean() / 8 == pytest.approx(content["metrics"]["avg_at_k"])
    assert 0 < content["alignment"]["own"]["all"]["fkl"] < 2
    gates = content["training"]["gate_fraction"]
    assert 0.05 < sum(gates) / len(gates) < 0.35  # as many as the entropy gate has
    (second,) = rates.tasks_of(experiment, experiment.setting("proxy-4"), {"eopd-0.8": 2e-4}, (100,))
    study_run.run(second, tmp_path, tmp_path / "results")
    assert results.read(second, tmp_path / "results") is not None, "its round 0 was made by the first"
    left = {path.parent.name for path in tmp_path.glob("store-seed100/*/*/part-00000.json")}
    assert len(left) == 1, "the rollouts of round 0 stay for the other settings, nothing else does"
    other = dataclasses.replace(task, lr=3e-4)
    with pytest.raises(StudyError, match=rf"random-seed100.json is a .*{task.key}.* than gate/random.*{other.key}"):
        results.read(other, tmp_path / "results")


INPUTS = {"student": "s", "teacher": "t", "prompts": "p", "problems": "q"}


def made_up(
    task: Task,
    folder: Path,
    shift: int = 0,
    cost: dict[str, object] | None = None,
    commits: tuple[str, ...] = (),
    **inputs: str,
) -> None:
    rng = np.random.default_rng(task.seed)
    correct = np.minimum(8, rng.integers(0, 5, size=40) + shift)
    figures = dict.fromkeys(("fkl", "rkl", "agreement", "share", "student_entropy", "student_above"), 0.3)
    content = {
        "correct": results.encode(correct),
        "distinct": results.encode(correct // 2),
        "metrics": {"self_bleu": 0.5, "token_entropy": 0.3},
        "training": {"gate_fraction": [0.1, 0.3]} if task.setting.name == "random" else {},
        "settings": {"train": {"optimizer": {"lr": task.lr}}},
        "alignment": {name: {"all": figures, "above": figures, "below": figures} for name in ("own", "teacher")},
    }
    made: dict[str, object] = {"commit": "c0ffee", **({"commits": commits} if commits else {})}
    stages = {"rollout": 1.0, "score": 1.0, "train": 1.0, "evaluate": 1.0}
    paid = {"bytes_per_token": 30.0, "seconds": 60.0, "cpu_seconds": 60.0, "tokens": 590_000, "resumed_at_round": 0}
    paid |= {"stage_seconds": stages, **(cost or {})}
    body = {**content, "seed": task.seed, "made": made, "inputs": {**INPUTS, **inputs}, "cost": paid}
    results.write(task, body, folder)


def test_the_report_compares_what_is_there_and_keeps_what_was_written(tmp_path: Path) -> None:
    for task in in_order([toy("main"), toy("gate")], RATES, seeds=[0, 1, 2], settings=["opd", "mix", "random"]):
        made_up(task, tmp_path, shift=task.setting.name == "mix")
    document = tmp_path / "study.md"
    document.write_text("# Mine\n\n<!-- study:main -->\nold\n<!-- /study -->\nWritten by hand.\n")
    report.write([toy("main"), toy("gate"), toy("reverse")], RATES, tmp_path, document)
    text = document.read_text()
    assert "old" not in text
    assert "Written by hand." in text
    assert "| mix | 3 | **+0.1250 [+0.1250, +0.1250]**" in text  # every problem has one right answer more
    assert "main/opd" in text, "the gate's comparison borrows from the main one"
    assert "| primary, in pairs |" not in text, "neither of the named pairs is there"
    assert "Unequal tokens" not in text
    assert " | 0.200 | 590 | 30.0 | 1.0 |" in text, "the random gate's fraction, tokens, bytes and minutes"
    drawing = (tmp_path / "study-main.svg").read_bytes()
    assert b"mix" in drawing
    assert len(drawing) < 50_000
    assert "No result yet: `python -m examples.study --only reverse`" in text, "borrowed results alone are no results"
    report.write([toy("main"), toy("gate"), toy("reverse")], RATES, tmp_path, document)
    assert document.read_text() == text
    assert (tmp_path / "study-main.svg").read_bytes() == drawing


def test_named_pairs_are_primary_where_they_were_named_first(tmp_path: Path) -> None:
    names = ["opd", "mix", "eopd-0.8", "opd-lr0.0002", "mix-lr0.0002"]
    for task in in_order([toy("main"), toy("rates")], RATES, seeds=[0, 1, 2], settings=names):
        made_up(task, tmp_path)
    first, second = (tables.block(one, tables.load(one, RATES, tmp_path)) for one in (toy("main"), toy("rates")))
    assert "| primary, in pairs |" in first
    assert "| named pairs |" in second
    assert "primary" not in second
    header, row = (
        next(line for line in second.splitlines() if line.startswith(start)) for start in ("| named", "| main")
    )
    assert "distinct correct over seeds and problems | self-BLEU | entropy (nats) |" in header
    assert row.count("[") == header.count("|") - 3, "every difference has an interval"


def test_a_result_of_other_settings_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = in_order([experiments.TUNE], RATES, seeds=[100])[0]
    made_up(dataclasses.replace(task, lr=3e-4), tmp_path)
    before = results.path_of(task, tmp_path).read_bytes()
    with pytest.raises(StudyError, match="is a result of other settings"):
        made_up(task, tmp_path)
    assert main(["--only", "tuning", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]) == 2
    assert f"{results.path_of(task, tmp_path)} is a result of other settings" in capsys.readouterr().err
    assert results.path_of(task, tmp_path).read_bytes() == before


def test_a_report_does_not_guess_learning_rates(tmp_path: Path) -> None:
    for task in in_order([experiments.TUNE], RATES):
        if task.setting.name != "opd-lr0.0002":
            made_up(task, tmp_path, shift=task.setting.name in ("mix-lr5e-05", "opd-lr0.0008"))
    found = rates.tuned(tmp_path)
    assert found["mix"] == 5e-5, "the best of the grid"
    assert tables.load(experiments.MAIN, found, tmp_path) == [], "nothing to look up a rate for"
    for task in in_order([experiments.MAIN], RATES, seeds=[0], settings=["opd"]):
        made_up(task, tmp_path)
    with pytest.raises(StudyError, match=r"rate of opd is not known, for want of tuning/opd-lr0.0002:"):
        tables.load(experiments.MAIN, found, tmp_path)


def test_results_of_other_inputs_are_not_compared(tmp_path: Path) -> None:
    main_task, gate_task = in_order([toy("main"), toy("gate")], RATES, seeds=[0], settings=["eopd-0.8", "random"])
    made_up(main_task, tmp_path)
    made_up(gate_task, tmp_path, objective="first")
    assert len(tables.load(toy("gate"), RATES, tmp_path)) == 2
    made_up(main_task, tmp_path, teacher="other")
    with pytest.raises(
        StudyError, match=r"gate/random-seed0.json and .*main/eopd-0.8-seed0.json .*: teacher t and other"
    ):
        tables.load(toy("gate"), RATES, tmp_path)
    made_up(main_task, tmp_path)
    (proxy,) = in_order([toy("gate")], RATES, seeds=[0], settings=["proxy-4"])
    made_up(proxy, tmp_path, objective="second")
    with pytest.raises(StudyError, match=r"gate/proxy-4-seed0.json and .*: objective second and first"):
        tables.load(toy("gate"), RATES, tmp_path)


def test_anchors_say_what_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = anchors.measure_both(tmp_path, TOY)
    committed = json.loads((results.RESULTS / "main" / "opd-seed0.json").read_text())
    for role in anchors.ROLES:
        assert found["inputs"][role] == committed["inputs"][role], "of the models that the study trained"
        assert found[role]["problems"] == TOY.problems
    assert found["made"]["commit"] == study_run.commit()
    monkeypatch.setattr(anchors, "PATH", tmp_path / "anchors.json")
    assert anchors.lines(found["inputs"]) == []
    anchors.PATH.write_text(json.dumps(found))
    assert "The student before training: Avg@8 0." in anchors.lines(found["inputs"])[0]
    with pytest.raises(StudyError, match=r"anchors.json is of other problems .* than the results"):
        anchors.lines(committed["inputs"])


def test_a_table_has_the_seeds_of_its_experiment(tmp_path: Path) -> None:
    for task in in_order([toy("main"), toy("gate")], RATES, seeds=[0, 1, 2, 3, 100], settings=["opd", "random"]):
        made_up(task, tmp_path)
    seeds = {rows.name: list(rows.by_seed) for rows in tables.load(toy("gate"), RATES, tmp_path)}
    assert seeds == {"main/opd": [0, 1, 2], "random": [0, 1, 2]}
    assert [list(rows.by_seed) for rows in tables.load(toy("main"), RATES, tmp_path)] == [[0, 1, 2, 3]]


def test_costs_say_what_was_shared_and_leave_out_what_was_not_counted(tmp_path: Path) -> None:
    names = ["old-none-once", "old-is-once", "old-none-every4", "old-is-every4", "old-none-every1", "old-ppo-once"]
    tasks = in_order([toy("staleness")], RATES, seeds=[0], settings=names)
    once = {"train": 1.0, "evaluate": 1.0}
    costs: dict[str, dict[str, object]] = {
        "old-none-once": {"cpu_seconds": 240.0},
        "old-is-once": {"cpu_seconds": 120.0, "stage_seconds": once},  # whose responses were those of the former
        "old-none-every4": {"cpu_seconds": 6.0, "resumed_at_round": 31},  # its last process only
        "old-is-every4": {"cpu_seconds": 180.0, "resumed_at_round": 31, "shared": []},
        "old-none-every1": {"tokens": 600_000},
        "old-ppo-once": {"shared": None},  # killed before it wrote down what its sampling cost
    }
    for task in tasks:
        made_up(task, tmp_path, cost=costs[task.setting.name], commits=("c0ffee", "decaf"))
    text = tables.block(toy("staleness"), tables.load(toy("staleness"), RATES, tmp_path))
    minutes = {name: row["CPU minutes"] for name, row in table(text, "setting").items()}
    assert minutes == dict(zip(sorted(names), ["3.0", "2.0 †", "1.0", "-", "4.0", "-"], strict=True))
    assert "† Without sampling and scoring" in text
    assert "old-none-every1 was trained on 600 thousand" in text
    assert "(1.7% more" in text
    assert "made at c0ffee, decaf." in text


def test_the_document_has_a_block_of_every_experiment(tmp_path: Path) -> None:
    document = tmp_path / "study.md"
    document.write_text((design.HERE.parent.parent / "docs" / "study.md").read_text())
    report.write(ALL, RATES, tmp_path, document)
    text = document.read_text()
    assert text.count("<!-- study:") == len(ALL)
    for one in ALL:
        assert f"No result yet: `python -m examples.study --only {one.name}`" in text


def test_t_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [compare.paired(rng.normal(1.0, 0.3, size=(5, 2)), np.zeros((5, 2))).interval for _ in range(800)]
    assert np.mean([one is not None and one.low <= 1.0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.025)
    assert compare.over_seeds(np.ones(1)).interval is None


@pytest.mark.parametrize("s", [3, 5])
def test_a_crossed_interval_of_seeds_alone_is_that_of_the_pairs(s: int) -> None:
    """Seeds vary, problems less than the noise of sampling does: nothing but the seeds' mean square is left."""
    a = np.random.default_rng(s).normal(size=(s, 40))
    a += np.arange(s)[:, None] - a.mean(axis=0)
    seeds, both = compare.paired(a, 0 * a), compare.crossed(a, 0 * a)
    assert seeds.interval is not None
    assert both.interval is not None
    assert (both.interval.low, both.interval.high) == pytest.approx((seeds.interval.low, seeds.interval.high))


@pytest.mark.parametrize(("s", "least", "widest"), [(3, 0.905, 2.25), (5, 0.93, 1.45)], ids=["3 seeds", "5 seeds"])
@pytest.mark.parametrize(
    ("seeds", "problems", "residual"),
    [(1.0, 0.0, 0.1), (0.0, 1.0, 0.1), (0.0, 0.0, 1.0), (0.1, 0.0, 1.0), (0.02, 0.3, 1.0), (0.5, 1.0, 1.0)],
    ids=["seeds", "problems", "residual", "few seeds' noise", "as measured", "all"],
)
def test_crossed_intervals_cover_the_mean_whatever_varies(
    seeds: float, problems: float, residual: float, s: int, least: float, widest: float
) -> None:
    """Known standard deviations, in a study of 60 problems."""
    rng = np.random.default_rng(2)
    draws, p = 1000, 60
    table = seeds * rng.normal(size=(draws, s, 1)) + problems * rng.normal(size=(draws, 1, p))
    table = table + residual * rng.normal(size=(draws, s, p))
    found = [compare.crossed(one, np.zeros((s, p))).interval for one in table]
    low, high = np.array([(one.low, one.high) for one in found if one is not None]).T
    assert least <= np.mean((low <= 0) & (high >= 0)) <= 0.985
    true = np.sqrt(seeds**2 / s + problems**2 / p + residual**2 / (s * p))
    # a bootstrap that draws both is 1.6 times as wide as the residual; S - 1 degrees of freedom cost a factor of
    # 1.4 (S = 5) or 2.2 (S = 3)
    assert 0.9 <= np.median(high - low) / 2 / (1.96 * true) <= (1.2 if seeds == 0 else widest)


def test_a_crossed_interval_is_never_below_the_noise_of_sampling() -> None:
    """Seeds whose means are equal by luck: the t interval over seeds is a point, the crossed one is not."""
    a = np.random.default_rng(1).normal(0.1, 1.0, size=(5, 400))
    a -= a.mean(axis=1, keepdims=True) - 0.1
    b = np.zeros_like(a)
    seeds, both = compare.paired(a, b).interval, compare.crossed(a, b).interval
    assert seeds is not None
    assert both is not None
    assert seeds.low == pytest.approx(seeds.high)
    assert (both.high - both.low) / 2 == pytest.approx(1.96 * a.std() / np.sqrt(2000), rel=0.1)
    same = compare.crossed(b, b)
    assert same.interval is not None
    assert (same.mean, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0)
    assert compare.crossed(a[:2], b[:2]).interval is None


def test_what_was_made_for_another_setting_is_not_paid_for_again(tmp_path: Path) -> None:
    experiment = tiny("staleness")
    first, second = (
        Task(experiment, experiment.setting(name), 100, 5e-5) for name in ("old-ppo-once", "old-none-once")
    )
    costs = [
        json.loads(study_run.run(task, tmp_path, tmp_path / "results").read_text())["cost"] for task in (first, second)
    ]
    assert [cost["shared"] for cost in costs] == [[], ["rollout", "score"]]
    assert costs[1]["tokens"] == costs[0]["tokens"] > 0
    assert "rollout" in costs[0]["stage_seconds"]
    assert "rollout" not in costs[1]["stage_seconds"]


def test_a_cost_that_a_killed_process_did_not_write_down_is_not_said_to_be_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny("staleness")
    task = Task(experiment, experiment.setting("old-none-once"), 100, 5e-5)
    run = Runner.run

    def killed_after_scoring(self: Runner, job: PlannedJob) -> bool:
        made = run(self, job)
        if job.stage == "score":
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(Runner, "run", killed_after_scoring)
    with pytest.raises(KeyboardInterrupt):
        study_run.run(task, tmp_path, tmp_path / "results")
    monkeypatch.setattr(Runner, "run", run)
    with (tmp_path / "runs" / "staleness.old-none-once-seed100" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 0, "sta')  # a write cut short
    cost = json.loads(study_run.run(task, tmp_path, tmp_path / "results").read_text())["cost"]
    assert cost["shared"] is None, "not known, as what scoring cost is not"
    assert cost["responses"] == TINY.responses
    assert cost["score_bytes"] > 0


DEADLY = """
import dataclasses, json, os, signal
from pathlib import Path
from examples.study import gates

ROUNDS = Path(__file__).parent / "runs" / "gate.random-seed100" / "rounds.jsonl"
DEATH = Path(__file__).with_name("death")

def random_gate(settings):
    objective = gates.random_gate(settings)

    def token_loss(student, teacher, context):
        if not DEATH.exists() and any(json.loads(line)["round"] == 1 for line in ROUNDS.read_text().splitlines()):
            DEATH.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return objective.token_loss(student, teacher, context)

    return dataclasses.replace(objective, token_loss=token_loss)
"""


class DeadlyTask(Task):
    """Training its round 1 kills the process, once."""

    def config(self, work: Path) -> dict[str, Any]:
        config = super().config(work)
        config["train"]["objective"]["name"] = f"{work / 'deadly.py'}:random_gate"
        return config


def test_a_worker_that_is_killed_loses_one_task_which_goes_on(tmp_path: Path) -> None:
    gate = tiny("gate")
    refused = dataclasses.replace(gate.setting("random"), name="refused", objective={"name": "mc_opd"})
    tasks = [DeadlyTask(gate, gate.setting("random"), 100, 2e-4), Task(gate, refused, 101, 2e-4)]
    (tmp_path / "deadly.py").write_text(DEADLY)
    trained = tmp_path / "store-seed101" / "checkpoints"
    trained.mkdir(parents=True)
    (tmp_path / "runs" / "main.opd-seed100").mkdir(parents=True)  # stopped earlier, and not asked for this time
    said: list[str] = []
    failed = workers.run_all(tasks, tmp_path, tmp_path / "results", 1, said.append)
    assert [line.split(":")[0] for line in failed] == ["gate/refused-seed101"]
    assert said[0].startswith("gate/random-seed100: its process was killed by SIGKILL")
    made = results.read(tasks[0], tmp_path / "results")
    assert made is not None
    assert (made.content["cost"]["resumed_at_round"], made.content["cost"]["shared"]) == (1, [])
    assert trained.exists(), "what was trained is for the next attempt where a task of the seed failed"
    assert (tmp_path / "store-seed100").exists(), "and where another run of the seed was stopped"


def test_an_error_that_is_not_the_users_keeps_its_trace(tmp_path: Path) -> None:
    for task in in_order([at_toy_size(experiments.MAIN)], RATES, seeds=[0, 1], settings=["opd"]):
        made_up(task, tmp_path / "smoke" / "results")
    short = results.path_of(task, tmp_path / "smoke" / "results")
    content = json.loads(short.read_text())
    short.write_text(json.dumps({**content, "correct": content["correct"][1:]}))
    with pytest.raises(ValueError, match="must have the same shape"):
        main(["--smoke", "--report", "--only", "main", "--work", str(tmp_path)])


def test_gsm8k_is_found_where_its_script_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "EXAMPLES", tmp_path / "repository" / "examples")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    work = tmp_path / "work"
    for role in ("student", "teacher"):
        (work / "gsm8k-pair" / role).mkdir(parents=True)
        (work / "gsm8k-pair" / role / "model.safetensors").touch()
    scale = TINY
    with pytest.raises(StudyError, match=r"python -m examples.gsm8k.data"):
        worlds.GSM8K.prepare(work, scale)
    for place in ("shared/data/gsm8k", "here/data/gsm8k", "repository/data/gsm8k"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for name in ("train", "test"):
            (folder / f"{name}.jsonl").write_text(f"{place}\n")
        worlds.GSM8K.prepare(work, scale)
        problems = worlds.GSM8K.problems(work, scale)
        assert (problems / "train.jsonl").read_text() == f"{place}\n", "before the places that were there already"
        shutil.rmtree(problems)


def test_two_studies_do_not_share_a_work_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with workers.alone(tmp_path / "study.lock"):
        assert main(["--only", "gate", "--work", str(tmp_path), "--results", str(tmp_path / "results")]) == 2
    assert str(tmp_path / "study.lock") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["study.lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_in_the_background_is_ended_with_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "examples.study", "--smoke", "--only", "gate", "--work", str(tmp_path)]
    study = subprocess.Popen(
        command,
        cwd=design.HERE.parent.parent,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        runs = tmp_path / "smoke" / "runs"
        while not runs.exists():
            assert study.poll() is None
            time.sleep(0.1)
        study.send_signal(number)
        assert study.wait(30) == 128 + number
        until = time.monotonic() + 10
        while _of_session(study.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not _of_session(study.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()


def _of_session(session: int) -> list[str]:
    """Processes that still live in a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(its) == session and state != "Z":
                found.append(stat.parent.name)
    return found
