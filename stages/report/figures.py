"""The figures of a report: what each one shows. ``charts`` draws them, for the page and as files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eopd.stages.format import listed, printable
from eopd.stages.report.charts import (
    MOST_BANDS,
    Axis,
    Curve,
    Drawing,
    Form,
    draw_chart,
    draw_heat_map,
    draw_histogram,
    draw_points,
    gate_rules,
    thin,
)
from eopd.stages.report.data import FIRST, OWN, BinnedMeans, Estimate, RoundData, RunData

_MOST_FURTHER = 24


@dataclass(frozen=True)
class Panel:
    """A quantity to draw: ``names`` are figures of a round or step, the second one dashed."""

    name: str
    title: str
    names: tuple[str, ...]
    form: Form = "number"
    note: str = ""


_ENTROPY = ("student_entropy", "teacher_entropy")
ROUND_PANELS = (
    Panel("entropy", "Entropy", _ENTROPY, note="nats a token"),
    Panel("gate-fraction", "Gate fraction", ("gate_fraction",), "percent", "tokens whose teacher entropy exceeds tau"),
    Panel("rkl", "Reverse KL", ("rkl",), note="student to teacher, nats a token"),
    Panel("fkl", "Forward KL", ("fkl",), note="teacher to student, nats a token"),
    Panel("signal", "Right from wrong", ("signal",), "rate", "AUC of the teacher's summed log-ratio; 0.5: no signal"),
    Panel("distinct-correct", "Distinct correct solutions", ("distinct_correct",), note="a problem"),
    Panel("self-bleu", "Self-BLEU", ("self_bleu",), "rate", "likeness of a problem's samples; 1: all equal"),
    Panel("distinct-4", "Distinct 4-grams", ("distinct_4",), "rate", "share among all of a problem's samples"),
    Panel("token-entropy", "Sampled entropy", ("token_entropy",), note="nats a token, of the evaluation's samples"),
    Panel("response-length", "Response length", ("response_length",), note="mean tokens a response"),
    Panel("truncation", "Truncated responses", ("truncation_rate",), "percent", "cut at the length limit"),
    Panel("tokens", "Training tokens", ("tokens",), "count", "response tokens of the round"),
)
STEP_PANELS = (
    Panel("step-loss", "Loss", ("loss",)),
    Panel("step-rkl", "Reverse KL", ("rkl",), note="nats a token"),
    Panel("step-fkl", "Forward KL", ("fkl",), note="nats a token"),
    Panel("step-gate-fraction", "Gate fraction", ("gate_fraction",), "percent"),
    Panel("step-entropy", "Entropy", _ENTROPY, note="nats a token"),
    Panel("step-retained-mass", "Retained mass", ("retained_mass",), "percent", "teacher probability in the head"),
    Panel("step-grad-norm", "Gradient norm", ("grad_norm",)),
    Panel("step-tokens-per-s", "Training speed", ("tokens_per_s",), "count", "tokens a second"),
)
BIN_TITLES = {
    "fkl": ("Forward KL", "number"),
    "rkl": ("Reverse KL", "number"),
    "agreement": ("Top-1 agreement", "percent"),
    "student_entropy": ("Student entropy", "number"),
    "share": ("Share of tokens", "percent"),
}
SAMPLES = {OWN: "own samples", FIRST: "the first student's samples"}


MOST_BINS, MOST_QUERIES = 14, 6
"""Rows and columns of a heat map."""


def quality(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw Avg@k and Pass@k by round, and Pass@k over k after the first and the last evaluation."""
    evaluated = [item for run in runs for item in run.evaluated]
    if not evaluated:
        return []
    samples = sorted({item.samples for item in evaluated})
    name = f"Avg@{samples[0]}" if len(samples) == 1 else "Avg@k"
    note = "share of right samples" + ("" if len(samples) == 1 else f"; {listed(samples)} samples a problem")
    drawn = [_by_round(runs, Panel("avg-at-k", name, ("avg",), "rate", note))]
    k = shared_k(runs)
    if k:
        curves = [
            Curve(run.name, [(item.round, item.pass_at.get(k)) for item in run.evaluated], index)
            for index, run in enumerate(runs)
        ]
        note = f"share of problems solved in {k} samples"
        drawn.append(
            draw_chart("pass-at-k", f"Pass@{k}", note, curves, Axis("round", whole=True), "rate", len(runs) > 1)
        )
    curves = []
    for index, run in enumerate(runs):
        ends = [item for item in run.evaluated if len(item.pass_at) > 1]
        for item in ends[:1] * (len(ends) > 1 and len(runs) <= MOST_BANDS) + ends[-1:]:
            label = f"round {item.round}" if len(runs) == 1 else f"{run.name}, round {item.round}"
            curves.append(Curve(label, sorted(item.pass_at.items()), index, dashed=item is not ends[-1]))
    drawn.append(draw_chart("pass-over-k", "Pass@k over k", "", curves, Axis("k", doubling=True), "rate", True))
    return [drawing for drawing in drawn if drawing]


def shared_k(runs: Sequence[RunData]) -> int | None:
    """Return the largest k at which all evaluated runs have Pass@k."""
    known = [set().union(*(item.pass_at for item in run.evaluated)) for run in runs if run.evaluated]
    return max(set.intersection(*known), default=None) if known else None


def by_round(runs: Sequence[RunData], panels: Sequence[Panel] = ROUND_PANELS) -> list[Drawing]:
    return [drawing for panel in panels if (drawing := _by_round(runs, panel))]


def against_teacher(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw teacher and student on an evaluation's samples, by round, one figure for each kind of samples."""
    taus = sorted({tau for run in runs if (tau := run.read_with.get("evaluate.alignment.tau"))})
    above = f"entropy above {listed(taus)} nats"
    panels = []
    for prefix, whose in (("", OWN), ("first_", FIRST)):
        held_out, of = f"{prefix}held_out_", SAMPLES[whose]
        for name, title, names, form, note in (
            ("uncertain-fkl", "Forward KL, uncertain tokens", ("uncertain_fkl",), "number", f"teacher {above}"),
            ("held-out-fkl", "Forward KL", ("fkl",), "number", "nats a token"),
            ("held-out-rkl", "Reverse KL", ("rkl",), "number", "nats a token"),
            ("agreement", "Top-1 agreement", ("agreement",), "percent", "same most probable token"),
            ("above-threshold", "Uncertain tokens", ("student_above", "teacher_above"), "percent", above),
            ("held-out-entropy", "Entropy", ("entropy", "teacher_entropy"), "number", "nats a token"),
        ):
            figures = tuple(held_out + figure for figure in names)
            panels.append(Panel(prefix.replace("_", "-") + name, title, figures, form, f"{of} · {note}"))  # type: ignore[arg-type]
    return by_round(runs, panels)


def by_step(runs: Sequence[RunData]) -> tuple[list[Drawing], list[Drawing]]:
    """Draw figures of every optimizer step: the usual ones, and any others that the objective reported."""
    usual = {name for panel in STEP_PANELS for name in panel.names}
    names = sorted({name for run in runs for row in run.training for name in row.figures} - usual)[:_MOST_FURTHER]
    further = [Panel(f"step-further-{i}", printable(name, 40), (name,)) for i, name in enumerate(names)]
    drawn = [[drawing for one in group if (drawing := _by_step(runs, one))] for group in (STEP_PANELS, further)]
    return drawn[0], drawn[1]


def histograms(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw one histogram per run of the entropies of teacher (area) and student (dashed outline)."""
    drawn = []
    for index, run in enumerate(runs):
        both = {"teacher": run.teacher_entropy, "student": run.student_entropy}
        known = {name: histogram for name, histogram in both.items() if histogram and sum(histogram.counts)}
        if known:
            title = "Token entropy" if len(runs) == 1 else f"Token entropy, {run.name}"
            drawn.append(draw_histogram(f"entropy-histogram-{index}", title, known, run.threshold, index))
    return drawn


def by_entropy_bin(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw means by bin of teacher entropy, one figure for each kind of samples."""
    thresholds = {run.threshold for run in runs}
    rules = gate_rules(thresholds.pop()) if len(thresholds) == 1 else ()
    drawn = []
    for whose, (name, (title, form)) in itertools.product(SAMPLES, BIN_TITLES.items()):
        curves = [
            Curve(run.name, _middles(run.bins[whose][name]), index)
            for index, run in enumerate(runs)
            if name in run.bins.get(whose, {})
        ]
        file = f"{'first-' if whose == FIRST else ''}{name.replace('_', '-')}-by-entropy"
        axis = Axis("teacher entropy, nats", rules=rules)
        drawn.append(draw_chart(file, f"{title} by teacher entropy", SAMPLES[whose], curves, axis, form, len(runs) > 1))  # type: ignore[arg-type]
    return [drawing for drawing in drawn if drawing]


def routing(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw accuracy over tokens of every way to choose a mode, and the probes by the mode that they need."""
    drawn = []
    for index, run in enumerate(runs):
        if run.routing is None:
            continue
        of = "" if len(runs) == 1 else f", {run.name}"
        policies = {printable(name, 40): [(tokens, right)] for name, (right, tokens) in run.routing.policies.items()}
        note = f"accuracy on {run.routing.problems} problems"
        axes = ("response tokens, probes included", "accuracy")
        drawn.append(draw_points(f"routing-{index}", f"Accuracy over tokens{of}", note, policies, axes))
        points = {
            printable(name, 40) or "no mode is right": [(Estimate(x), Estimate(y)) for x, y in probes]
            for name, probes in sorted(run.routing.points.items())
        }
        if points:
            axes = ("sum of entropies, nats", "von Neumann ratio")
            note = "von Neumann ratio of each probe, by the shortest right mode"
            drawn.append(draw_points(f"probes-{index}", f"Probes{of}", note, points, axes))
    return drawn


def attribution(runs: Sequence[RunData]) -> list[Drawing]:
    """Draw the z-scores of bins by query set as a heat map."""
    drawn = []
    for index, run in enumerate(runs):
        attribution = run.attribution
        if attribution is None:
            continue
        far = [max(abs(row[place] or 0.0) for row in attribution.z.values()) for place in range(len(attribution.bins))]
        kept = sorted(sorted(range(len(far)), key=lambda place: -far[place])[:MOST_BINS])
        which = f"{len(kept)} of {len(far)} bins, the furthest from their mean" if len(kept) < len(far) else "bins"
        names = list(attribution.z)[:MOST_QUERIES]
        rows = [[attribution.z[name][place] for name in names] for place in kept]
        of = "" if len(runs) == 1 else f", {run.name}"
        note = f"z of {which}, for each query set, {attribution.documents:,} documents"
        labels = [printable(attribution.bins[place], 12) for place in kept], [printable(name, 12) for name in names]
        drawn.append(draw_heat_map(f"attribution-{index}", f"Documents by query set{of}", note, rows, *labels))
    return drawn


def _middles(binned: BinnedMeans) -> list[tuple[float, Estimate | None]]:
    return [
        ((low + high) / 2, mean)
        for (low, high), mean in zip(itertools.pairwise(binned.edges), binned.means, strict=True)
    ]


def _by_round(runs: Sequence[RunData], panel: Panel) -> Drawing | None:
    def points(run: RunData, name: str) -> list[tuple[float, Estimate | None]]:
        """Return points of a curve: a gap for a missing figure, nothing for students that were not to be measured."""
        shown: Iterable[RoundData] = [item for item in run.rounds if item.measured or name in item.figures]
        return [(item.round, item.figures.get(name)) for item in shown]

    curves = [
        _curve(runs, index, panel, name, points(run, name)) for index, run in enumerate(runs) for name in panel.names
    ]
    axis = Axis("round", whole=True)
    return draw_chart(panel.name, panel.title, panel.note, curves, axis, panel.form, len(runs) + len(panel.names) > 2)


def _by_step(runs: Sequence[RunData], panel: Panel) -> Drawing | None:
    curves = []
    for index, run in enumerate(runs):
        steps = [row.step for row in run.training]
        rising = all(later > step for step, later in itertools.pairwise(steps))
        xs = steps if rising else list(range(1, len(steps) + 1))
        for name in panel.names:
            values = [(x, row.figures.get(name)) for x, row in zip(xs, run.training, strict=True)]
            curves.append(_curve(runs, index, panel, name, thin(values, len(runs) <= MOST_BANDS), band=True))
    rules: list[tuple[float, str]] = []
    if len(runs) == 1:
        rounds = [row.round for row in runs[0].training]
        rules = [(x, "") for x, (before, now) in zip(xs[1:], itertools.pairwise(rounds), strict=True) if now != before]
    axis = Axis("optimizer step", whole=True, rules=tuple(rules) if len(rules) <= 16 else ())
    return draw_chart(panel.name, panel.title, panel.note, curves, axis, panel.form, len(runs) + len(panel.names) > 2)


def _curve(
    runs: Sequence[RunData],
    index: int,
    panel: Panel,
    name: str,
    points: Sequence[tuple[float, Estimate | None]],
    band: bool = False,
) -> Curve:
    """Build a curve: with one run, colours tell student from teacher; with several they tell runs."""
    second = name != panel.names[0]
    role = ("teacher" if second else "student") if len(panel.names) > 1 else ""
    label = role if len(runs) == 1 else f"{runs[index].name} ({role})" if role else runs[index].name
    return Curve(label, points, int(second) if len(runs) == 1 else index, second, band)
