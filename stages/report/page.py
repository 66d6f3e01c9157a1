"""The page: one self-contained HTML document from a report's data.

Nothing in it is loaded from anywhere: its content policy forbids every request and every script but its own, which is
named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eopd.stages.format import decimal, duration, listed, number, printable, size
from eopd.stages.report import figures
from eopd.stages.report.charts import DARK, LIGHT, Drawing
from eopd.stages.report.compare import Comparison, apart, compare, distinct_jobs, problems_of
from eopd.stages.report.data import CostRow, Estimate, ReportData, RoundData, RunData
from eopd.stages.report.rollouts import HEAT_EDGES, gallery

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'"
_MARKERS = "●■◆▲✚"  # as in the figures
_MOST_ROWS = 400
_LONGEST_VALUE = 300
_RATE, _PERCENT, _NUMBER = ".3f", ".1%", "#.3g"
_FACTS = (
    ("Student entropy", "student_entropy", _NUMBER),
    ("Distinct correct", "distinct_correct", _NUMBER),
    ("Reverse KL", "rkl", _NUMBER),
    ("Forward KL", "fkl", _NUMBER),
    ("Gate fraction", "gate_fraction", _PERCENT),
    ("Right from wrong (AUC)", "signal", _RATE),
)
_EVALUATED = (
    ("distinct correct", "distinct_correct", _NUMBER),
    ("self-BLEU", "self_bleu", _RATE),
    ("distinct 4-grams", "distinct_4", _RATE),
    ("sampled entropy", "token_entropy", _NUMBER),
    ("tokens", "response_length", _NUMBER),
    ("truncated", "truncation_rate", _PERCENT),
    ("ungraded", "ungraded", ".0f"),
    ("left out", "left_out", ".0f"),
)


@dataclass(frozen=True)
class Table:
    """A table; ``left_out``: rows that only numbers.csv has."""

    label: str
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    left_out: int = 0


@dataclass(frozen=True)
class Gain:
    """A rate after the first and the last evaluation, with intervals; ``last`` is empty if there is only one."""

    name: str
    rounds: tuple[int, int]
    first: tuple[str, str]
    last: tuple[str, str]
    change: tuple[str, str]
    note: str = ""

    @property
    def css(self) -> str:
        return {"+": "good", "−": "bad"}.get(self.change[0][:1], "muted")


@dataclass(frozen=True)
class Summary:
    name: str
    gains: tuple[Gain, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A group of figures; ``more`` are folded away. ``notes``: what to know before comparing lines."""

    ident: str
    short: str  # in the navigation
    title: str
    intro: str
    drawings: Sequence[Drawing]
    more: Sequence[Drawing] = ()
    notes: Sequence[str] = ()
    table: Table | None = None


def render(data: ReportData) -> tuple[str, list[Drawing]]:
    """Return the document and the figures in it.

    Raises:
        ValueError: there is no run to show.
    """
    if not data.runs:
        raise ValueError("runs is empty: a report needs at least one run")
    data = _cleaned(data)
    runs = data.runs
    shown = _sections(runs)
    summaries = [_summary(run, figures.shared_k(runs)) for run in runs]
    compared = compare(runs)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        data=data,
        several=len(runs) > 1,
        policy=_POLICY.format(digest),
        style=Markup(_theme() + (_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        markers=[(_MARKERS[index % len(_MARKERS)], f"k{index % 8}") for index in range(len(runs))],
        summaries=summaries,
        beside=_beside(summaries),
        differences=_differences(compared, runs[0].name),
        notes=[*compared.notes, *(f"{_of(run, runs)}{note}" for run in runs for note in run.notes)],
        warnings=[f"{_of(run, runs)}{warning}" for run in runs for warning in run.warnings],
        sections=shown,
        evaluations=_evaluations(runs),
        graders=[f"{_of(run, runs) or 'Graded by '}{listed(run.graders)}." for run in runs if run.graders],
        gallery=gallery(runs),
        heat=_heat_legend(any(run.threshold is not None for run in runs)),
        costs=[_cost(run) for run in runs if run.cost],
        total=_time(distinct_jobs(runs)) if len(runs) > 1 else "",
        differing=_differing(runs),
        settings=[Table(f"All settings of {run.name}", ("setting", "value"), _settings(run)) for run in runs],
    )
    return page, [drawing for section in shown for drawing in (*section.drawings, *section.more)]


def _sections(runs: Sequence[RunData]) -> list[Section]:
    usual, further = figures.by_step(runs)
    heads = [f"Divergences are of different heads: {text}." for text in apart(_heads(runs))]
    alike = [f"Not measured alike: {text}." for text in apart([(run.name, run.read_with) for run in runs])]
    held_out, bins = figures.against_teacher(runs), figures.by_entropy_bin(runs)
    intervals = sorted({run.interval for run in runs if run.interval})
    routed = figures.routing(runs)
    sections = [
        Section(
            "quality",
            "Answers",
            "Right answers",
            "Avg@k is the share of right samples, Pass@k the share of problems that k samples solve."
            + (f" Intervals: {'; '.join(intervals)}." if intervals else ""),
            figures.quality(runs),
        ),
        Section(
            "rounds",
            "Rounds",
            "Round by round",
            "Round r is the student that r rounds of training made. Entropy, gate fraction and divergences are of the "
            "first training step of the round, before any update.",
            figures.by_round(runs),
            notes=heads,
        ),
        Section(
            "training",
            "Training",
            "Inside training",
            "Every optimizer step. Long curves are means over a few steps, with their range; dotted lines mark rounds.",
            usual,
            further,
            heads,
        ),
        Section(
            "held-out",
            "Teacher",
            "Against the teacher",
            "Teacher and student on the evaluation's samples, exact over the full vocabulary.",
            held_out,
            notes=alike if held_out else (),
        ),
        Section(
            "spread",
            "Uncertainty",
            "Where the teacher is uncertain",
            _uncertainty(runs),
            [*figures.histograms(runs), *bins],
            notes=alike if bins else (),
        ),
    ]
    if routed:
        intro = (
            "A mode of prompting for each response, by the entropies of its first tokens. The oracle takes the "
            "shortest right mode, random the router's proportions; a router worth its probe beats random."
        )
        sections.append(Section("routing", "Routing", "Routing by early entropy", intro, routed, table=_routing(runs)))
    attributed = figures.attribution(runs)
    if attributed:
        intro = (
            "Documents by gradients, for evaluated samples. z: a bin's mean against the bins' mean, in their standard "
            "deviations; p: of random bins. It is provenance only if the student was trained on these documents."
        )
        title = "Where the samples come from"
        sections.append(Section("attribution", "Documents", title, intro, attributed, table=_attribution(runs)))
    return sections


def _attribution(runs: Sequence[RunData]) -> Table:
    """Return the highest and the lowest bin of every query set and contrast."""
    body = []
    for run, attribution in ((run, run.attribution) for run in runs):
        if attribution is None:
            continue
        for name, values in attribution.z.items():
            known = sorted((z, bin_) for z, bin_ in zip(values, attribution.bins, strict=True) if z is not None)
            ends = [f"{printable(bin_, 40)} ({value:+.2f})" for value, bin_ in (known[-1:] + known[:1])]
            between, p = attribution.tests[name]
            body.append((f"{_of(run, runs)}{printable(name, 60)}", *(ends or ["–", "–"]), f"{between:.1%}", f"{p:.4f}"))
        for name, estimates in attribution.contrasts.items():
            pairs = sorted(zip(estimates, attribution.bins, strict=True), key=lambda pair: pair[0].value)
            ends = [
                f"{printable(bin_, 40)} ({decimal(one.value, '.2f', signed=True)}{_bounds(one, '.2f', signed=True)})"
                for one, bin_ in (pairs[-1], pairs[0])
            ]
            body.append((f"{_of(run, runs)}{printable(name, 60)}", *ends, "–", "–"))
    return Table("Documents", ("query set", "highest bin", "lowest bin", "variance between bins", "p"), tuple(body))


def _routing(runs: Sequence[RunData]) -> Table:
    """Return accuracy and tokens of every way to choose a mode, and the router's difference to it."""
    body = []
    for run in runs:
        for name, pair in run.routing.policies.items() if run.routing else ():
            assert run.routing is not None
            forms = (_RATE, ".1f")
            cells = [decimal(one.value, form) + _bounds(one, form) for one, form in zip(pair, forms, strict=True)]
            gain = run.routing.against.get(name)
            if gain is None:
                cells += ["–", "–"]
            else:
                cells += [
                    decimal(one.value, form, signed=True) + _bounds(one, form, signed=True)
                    for one, form in zip(gain, forms, strict=True)
                ]
            body.append((f"{_of(run, runs)}{printable(name, 60)}", *cells))
    head = ("modes", "accuracy", "tokens", "router's accuracy minus this", "router's tokens minus these")
    return Table("Routing", head, tuple(body))


def _uncertainty(runs: Sequence[RunData]) -> str:
    texts = []
    for run in runs:
        share = run.teacher_entropy.share_above(run.threshold) if run.teacher_entropy else None
        if share is not None:
            texts.append(f"{_percent(share)} of the tokens" + (f" in {run.name}" if len(runs) > 1 else ""))
    if not texts:
        return "Tokens of the last scored round by the teacher's entropy."
    taus = listed(sorted({f"{run.threshold:g}" for run in runs if run.threshold is not None}))
    return f"In the last scored round the teacher's entropy is above tau = {taus} nats on {listed(texts)}."


def _heads(runs: Sequence[RunData]) -> list[tuple[str, dict[str, str]]]:
    return [(run.name, {"the teacher's head": run.head}) for run in runs if run.head and run.training]


def _cleaned(data: ReportData) -> ReportData:
    """Return the data with printable names and notes, and a unique name for every run."""
    runs: list[RunData] = []
    for index, run in enumerate(data.runs):
        name = printable(run.name, 60).strip() or f"run {index + 1}"
        while name in [other.name for other in runs]:
            name = f"{name} ({index + 1})"
        texts: dict[str, Any] = {
            name: [printable(text, 1000) for text in getattr(run, name)] for name in ("notes", "warnings", "graders")
        }
        runs.append(replace(run, name=name, interval=printable(run.interval, 120), **texts))
    return ReportData(printable(data.title, 200), printable(data.generated, 100), runs)


def _of(run: RunData, runs: Sequence[RunData]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _summary(run: RunData, k: int | None) -> Summary:
    evaluated = run.evaluated
    if not evaluated:
        return Summary(run.name, (), _facts(run))
    ends = (evaluated[0], evaluated[-1])
    known = [(f"Avg@{ends[1].samples}", "avg", [item.figures["avg"] for item in ends])]
    if k and all(k in item.pass_at for item in ends):
        known.append((f"Pass@{k}", "pass", [item.pass_at[k] for item in ends]))
    # gains are of all samples, between the first and the last evaluation
    of_these = [scores.round for scores in (run.scores[:1] + run.scores[-1:])] == [item.round for item in ends]
    other_problems = of_these and problems_of(run.scores[0]) != problems_of(run.scores[-1])
    gains = []
    for name, which, (first, last) in known:
        paired = run.gains.get(which) if of_these and (which == "avg" or k == ends[1].samples) else None
        gains.append(_gain(name, ends, first, last, paired, other_problems))
    return Summary(run.name, tuple(gains), _facts(run))


def _gain(
    name: str,
    ends: tuple[RoundData, RoundData],
    first: Estimate,
    last: Estimate,
    paired: Estimate | None,
    other_problems: bool,
) -> Gain:
    rounds = (ends[0].round, ends[1].round)
    if rounds[0] == rounds[1]:
        return Gain(name, rounds, _with_bounds(first), ("", ""), ("", ""), "no other evaluation")
    change = ("", "") if other_problems else _with_bounds(paired or Estimate(last.value - first.value), signed=True)
    note = "the two evaluations are of different problems" if other_problems else ""
    return Gain(name, rounds, _with_bounds(first), _with_bounds(last), change, note)


def _with_bounds(estimate: Estimate, signed: bool = False) -> tuple[str, str]:
    return decimal(estimate.value, _RATE, signed), _bounds(estimate, signed=signed).strip()


def _bounds(estimate: Estimate, form: str = _RATE, signed: bool = False) -> str:
    if estimate.bounds is None:
        return ""
    low, high = (decimal(bound, form, signed).replace("%", " %") for bound in estimate.bounds)
    return f" [{low}, {high}]"


def _percent(value: float) -> str:
    return decimal(value, _PERCENT).replace("%", " %")


def _facts(run: RunData) -> tuple[tuple[str, str], ...]:
    """Return the facts shown beside the gain: sample size, truncated answers, and cost."""
    facts = []
    ends = run.evaluated[:1] + run.evaluated[1:][-1:]
    if ends:
        seeds = len(run.scores[-1].seeds) if run.scores else 1
        sizes = [f"{item.problems} × {item.samples}" + (f" × {seeds} seeds" if seeds > 1 else "") for item in ends]
        facts.append(("Problems × samples", " → ".join(dict.fromkeys(sizes))))
        cut = [item.value("truncation_rate") for item in ends]
        facts.append(("Truncated answers", " → ".join("–" if one is None else _percent(one) for one in cut)))
    for title, name, form in _FACTS:
        known = [(item.round, item.figures[name].value) for item in run.rounds if name in item.figures]
        if known:
            values = [decimal(value, form).replace("%", " %") for _, value in known[:1] + known[1:][-1:]]
            when = "" if known[-1][0] == run.rounds[-1].round else f" (round {known[-1][0]})"
            facts.append((title, " → ".join(values) + when))
    tokens = [item.figures["tokens"].value for item in run.rounds if "tokens" in item.figures]
    if tokens:
        facts.append(("Training tokens", number(sum(tokens))))
    if any(row.seconds is not None for row in run.cost):
        facts.append(("Time in all stages", _time(run.cost)))
    return tuple(facts)


def _beside(summaries: Sequence[Summary]) -> Table:
    """Return the gains of several runs: a row per run and rate."""
    body = []
    for one in summaries:
        facts = dict(one.facts)
        counts = (facts.get("Problems × samples", "–"), facts.get("Truncated answers", "–"))
        for gain in one.gains:
            values = [" ".join(pair).strip() or "–" for pair in (gain.first, gain.last, gain.change)]
            rounds = " → ".join(map(str, dict.fromkeys(gain.rounds)))
            body.append((one.name, gain.name, rounds, *values[:2], gain.note or values[2], *counts))
        if not one.gains:
            body.append((one.name, "not evaluated", *["–"] * 4, *counts))
    head = ("run", "metric", "rounds", "first", "last", "change", "problems × samples", "truncated")
    return Table("Gains", head, tuple(body))


def _differences(compared: Comparison, base: str) -> Table:
    body = []
    for one in compared.differences:
        problems, seeds = (
            interval and _bounds(Estimate(0, interval.low, interval.high), signed=True).strip()
            for interval in (one.over_problems, one.over_seeds)
        )
        pairing = f", {len(one.pairs)} pairs" if one.pairs else ", not in pairs"
        cells = (problems or "one problem", f"{seeds}{pairing}" if seeds else "one seed", one.zero)
        body.append((one.name, str(one.round), one.metric, decimal(one.value, _RATE, signed=True), *cells))
    head = ("run", "round", "metric", "difference", "95 % over problems", "95 % over seeds", "zero is")
    return Table(f"Differences from {base}, on the same problems", head, tuple(body))


def _evaluations(runs: Sequence[RunData]) -> Table:
    """Return every figure of every evaluation, also by benchmark if there are several."""
    rows = []
    several = len({name for run in runs for item in run.evaluated for name in item.benchmarks}) > 1
    for run in runs:
        for item in run.evaluated:
            benchmarks = [(printable(name, 60), results) for name, results in item.benchmarks.items()]
            for name, results in benchmarks if len(benchmarks) == 1 else [("mean", item), *benchmarks]:
                rows.append((run.name, str(item.round), *([name] if several else []), *_evaluation(results)))
    titles = (title for title, _, _ in _EVALUATED)
    head = ("run", "round", *(["benchmark"] if several else []), "n", "Avg@k", "Pass@k", *titles)
    return Table("Every evaluation", head, tuple(rows[:_MOST_ROWS]), max(0, len(rows) - _MOST_ROWS))


def _evaluation(item: RoundData) -> list[str]:
    cells = [f"{item.problems} × {item.samples}"]
    k = max(item.pass_at, default=0)
    for estimate, at in ((item.figures.get("avg"), item.samples), (item.pass_at.get(k), k)):
        cells.append(f"{decimal(estimate.value, _RATE)}{_bounds(estimate)} at {at}" if estimate else "–")
    for _, name, form in _EVALUATED:
        one = item.figures.get(name)
        cells.append(f"{decimal(one.value, form).replace('%', ' %')}{_bounds(one, form)}" if one else "–")
    return cells


def _cost(run: RunData) -> Table:
    """Return time, tokens and bytes by stage."""
    whole = _total(row.seconds for row in run.cost)
    body = []
    for name in dict.fromkeys(row.stage for row in run.cost):
        rows = [row for row in run.cost if row.stage == name]
        shared = sum(row.shared for row in rows)
        tag = "" if not shared else " (shared)" if shared == len(rows) else f" ({shared} of {len(rows)} shared)"
        timed = [row for row in rows if row.seconds and row.tokens is not None]
        speed = (_total(row.tokens for row in timed) or 0) / (_total(row.seconds for row in timed) or 1)
        seconds, tokens, stored = (
            _total(getattr(row, quantity) for row in rows) for quantity in ("seconds", "tokens", "bytes")
        )
        cells = (
            _time(rows),
            _percent(seconds / whole) if seconds is not None and whole else "–",
            _or_dash(tokens, number),
            number(speed) if timed else "–",
            _or_dash(stored, size),
        )
        body.append((printable(name, 60) + tag, *cells))
    own = _total(row.seconds for row in run.cost if not row.shared) or 0.0
    of_own = f", of which {duration(own)} not shared" if any(row.shared for row in run.cost) else ""
    head = ("stage", "time", "share", "tokens", "tokens/s", "stored")
    return Table(f"{run.name}: {_time(run.cost)}{of_own}", head, tuple(body))


def _time(rows: Sequence[CostRow]) -> str:
    """Format the time of these jobs together, and for how many it is unknown."""
    known, unknown = _total(row.seconds for row in rows), sum(row.seconds is None for row in rows)
    extra = f" (+ {unknown} job{'s' if unknown > 1 else ''} of unknown time)" if unknown and known is not None else ""
    return _or_dash(known, duration) + extra


def _or_dash(value: float | None, form: Any) -> str:
    return "–" if value is None else str(form(value))


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _settings(run: RunData) -> tuple[tuple[str, str], ...]:
    return tuple(flatten(run.settings).items())


def _differing(runs: Sequence[RunData]) -> Table:
    flat = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for table in flat for key in table)
    rows = [(key, *(table.get(key, "not set") for table in flat)) for key in keys]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    return Table("Settings that differ", ("setting", *(run.name for run in runs)), differing)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten ``{"train": {"lr": 1e-5}}`` to ``{"train.lr": "1e-05"}``; lists and the like become JSON, long values are
    cut."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat[printable(f"{prefix}{key}", 120)] = printable(text, _LONGEST_VALUE)
    return flat


def _heat_legend(gate: bool) -> list[tuple[str, str]]:
    labels = [f"below {HEAT_EDGES[0]}", *(f"from {edge}" for edge in HEAT_EDGES)]
    legend = [(f"h{step}", label) for step, label in enumerate(labels)]
    return [*legend, ("H4", "underlined: above tau")] if gate else legend


def _theme() -> str:
    light, dark = (";".join(f"--{name}:{value}" for name, value in colours.items()) for colours in (LIGHT, DARK))
    steps = "".join(f".h{step},.H{step}{{background:var(--h{step})}}" for step in range(len(HEAT_EDGES) + 1))
    keys = "".join(f".k{tone}{{color:var(--c{tone})}}" for tone in range(8))
    return (
        f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"@media print{{:root{{color-scheme:light;{light}}}}}{steps}{keys}"
    )
