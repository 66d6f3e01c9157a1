"""What the report makes of results, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from examples.study import anchors, design, experiments, rates, report, results, tables, worlds
from examples.study import run as study_run
from examples.study.__main__ import at_toy_size, in_order, main, with_data
from examples.study.errors import StudyError
from tests.study.toys import ALL, RATES, TOY, made_up, table, toy


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


def test_named_pairs_of_a_task_that_is_not_graded_are_of_alignment(tmp_path: Path) -> None:
    experiment = toy("gsm8k")
    for task in in_order([experiment], RATES, seeds=[0, 1, 2], settings=["opd-lr0.0001", "eopd-0.8-lr0.0001"]):
        made_up(task, tmp_path)
    text = tables.block(experiment, tables.load(experiment, RATES, tmp_path))
    assert "| named pairs | seeds | FKL, H > 0.8 |" in text
    assert "| eopd-0.8-lr0.0001 - opd-lr0.0001 | 3 | +0.0000 [" in text
    assert "Pass@8" not in text


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
    result = rates.tuned(tmp_path)
    assert result["mix"] == 5e-5, "the best of the grid"
    assert tables.load(experiments.MAIN, result, tmp_path) == [], "nothing to look up a rate for"
    for task in in_order([experiments.MAIN], RATES, seeds=[0], settings=["opd"]):
        made_up(task, tmp_path)
    with pytest.raises(StudyError, match=r"rate of opd is not known, for want of tuning/opd-lr0.0002:"):
        tables.load(experiments.MAIN, result, tmp_path)


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
    main_at_toy_size = toy("main", seeds=(0, 1))
    measured = anchors.measure(main_at_toy_size, tmp_path)
    committed = json.loads((results.RESULTS / "main" / "opd-seed0.json").read_text())
    for role in anchors.ROLES:
        assert measured["inputs"][role] == committed["inputs"][role], "of the models that the study trained"
        assert [one["problems"] for one in measured["figures"][role]] == [TOY.problems] * 2
        assert measured["figures"][role][0] != measured["figures"][role][1], "other samples"
    first, second = measured["alignment"]
    assert first.keys() == committed["alignment"].keys()
    assert first["teacher"] == second["teacher"], "the teacher's responses are the same for every seed"
    assert first["own"] != second["own"]
    assert measured["made"]["commit"] == study_run.commit()
    assert not list(tmp_path.glob("store-seed*/evaluations/*/part-*")), "it leaves nothing that a run would find"

    monkeypatch.setattr(anchors, "PATH", tmp_path / "anchors.json")
    monkeypatch.setattr(anchors, "MEASURED", (main_at_toy_size,))
    assert anchors.read(main_at_toy_size, measured["inputs"]) == anchors.NOTHING
    anchors.PATH.write_text(json.dumps({"countdown": measured}))
    assert anchors.read(experiments.MAIN, measured["inputs"]) == anchors.NOTHING, "of other problems"
    read = anchors.read(main_at_toy_size, measured["inputs"])
    (line,) = read.lines()
    mean = (measured["figures"]["student"][0]["pass_at_k"] + measured["figures"]["student"][1]["pass_at_k"]) / 2
    assert re.search(rf"The student before training: Avg@8 0\.\d+ ± \d\.\d+, Pass@8 {mean:.4f} ± ", line)
    assert line.endswith("(the same problems, 2 seeds).")
    kl = first["teacher"]["above"]["fkl"]
    assert f"| before training | {kl:.4f} ± 0.0000 |" in tables.alignment([], read)
    with pytest.raises(StudyError, match=r"anchors.json is of other problems .* than the results"):
        anchors.read(main_at_toy_size, committed["inputs"])


def test_a_table_has_the_seeds_of_its_experiment(tmp_path: Path) -> None:
    for task in in_order([toy("main"), toy("gate")], RATES, seeds=[0, 1, 2, 3, 100], settings=["opd", "random"]):
        made_up(task, tmp_path)
    seeds = {rows.name: list(rows.by_seed) for rows in tables.load(toy("gate"), RATES, tmp_path)}
    assert seeds == {"main/opd": [0, 1, 2], "random": [0, 1, 2]}
    assert [list(rows.by_seed) for rows in tables.load(toy("main"), RATES, tmp_path)] == [[0, 1, 2, 3]]


def test_a_mean_of_nothing_is_no_number(tmp_path: Path) -> None:
    experiment = toy("main", seeds=(0, 1))
    for task in in_order([experiment], RATES, settings=["opd", "mix"]):
        path = made_up(task, tmp_path)
        content = json.loads(path.read_text())
        content["alignment"]["teacher"]["below"] = {**content["alignment"]["teacher"]["below"], "fkl": None}
        path.write_text(json.dumps(content))
    text = tables.block(experiment, tables.load(experiment, RATES, tmp_path))
    assert table(text, "alignment")["opd"]["FKL, H <= 0.8"] == "-"
    assert table(text, "alignment")["opd"]["FKL, H > 0.8"].startswith("0.3000")
    assert "nan" not in text


def test_a_smoke_run_without_gsm8k_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worlds, "EXAMPLES", tmp_path / "repository" / "examples")
    monkeypatch.chdir(tmp_path)
    assert [one.name for one in with_data(ALL, tmp_path)] == [one.name for one in ALL if one.name != "gsm8k"]
    assert "gsm8k is left out: GSM8K's train.jsonl" in capsys.readouterr().out
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").touch()
    assert with_data(ALL, tmp_path) == list(ALL)


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
    document.write_text((design.HERE / "study.md").read_text())
    report.write(ALL, RATES, tmp_path, document)
    text = document.read_text()
    assert text.count("<!-- study:") == len(ALL)
    for one in ALL:
        assert f"No result yet: `python -m examples.study --only {one.name}`" in text


def test_an_error_that_is_not_the_users_keeps_its_trace(tmp_path: Path) -> None:
    for task in in_order([at_toy_size(experiments.MAIN)], RATES, seeds=[0, 1], settings=["opd"]):
        made_up(task, tmp_path / "smoke" / "results")
    short = results.path_of(task, tmp_path / "smoke" / "results")
    content = json.loads(short.read_text())
    short.write_text(json.dumps({**content, "correct": content["correct"][1:]}))
    with pytest.raises(ValueError, match="must have the same shape"):
        main(["--smoke", "--report", "--only", "main", "--work", str(tmp_path)])
