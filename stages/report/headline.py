"""What was gained, in plain words: Avg@k and Pass@k from the first evaluated round to the last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eopd.stages.report import palette, plots, tables, words
from eopd.stages.report.data import Estimate, RunData
from eopd.stages.report.figure import Rows
from eopd.stages.report.rates import Rate, rates
from eopd.stages.report.scales import Scale
from eopd.stages.report.scores import after, asked

Ranking = tuple[int, Hashable]
"""The round that runs are ranked after, and what they were asked then (``scores.asked``)."""


@dataclass(frozen=True)
class Measured:
    round: int
    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        return words.number(self.value, "rate")

    @property
    def interval(self) -> str:
        return words.interval(self.low, self.high)


@dataclass(frozen=True)
class Gain:
    """``name`` such as Avg@8; ``last`` is None when only one round was evaluated; ``ranked``: after the round that runs
    are ranked after, None where this one was not evaluated then on the problems of the others; ``alike``: whether both
    evaluations are on the same problems.
    """

    name: str
    first: Measured
    last: Measured | None
    paired: Estimate | None
    ranked: Measured | None = None
    alike: bool = True

    @property
    def end(self) -> Measured:
        return self.last or self.first

    @property
    def change(self) -> str:
        return words.change(self.difference)

    @property
    def difference(self) -> float:
        if self.paired is not None:
            return self.paired.value
        return self.end.value - self.first.value

    @property
    def direction(self) -> str:
        """rose, fell or stayed, at the three decimals that are shown."""
        if self.last is None or not math.isfinite(self.difference) or round(self.difference, 3) == 0:
            return "stayed"
        return "rose" if self.difference > 0 else "fell"

    @property
    def change_interval(self) -> str:
        if self.paired is None or self.paired.low is None or self.paired.high is None:
            return ""
        return f"{words.change(self.paired.low)} to {words.change(self.paired.high)}"

    @property
    def detail(self) -> str:
        """Rounds and intervals, as one line."""
        ends = [self.first] if self.last is None else [self.first, self.last]
        said = [f"Round {end.round}: {end.interval}" if end.interval else f"Round {end.round}" for end in ends]
        if self.last is None:
            said.append("no other round was evaluated")
        else:
            said += [f"change: {self.change_interval}"] if self.change_interval else []
            said.append(self.settled or "no intervals were measured")
        return " · ".join(said)

    @property
    def settled(self) -> str:
        """What the intervals say of the change; empty where there are none."""
        if self.last is None:
            return ""
        if not self.alike:
            return "on other problems, which may be all of the change"
        if self.paired is not None and self.paired.low is not None and self.paired.high is not None:
            beyond = self.paired.low > 0 or self.paired.high < 0
            return "the interval of the change excludes zero" if beyond else "the interval of the change includes zero"
        if None in (self.first.low, self.first.high, self.last.low, self.last.high):
            return ""
        return "the two intervals overlap" if overlaps(self.first, self.last) else "the two intervals do not overlap"


@dataclass(frozen=True)
class RunSummary:
    name: str
    tone: str
    index: int
    gains: tuple[Gain, ...]
    facts: tuple[tuple[str, str], ...]


def summarise(runs: Sequence[RunData]) -> list[RunSummary]:
    shown, ranking = rates(runs), _ranking(runs)
    summaries = []
    for index, run in enumerate(runs):
        found = [_gain(run, rate, ranking) for rate in shown]
        gains = tuple(gain for gain in found if gain is not None)
        summaries.append(RunSummary(run.name, palette.tone(index), index, gains, _facts(run)))
    return summaries


def overlaps(one: Measured, other: Measured) -> bool:
    assert one.low is not None
    assert one.high is not None
    assert other.low is not None
    assert other.high is not None
    return one.low <= other.high and other.low <= one.high


def sentence(summaries: Sequence[RunSummary]) -> list[str]:
    """The headline, as sentences."""
    if len(summaries) == 1:
        gains = summaries[0].gains
        return [_said(gain) for gain in gains] or ["This run has no evaluation yet, so nothing can be said of a gain."]
    said = []
    names = list(dict.fromkeys(gain.name for summary in summaries for gain in summary.gains))
    for name in names:
        found = [(gain, summary) for summary in summaries for gain in summary.gains if gain.name == name]
        said.append(_ranked(name, found, [summary.name for summary in summaries]))
    return said or ["No run has an evaluation yet, so nothing can be compared."]


def _ranked(name: str, found: list[tuple[Gain, RunSummary]], runs: Sequence[str]) -> str:
    """Runs are ranked after one round; those that were not evaluated then, on the same problems, are named."""
    known = [(gain.ranked, gain, summary) for gain, summary in found if gain.ranked is not None]
    if not known:
        return (
            f"{name}: no two runs were evaluated after the same round of training on the same problems, so none is "
            "called highest."
        )
    ranked = sorted(known, key=lambda row: row[0].value if math.isfinite(row[0].value) else -math.inf, reverse=True)
    best, gain, owner = ranked[0]
    names = {summary.name for _, _, summary in ranked}
    absent = [run for run in runs if run not in names]
    if all(gain.end == value for value, gain, _ in ranked):
        text = f"{name} ends highest in {owner.name} at {best.text}"
        if gain.last is not None:
            text += f" (from {gain.first.text}{_elsewhere(gain)})"
    else:
        those = "two of them" if absent else "all"
        text = f"{name} after round {best.round}, the last that {those} have, is highest in {owner.name} at {best.text}"
    rival, _, other = ranked[1]
    text += f", then {other.name} at {rival.text}"
    if best.interval and rival.interval and overlaps(best, rival):
        text += "; their intervals overlap"
    others = f"; not evaluated after round {best.round} on these problems: {words.joined(absent)}" if absent else ""
    return f"{text}{others}."


def _ranking(runs: Sequence[RunData]) -> Ranking | None:
    """The last round after which at least two runs were evaluated on the same problems, so that a run that is behind
    hides no other, and the problems of most of them; not round 0, the untrained students, where some run has a trained
    one.
    """
    counts = Counter((found.round, asked(found)) for run in runs for found in run.scores)
    shared = [each for each, count in counts.items() if count > 1]
    last = max(shared, key=lambda each: (each[0], counts[each]), default=None)
    return None if last is not None and last[0] == 0 and any(number for number, _ in counts) else last


def _said(gain: Gain) -> str:
    if gain.last is None:
        return f"{gain.name} is {gain.first.text} after round {gain.first.round}; no other round was evaluated."
    if gain.direction == "stayed":
        return f"{gain.name} stayed at {gain.end.text}{_elsewhere(gain)}."
    return f"{gain.name} {gain.direction} from {gain.first.text} to {gain.end.text}{_elsewhere(gain)}."


def _elsewhere(gain: Gain) -> str:
    return "" if gain.alike else ", on other problems"


def _gain(run: RunData, rate: Rate, ranking: Ranking | None) -> Gain | None:
    values = [(item.round, rate.of(item)) for item in run.rounds]
    evaluated = [Measured(number, one.value, one.low, one.high) for number, one in values if one is not None]
    if not evaluated:
        return None
    rankable = {found.round for found in run.scores if (found.round, asked(found)) == ranking}
    ranked = next((found for found in evaluated if found.round in rankable), None)
    if len(evaluated) == 1:
        return Gain(rate.name, evaluated[0], None, None, ranked)
    paired = run.avg_gain if rate.which == "avg" else run.pass_gain
    if rate.k is not None and any(found.samples != rate.k for found in run.scores):
        paired = None  # it is of all samples, not of k
    first, last = (after(run.scores, end.round) for end in (evaluated[0], evaluated[-1]))
    alike = not run.scores or (first is not None and last is not None and asked(first) == asked(last))
    return Gain(rate.name, evaluated[0], evaluated[-1], paired, ranked, alike)


def _facts(run: RunData) -> tuple[tuple[str, str], ...]:
    """The figures around the gain: what happened to diversity, and what it took."""
    facts = []
    for title, attribute, form in (
        ("Student entropy", "student_entropy", "number"),
        ("Distinct correct", "distinct_correct", "number"),
        ("Reverse KL", "rkl", "number"),
        ("Forward KL", "fkl", "number"),
        ("Gate fraction", "gate_fraction", "percent"),
    ):
        known = [(item.round, getattr(item, attribute)) for item in run.rounds if getattr(item, attribute) is not None]
        if known:
            ends = [words.number(value, form) for _, value in (known[0], known[-1])]  # type: ignore[arg-type]
            last = known[-1][0]
            when = "" if last == run.rounds[-1].round else f" (round {last})"
            facts.append((title, (" → ".join(ends) if len(known) > 1 else ends[0]) + when))
    tokens = [item.tokens for item in run.rounds if item.tokens is not None]
    if tokens:
        facts.append(("Student tokens", words.number(sum(tokens), "count")))
    if any(row.seconds is not None for row in run.cost):
        facts.append(("Time in all stages", tables.time_of(run.cost)))
    return tuple(facts)


def beside(summaries: Sequence[RunSummary]) -> Rows:
    """The facts of several runs as one table: a row per run."""
    titles = list(dict.fromkeys(title for summary in summaries for title, _ in summary.facts))
    facts = [(summary.name, dict(summary.facts)) for summary in summaries]
    body = tuple((name, *(found.get(title, words.MISSING) for title in titles)) for name, found in facts)
    return Rows(("run", *titles), body)


def dumbbells(summaries: Sequence[RunSummary]) -> dict[tuple[int, str], Markup]:
    """A small drawing for each run and metric, first (hollow) to last (filled), all of one metric on one scale."""
    drawn = {}
    for name in {gain.name for summary in summaries for gain in summary.gains}:
        gains = [(summary, gain) for summary in summaries for gain in summary.gains if gain.name == name]
        ends = [end for _, gain in gains for end in (gain.first, gain.end) if math.isfinite(end.value)]
        values = [value for end in ends for value in (end.value, end.low, end.high) if value is not None]
        if not values:
            continue
        low, high = min(values), max(values)
        air = 0.06 * (high - low) or 0.05
        scale = Scale(low - air, high + air, 6, 234)
        for summary, gain in gains:
            if math.isfinite(gain.first.value) and math.isfinite(gain.end.value):
                drawn[(summary.index, name)] = _dumbbell(summary, gain, scale)
    return drawn


def _dumbbell(summary: RunSummary, gain: Gain, scale: Scale) -> Markup:
    stroke = f"s-{summary.tone}"
    parts = ['<path class="grid" d="M4 14H236"/>']
    if gain.last is not None:
        parts.append(f'<path class="{stroke}" d="M{scale(gain.first.value):.1f} 14H{scale(gain.last.value):.1f}"/>')
    for end, fill in ((gain.first, "hollow"), (gain.last, f"f-{summary.tone}")):
        if end is None:
            continue
        if end.low is not None and end.high is not None:
            area = f"M{scale(end.low):.1f} 8H{scale(end.high):.1f}V20H{scale(end.low):.1f}Z"
            parts.append(f'<path class="f-{summary.tone} band" d="{area}"/>')
        parts.append(plots.shape(summary.index, scale(end.value), 14, f"{stroke} {fill} dot", 4.2))
    return Markup('<svg class="dumbbell" viewBox="0 0 240 28" aria-hidden="true">' + "".join(parts) + "</svg>")
