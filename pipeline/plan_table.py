"""A plan as a table: one line a job, consecutive rounds in the same state folded into one line a stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from eopd.pipeline.forecast import Row, Total
from eopd.pipeline.overview import Overview
from eopd.pipeline.plan import SUMMED_UP, Stage
from eopd.stages.format import duration, escaped, number, size

STYLES = {"complete": "green", "shared": "cyan", "partly": "yellow", "missing": "", "set aside": "red"}
FOLDED_ABOVE = 2  # rounds of one kind that are still shown one by one
NARROWEST = 110  # columns of a table that is written to a pipe


def make_console(width: int | None = None) -> Console:
    """A console on stdout that does not squeeze the table where there is no terminal to fit it into."""
    console = PlainConsole(highlight=False, width=width)
    if width is None and not console.is_terminal:
        console = PlainConsole(highlight=False, width=NARROWEST)
    return console


class PlainConsole(Console):
    """A console on which no text can steer the terminal: names and messages may be anybody's."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


def plan_table(overview: Overview, *, every_job: bool = False) -> RenderableType:
    """The table and, below it, what it rests on."""
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in ("run",) if len(overview.runs) > 1 else ():
        table.add_column(name, no_wrap=True)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("job", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("parts", "tokens", "bytes", "time left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("artifact", style="dim", no_wrap=True, overflow="ellipsis")
    several = len(overview.runs) > 1
    for rows in _folded(overview.rows, every_job):
        cells: list[str | Text] = [_round(rows), rows[0].stage, _state(rows), *_figures(rows), _artifact(rows)]
        table.add_row(*([_asking(rows, overview)] if several else []), *cells)
    return Group(table, Text(), *_below(overview))


def _folded(rows: Sequence[Row], every_job: bool) -> Iterator[list[Row]]:
    """Rows to show together: of each run's rounds that follow each other and look the same, one list a stage."""
    for _, of_runs in groupby(rows, key=lambda row: row.state.runs):
        by_round: dict[int, list[Row]] = {}
        for row in of_runs:
            by_round.setdefault(row.round, []).append(row)
        for rounds in _alike(by_round.values()):
            trained = sum(row.stage == "train" for found in rounds for row in found)
            if every_job or trained <= FOLDED_ABOVE:
                yield from ([row] for found in rounds for row in found)
            else:
                stages = dict.fromkeys(row.stage for found in sorted(rounds, key=len, reverse=True) for row in found)
                yield from ([row for found in rounds for row in found if row.stage == stage] for stage in stages)


def _alike(rounds: Iterable[list[Row]]) -> list[list[list[Row]]]:
    """Rounds that follow each other, cut where a stage looks otherwise than before; not all are measured."""
    groups: list[list[list[Row]]] = []
    looks: dict[Stage, object] = {}
    for found in rounds:
        own: dict[Stage, object] = {row.stage: _look(row) for row in found}
        if not groups or any(looks.get(stage, look) != look for stage, look in own.items()):
            groups.append([])
            looks = {}
        groups[-1].append(found)
        looks |= own
    return groups


def _look(row: Row) -> tuple[object, ...]:
    state = row.state
    done = state.done if state.state == "partly" else 0
    return (row.stage, state.state, state.maker, tuple(state.set_aside), done, state.pruned)


def _round(rows: Sequence[Row]) -> str:
    return str(rows[0].round) if len(rows) == 1 else f"{rows[0].round}-{rows[-1].round}"


def _asking(rows: Sequence[Row], overview: Overview) -> str:
    runs = rows[0].state.runs
    if len(runs) == 1:
        return runs[0]
    return "all" if len(runs) == len(overview.runs) else f"{runs[0]} + {len(runs) - 1}"


def _state(rows: Sequence[Row]) -> Text:
    state = rows[0].state
    text = Text(state.state, style=STYLES[state.state])
    if state.state == "shared":
        text.append(f" (by {state.maker or 'an unknown run'})")
    if any(row.state.pruned for row in rows):
        text.append(", pruned" if all(row.state.pruned == row.state.parts for row in rows) else ", partly pruned")
    aside = sum(len(row.state.set_aside) for row in rows)
    if aside:
        parts = ", ".join(map(str, list(state.set_aside)[:4])) if len(rows) == 1 else str(aside)
        text.append(f", set aside: {parts}", style=STYLES["set aside"])
    return text


def _figures(rows: Sequence[Row]) -> list[str]:
    done, parts = sum(row.state.done for row in rows), sum(row.state.parts for row in rows)
    bound = "≤ " if any(row.at_most for row in rows) else ""
    done_all = all(row.state.is_done for row in rows)
    seconds = [row.seconds for row in rows]
    left = "not known yet" if None in seconds else duration(sum(second or 0.0 for second in seconds))
    return [
        f"{done:,}/{parts:,}",
        bound + number(sum(row.tokens for row in rows)),
        size(sum(row.bytes for row in rows)) if done_all else _bytes(rows),
        "" if done_all else left,
    ]


def _bytes(rows: Sequence[Row]) -> str:
    """A bound if there is one for each, else an estimate."""
    bounds = [row.most_bytes for row in rows]
    if None not in bounds:
        return "≤ " + size(sum(bound or 0 for bound in bounds))
    return "about " + size(sum(row.bytes for row in rows))


def _artifact(rows: Sequence[Row]) -> str:
    identity = rows[0].state.job.output
    if len(rows) > 1:
        return f"{len(rows)} of {identity.kind}"
    key, _, coverage = identity.key.partition("/")
    return f"{identity.kind}/{key[:10]}" + (f"/{coverage[:6]}" if coverage else "")


def _below(overview: Overview) -> Iterator[Text]:
    total = overview.totals["all"]
    yield Text(_sum(total))
    if any(row.stage in SUMMED_UP for row in overview.rows):
        yield Text("The last part of an evaluation, and of an alignment, is its summary.")
    if overview.asked > len(overview.rows):
        twice = overview.asked - len(overview.rows)
        yield Text(f"{len(overview.runs)} runs ask for {overview.asked} jobs; {twice} are common work, done once.")
    yield Text(_time(overview, total))
    about = "about " if total.missing else ""
    enough = "" if overview.peak_bytes - overview.present_bytes < overview.free_bytes else ": NOT ENOUGH"
    yield Text(
        f"Disk: {about}{size(overview.peak_bytes)} at the peak, {size(overview.present_bytes)} of it there; "
        f"{size(overview.free_bytes)} free at {overview.store}{enough}.",
        style="red" if enough else "",
    )
    aside = [(row, part, reason) for row in overview.rows for part, reason in row.state.set_aside.items()]
    for row, part, reason in aside[:8]:
        yield Text(f"Set aside: {row.state.job.name} part {part}: {reason}", style=STYLES["set aside"])
    if aside:
        yield Text("`eopd store verify --repair` re-queues what was set aside.")


def _sum(total: Total) -> str:
    bound, about = "at most " if total.at_most else "", "about " if total.missing else ""
    return (
        f"{total.jobs:,} jobs, {total.done:,} of them done; {total.parts:,} parts, {total.missing:,} missing; "
        f"{bound}{number(total.tokens)} tokens, {about}{size(total.bytes)}."
    )


def _time(overview: Overview, total: Total) -> str:
    if not total.missing:
        return "Nothing is left to do."
    rates = "; ".join(
        f"{stage} {1 / rate.seconds_per_token:,.0f} tokens/s ({rate.source})"
        for stage, rate in overview.rates.items()
        if overview.totals.get(stage) is not None and overview.totals[stage].missing
    )
    if total.unknown == total.jobs - total.done:
        return "Time: not known yet; nothing like it has been run in this store."
    unknown = f", and {total.unknown} jobs of which no rate is known yet" if total.unknown else ""
    return f"Time of one worker: {duration(total.seconds)}{unknown}. Measured: {rates}."
