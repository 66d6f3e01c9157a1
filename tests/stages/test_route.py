"""Routing: descriptors and rules by hand, exact entropies, and the table of stored evaluations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.job import NullProgress
from eopd.stages.models.lm_head import lm_head_of
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence
from eopd.stages.report.data import ReportData, RunData
from eopd.stages.report.gather import RoundArtifacts, _routing
from eopd.stages.report.page import render
from eopd.stages.report.run import to_csv
from eopd.stages.route.entropies import EntropiesJob, entropies_of
from eopd.stages.route.entropies import run as read_entropies
from eopd.stages.route.run import Routed, RouteJob, descriptors, fit, routed, run, table
from eopd.stages.route.settings import RuleSettings
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError
from eopd.storage.identity import Identity
from tests.raises import raises
from tests.stages.test_evaluate import STUDENT, evaluate, job_for, samples_of, settings_for

MODES = ["standard", "direct", "cot"]


@pytest.mark.parametrize(
    ("entropy", "expected"),
    [
        # ranks 1, 3, 2, 4: 1 - 6 * 2 / (4 * 15); differences 2, -1, 2 and deviations from 1.75
        ([0.5, 2.5, 1.5, 3.5], (8.0, 0.8, 9.0 / 5.0)),
        ([3.0, 2.0, 1.0], (6.0, -1.0, 1.0)),
        # ties share their rank: 1.5, 1.5, 3
        ([1.0, 1.0, 4.0], (6.0, math.sqrt(3) / 2, 1.5)),
        ([0.2, 0.2, 0.2, 0.2], (0.8, 0.0, 0.0)),
    ],
)
def test_descriptors_by_hand(entropy: list[float], expected: tuple[float, ...]) -> None:
    assert descriptors(entropy) == pytest.approx(expected, abs=1e-12)


def test_a_probe_of_two_tokens_has_no_descriptors() -> None:
    assert descriptors([0.1, 0.2]) is None


def test_a_rule_is_tried_in_order_and_short_probes_stay() -> None:
    rule = RuleSettings(entropy=10.0, trend=0.5, roughness=2.0, certain="direct", unsettled="cot")
    described = np.array(
        [[9.0, 0.9, 3.0], [10.0, 0.5, 2.0], [11.0, 0.6, 0.1], [11.0, -1.0, 2.1], [np.nan, np.nan, np.nan]]
    )
    assert [MODES[mode] for mode in routed(described, rule, MODES)] == ["direct", "standard", "cot", "cot", "standard"]
    assert not routed(described, RuleSettings(certain="cot", unsettled="cot"), MODES).any(), "null is never reached"


def test_a_fitted_rule_separates_what_can_be_separated() -> None:
    described = np.array([[float(i), 0.1 * (i % 3), 1.0] for i in range(20)])
    easy = described[:, 0] < 8
    right = np.stack([~easy, easy, np.zeros(20)], axis=1).astype(float)
    rule = fit(described, right, np.ones((20, 3)), MODES)
    assert right[np.arange(20), routed(described, rule, MODES)].mean() >= 0.95
    assert (rule.certain, rule.otherwise) == ("direct", "standard")


def test_among_rules_that_are_right_equally_often_the_shortest_answers_win() -> None:
    described = np.array([[float(i), 0.0, 1.0] for i in range(10)])
    tokens = np.tile([9.0, 5.0, 7.0], (10, 1))
    assert {MODES[mode] for mode in routed(described, fit(described, np.ones((10, 3)), tokens, MODES), MODES)} == {
        "direct"
    }


def made_up(choice: list[int]) -> Routed:
    right = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=float)[:, None]
    tokens = np.array([[10, 4], [20, 4], [12, 6], [8, 5]], dtype=float)[:, None]
    return Routed(["standard", "direct"], right, tokens, np.full((4, 1), 3.0), np.array(choice)[:, None])


def test_the_table_by_hand() -> None:
    results = table(made_up([0, 1, 1, 0]), resamples=200, confidence=0.9)
    figures = {name: (one["accuracy"], one["tokens"]) for name, one in results["policies"].items()}
    assert figures == {
        "standard": (0.25, 12.5),
        "direct": (0.5, 4.75),
        "random": (0.375, 8.625),
        "oracle": (0.75, (10 + 4 + 6 + 5) / 4),
        "router": (0.75, (10 + 4 + 3 + 6 + 3 + 8) / 4),  # two probes are not continued
    }
    assert results["shares"] == {"standard": 0.5, "direct": 0.5}
    assert results["against"]["random"]["accuracy"] == pytest.approx(0.375)
    assert results["against"]["random"]["tokens"] == pytest.approx(8.5 - 8.625)
    low, high = results["against"]["standard"]["accuracy_interval"]
    assert low <= 0.5 <= high


def test_a_router_that_looks_at_nothing_gains_nothing_against_the_random_one() -> None:
    for choice in ([0] * 4, [1] * 4):
        against = table(made_up(choice), resamples=200, confidence=0.9)["against"]["random"]
        assert against["accuracy"] == 0.0
        assert against["tokens"] == (3.0 if choice[0] else 0.0), "its probes are paid for"


@torch.inference_mode()
def test_entropies_are_those_of_a_full_softmax() -> None:
    model = load_model(STUDENT, "cpu")
    sequences = [Sequence([18, 19, 6, 20], [3, 17, 30, 40, 9]), Sequence([22, 6], []), Sequence([25, 7, 31], [12, 13])]
    read = entropies_of(model, sequences)
    assert [len(values) for values in read] == [5, 0, 2]
    for sequence, values in zip(sequences, read, strict=True):
        ids = torch.tensor([[*sequence.context_ids, *sequence.response_ids]])
        logits = model(ids).logits[0, len(sequence.context_ids) - 1 : -1].double()
        logprobs = logits.log_softmax(-1)
        assert torch.allclose(torch.from_numpy(values).double(), -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = load_model(STUDENT, "cpu")
    with torch.no_grad():
        lm_head_of(model).weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        entropies_of(model, [Sequence([18, 19], [3])])


def settings(**changes: Any) -> EvaluateSettings:
    values = {
        "suffix": "",
        "samples": 1,
        "temperature": 0.0,
        "modes": {"direct": {"suffix": ":"}},
        "route": {"tokens": 6, "calibration": 5},
    }
    return settings_for(**(values | changes))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Both modes evaluated on 12 problems, and the entropies of the standard one."""
    folder, asked = tmp_path_factory.mktemp("route"), settings()
    jobs = {mode: job_for(folder / mode, asked.in_mode(mode)) for mode in asked.mode_names}
    for job in jobs.values():
        evaluate(job)
    source = jobs["standard"].output
    output = Artifact(folder, Identity("entropies", 1, source.parts, {"tokens": 6}, {"evaluation": source.key}))
    read_entropies(EntropiesJob(output, range(source.parts), source, STUDENT, asked, NullProgress()))
    return {**{mode: job.output for mode, job in jobs.items()}, "entropies": output}


def route(stored: dict[str, Artifact], folder: Path, asked: EvaluateSettings, seed: int = 0) -> Artifact:
    output = Artifact(folder, Identity("routings", 1, 1, {"seed": seed}))
    modes = {mode: stored[mode] for mode in asked.mode_names}
    run(RouteJob(output, modes, stored["entropies"], asked, seed, NullProgress()))
    return output


def test_modes_prompt_the_same_problems_otherwise(stored: dict[str, Artifact]) -> None:
    standard, direct = (
        [row for part in range(3) for row in evaluations.SAMPLES.read(stored[mode].part_folder(part)).to_pylist()]
        for mode in ("standard", "direct")
    )
    assert [row["problem_id"] for row in standard] == [row["problem_id"] for row in direct]
    assert [row["prompt_tokens"] + 1 for row in standard] == [row["prompt_tokens"] for row in direct]
    assert stored["standard"].key != stored["direct"].key


def test_entropies_are_of_the_first_tokens(stored: dict[str, Artifact]) -> None:
    for part in range(stored["standard"].parts):
        samples = evaluations.SAMPLES.read(stored["standard"].part_folder(part)).to_pylist()
        rows = analyses.ENTROPIES.read(stored["entropies"].part_folder(part)).to_pylist()
        for sample, row in zip(samples, rows, strict=True):
            assert sample["problem_id"] == row["problem_id"]
            assert len(row["entropy"]) == min(6, len(sample["response_token_ids"]))
            assert 0.0 <= min(row["entropy"]) < max(row["entropy"]) < math.log(64)


def test_calibration_problems_are_in_no_figure(stored: dict[str, Artifact], tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        output = route(stored, tmp_path, settings(), seed)
        results = json.loads((output.part_folder(0) / analyses.ROUTING_RESULTS).read_text())
        rows = analyses.ROUTING_CHOICES.read(output.part_folder(0)).to_pylist()
        assert (results["problems"], results["calibration"], len(rows)) == (7, 5, 12)
        kept = [row for row in rows if not row["calibration"]]
        right = {
            (mode, row["problem_id"]): row["correct"]
            for mode in ("standard", "direct")
            for part in range(3)
            for row in evaluations.SAMPLES.read(stored[mode].part_folder(part)).to_pylist()
        }
        accuracy = sum(right[row["mode"], row["problem_id"]] for row in kept) / 7
        assert results["policies"]["router"]["accuracy"] == pytest.approx(accuracy)
        assert results["policies"]["oracle"]["accuracy"] == sum(row["oracle"] is not None for row in kept) / 7
        drawn.append({row["problem_id"] for row in rows if row["calibration"]})
    assert drawn[0] != drawn[1]


def test_thresholds_of_the_user_route_every_problem(stored: dict[str, Artifact], tmp_path: Path) -> None:
    rule = {"entropy": 2.0, "certain": "direct"}
    output = route(stored, tmp_path, settings(route={"tokens": 6, "rule": rule}))
    rows = analyses.ROUTING_CHOICES.read(output.part_folder(0)).to_pylist()
    assert not any(row["calibration"] for row in rows)
    assert [row["mode"] == "direct" for row in rows] == [
        row["entropy"] is not None and row["entropy"] < 2 for row in rows
    ]
    assert len({row["mode"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": {}}, r"evaluate\.route has no modes"),
        ({"route": {"tokens": 25}}, r"route\.tokens is 25.*max_new_tokens = 24"),
        ({"temperature": 1.0}, r"temperature is 1.*route\.sampled"),
        ({"route": {"tokens": 2}}, r"route\.tokens"),
        ({"route": {"tokens": 6, "rule": {"certain": "cot"}}}, r"names the mode cot.*standard, direct"),
        ({"modes": {"direct": {}}}, r"modes\.direct prompts as standard"),
        ({"modes": {"a": {"suffix": ":"}, "b": {"suffix": ":"}}}, r"modes\.b prompts as a"),
        ({"modes": {"standard": {"suffix": ":"}}}, r"modes\.standard is evaluate itself.*suffix"),
        ({"modes": {"a/b": {"suffix": ":"}}}, "modes"),
        ({"modes": {"direct": {"system": "Be brief."}}}, r"modes\.direct.*system"),
    ],
)
def test_what_cannot_be_routed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_samples_are_routed_one_by_one_if_that_is_asked(tmp_path: Path) -> None:
    asked = settings(samples=2, temperature=1.0, route={"tokens": 6, "calibration": 2, "sampled": True})
    jobs = {mode: job_for(tmp_path / mode, asked.in_mode(mode)) for mode in asked.mode_names}
    stored = {mode: job.output for mode, job in jobs.items()}
    for job in jobs.values():
        evaluate(job)
    source = stored["standard"]
    stored["entropies"] = Artifact(tmp_path, Identity("entropies", 1, source.parts, {}, {"evaluation": source.key}))
    read_entropies(EntropiesJob(stored["entropies"], range(3), source, STUDENT, asked, NullProgress()))
    rows = analyses.ROUTING_CHOICES.read(route(stored, tmp_path, asked).part_folder(0)).to_pylist()
    assert len(rows) == len(samples_of(jobs["standard"])) == 24
    assert sum(row["calibration"] for row in rows) == 4


def test_too_many_problems_to_calibrate_are_refused(stored: dict[str, Artifact], tmp_path: Path) -> None:
    with raises(InputError, "6, .* 12", setting="evaluate.route.calibration"):
        route(stored, tmp_path, settings(route={"tokens": 6, "calibration": 6}))


def test_the_report_shows_a_routing(stored: dict[str, Artifact], tmp_path: Path) -> None:
    output = route(stored, tmp_path, settings())
    routing = _routing(RoundArtifacts(2, None, made={"route": output}))
    results = json.loads((output.part_folder(0) / analyses.ROUTING_RESULTS).read_text())
    assert {name: pair[0].value for name, pair in routing.policies.items()} == {
        name: one["accuracy"] for name, one in results["policies"].items()
    }
    assert sum(map(len, routing.points.values())) == 12
    data = ReportData("x", "today", [RunData("one", routing=routing), RunData("none")])
    page, drawings = render(data)
    assert {"routing-0", "probes-0"} <= {drawing.name for drawing in drawings}
    assert 'id="routing"' in page
    assert "one: random" in page
    assert f"one,routing,2,,router.accuracy,{results['policies']['router']['accuracy']}" in to_csv(data)
    assert 'id="routing"' not in render(ReportData("x", "today", [RunData("none")]))[0]


def test_a_damaged_routing_is_named(stored: dict[str, Artifact], tmp_path: Path) -> None:
    output = route(stored, tmp_path, settings())
    path = output.part_folder(0) / analyses.ROUTING_RESULTS
    path.write_text(json.dumps({"problems": 7}).ljust(path.stat().st_size))
    with raises(DamagedPart, file="routing.json"):
        _routing(RoundArtifacts(0, None, made={"route": output}))
