"""Everything that `eopd plan` and `eopd status` show of one run or of a sweep, gathered from the store once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eopd.pipeline.estimate import CheckpointBytes, Keep, checkpoint_bytes, read_shapes
from eopd.pipeline.forecast import Row, RunSpec, Total, forecast, peak_disk, totals
from eopd.pipeline.needs import vocabulary_size
from eopd.pipeline.plan import STAGES, Stage
from eopd.pipeline.pruning import rebuilds
from eopd.pipeline.rates import Rate, measure_rates, sample_sizes
from eopd.pipeline.runner import Runner
from eopd.pipeline.store_check import existing
from eopd.pipeline.survey import read_makers, store_listing, survey


@dataclass(frozen=True)
class Overview:
    runs: tuple[str, ...]
    store: Path
    rows: tuple[Row, ...]
    rates: dict[Stage, Rate]
    peak_bytes: int  # of these runs' own artifacts, in the store that is written to
    free_bytes: int  # at the store
    asked: int  # jobs that the runs ask for, each run counted by itself
    specs: Mapping[str, RunSpec] = field(default_factory=dict)  # of each run

    @property
    def totals(self) -> dict[Stage | str, Total]:
        return totals(self.rows)

    @property
    def present_bytes(self) -> int:
        return sum(row.present for row in self.rows)

    def peak_with(self, keep: Keep) -> int:
        """``peak_bytes`` if pruning left only this."""
        return peak_disk(self.rows, self.specs, keep)

    @property
    def peak_bound(self) -> int:
        """``peak_bytes`` with bounds in place of estimates, as far as there are any."""
        return peak_disk(self.rows, self.specs, bounds=True)

    def checkpoint_of(self, run: str) -> CheckpointBytes:
        return self.specs[run].checkpoint

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": list(self.runs),
            "store": str(self.store),
            "jobs": [_job_json(row) for row in self.rows],
            "jobs_asked_for": self.asked,
            "totals": {name: vars(total) for name, total in self.totals.items()},
            "rates": {stage: vars(rate) for stage, rate in self.rates.items()},
            "disk": {"peak": self.peak_bytes, "present": self.present_bytes, "free": self.free_bytes},
        }


def _job_json(row: Row) -> dict[str, Any]:
    state = row.state
    return {
        "runs": list(state.runs),
        "stage": row.stage,
        "round": row.round,
        "artifact": f"{state.job.output.kind}/{state.job.output.key}",
        "state": state.state,
        "made_by": state.maker or None,
        "parts": state.parts,
        "done": state.done,
        "set_aside": {str(part): reason for part, reason in state.set_aside.items()},
        "tokens": row.tokens,
        "bytes": row.bytes,
        "tokens_at_most": row.at_most,
        "bytes_at_most": row.most_bytes,
        "seconds_left": row.seconds,
    }


def look(runners: Sequence[Runner]) -> Overview:
    """Survey, sizes, rates and forecast of runs that share their stores and a folder of runs. Changes nothing."""
    first = runners[0]
    store, folder = first.store, Path(first.settings.runs)
    names = [runner.settings.name for runner in runners]
    again = {part for runner in runners for part in rebuilds(runner)}
    plans = {runner.settings.name: runner.plan for runner in runners}
    states = survey(plans, store_listing(first.artifact, first.is_own, again), read_makers(folder, names))
    specs = {runner.settings.name: _spec(runner) for runner in runners}
    models: dict[Stage, str] = dict.fromkeys(STAGES, first.settings.student.path)
    models["score"] = first.settings.teacher.path
    rates = measure_rates(store, folder, names, models)
    rows = forecast(states, specs, sample_sizes(first.artifact, states), rates)
    return Overview(
        runs=tuple(names),
        store=store,
        rows=tuple(rows),
        rates=rates,
        peak_bytes=peak_disk(rows, specs),
        free_bytes=shutil.disk_usage(existing(store)).free,
        asked=sum(len(runner.plan.jobs) for runner in runners),
        specs=specs,
    )


def _spec(runner: Runner) -> RunSpec:
    shapes = read_shapes(runner.facts.student.folder)
    checkpoint = checkpoint_bytes(shapes, runner.settings.train)
    return RunSpec(runner.settings, runner.facts, checkpoint, vocabulary_size(runner.facts.teacher.folder))
