"""The study: how objectives, gates, staleness and storage change what a student learns on Countdown.

    python -m examples.study                    # everything that is missing, seed by seed, then study.md
    python -m examples.study --only main        # the main comparison
    python -m examples.study --list             # what is there, what is missing, how long it will take
    python -m examples.study --report           # study.md from the results that are there
    python -m examples.study --smoke            # the whole path at toy size, in a folder of its own (5 minutes)

Every result is one JSON file below examples/study/results; what exists is not made again. Stop it at any moment and
run the same command again: a run goes on after its last round.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eopd.pipeline.config import ConfigError
from examples.study import rates, results
from examples.study.design import HERE, SMOKE, SMOKE_TEXT, Experiment, Task
from examples.study.errors import StudyError
from examples.study.experiments import DEFAULT, EXPERIMENTS, TUNE
from examples.study.workers import alone, run_all
from examples.study.worlds import GSM8K, TOY_GSM8K, gsm8k_data

DOCS = HERE / "study.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(EXPERIMENTS), action="append", help="this experiment (repeatable)")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds instead of each experiment's own")
    parser.add_argument("--settings", nargs="+", help="these settings of the chosen experiments")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of intermediate files")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing")
    parser.add_argument("--report", action="store_true", help="write the report from the results that are there")
    parser.add_argument("--smoke", action="store_true", help="toy size, results and report below --work/smoke")
    args = parser.parse_args(arguments)
    chosen = [EXPERIMENTS[name] for name in args.only or DEFAULT]
    try:
        if args.list or args.report:
            return study(chosen, args)
        with alone(args.work / ("smoke.lock" if args.smoke else "study.lock")):
            return study(chosen, args)
    except (StudyError, ConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


def study(chosen: list[Experiment], args: argparse.Namespace) -> int:
    document = DOCS
    if args.smoke:
        args.work = args.work / "smoke"
        args.results, document = args.work / "results", args.work / "study.md"
        if not (args.list or args.report):
            shutil.rmtree(args.work, ignore_errors=True)
        chosen = [at_toy_size(one) for one in (chosen if args.only else with_data(chosen, args.work))]
    failed: list[str] = []
    known = rates.untuned() if args.smoke else rates.tuned(args.results)
    if known.missing and not args.report:
        say("learning rates first: --only tuning")
        tuning = in_order([TUNE], known)
        if args.list:
            show(tuning, args.results, args.workers)
            return 0
        failed = make_missing(tuning, args)
        if failed:
            return report_failures(failed)
        known = rates.tuned(args.results)
    if not args.report:
        tasks = in_order(chosen, known, args.seeds, args.settings)
        if args.list:
            show(tasks, args.results, args.workers)
            return 0
        failed = make_missing(tasks, args)
    write_report(chosen if args.only or args.smoke else [*chosen, TUNE], known, args.results, document)
    return report_failures(failed)


def with_data(experiments: Sequence[Experiment], work: Path) -> list[Experiment]:
    """Those whose data is at hand: a smoke run does not ask for GSM8K."""
    try:
        gsm8k_data(work)
    except StudyError as error:
        say(f"gsm8k is left out: {error}")
        return [experiment for experiment in experiments if experiment.world != GSM8K]
    return list(experiments)


def at_toy_size(experiment: Experiment) -> Experiment:
    """Without the settings whose round is longer than the whole toy run: they would be those that sample once."""
    if experiment.world == GSM8K:
        settings = tuple(dataclasses.replace(setting, refresh=1) for setting in experiment.settings)
        return dataclasses.replace(experiment, scale=SMOKE_TEXT, world=TOY_GSM8K, settings=settings, seeds=(0,))
    settings = tuple(setting for setting in experiment.settings if setting.refresh < SMOKE.iterations)
    seeds = (0, 1) if experiment.name == "main" else (0,)
    return dataclasses.replace(experiment, scale=SMOKE, settings=settings, seeds=seeds)


def make_missing(tasks: Sequence[Task], args: argparse.Namespace) -> list[str]:
    missing = [task for task in tasks if results.read(task, args.results) is None]
    say(f"{len(missing)} of {len(tasks)} results are missing; results go to {args.results}")
    return run_all(missing, args.work, args.results, args.workers, say) if missing else []


def report_failures(failed: Sequence[str]) -> int:
    for line in failed:
        say(f"FAILED {line}")
    return 1 if failed else 0


def in_order(
    experiments: Sequence[Experiment],
    known: Mapping[str, float],
    seeds: Sequence[int] | None = None,
    settings: Sequence[str] | None = None,
) -> list[Task]:
    """All settings of the first seed of the first experiment, then its second seed, ...: a study that is stopped
    has whole seeds, which can be compared."""
    return [
        task
        for experiment in experiments
        for seed in seeds or experiment.seeds
        for setting in experiment.settings
        if not settings or setting.name in settings
        for task in rates.tasks_of(experiment, setting, known, (seed,))
    ]


def show(tasks: Sequence[Task], folder: Path, workers: int) -> None:
    """One line a (experiment, setting): seeds that are there and missing; then the time that is left."""
    outcome = {task.name: results.read(task, folder) for task in tasks}
    lacking = {name for name, result in outcome.items() if result is None}
    spent = [result.content["cost"]["seconds"] for result in outcome.values() if result is not None]
    for experiment, setting in dict.fromkeys((task.experiment.name, task.setting.name) for task in tasks):
        own = [task for task in tasks if (task.experiment.name, task.setting.name) == (experiment, setting)]
        done = [task.seed for task in own if task.name not in lacking]
        todo = [task.seed for task in own if task.name in lacking]
        say(f"{experiment + '/' + setting:34} seeds done {done or '-'}, missing {todo or '-'}")
    each = sum(spent) / len(spent) if spent else None
    about = f", about {each * len(lacking) / workers / 60:.0f} min with {workers} workers" if each else ""
    say(f"{len(spent)} of {len(tasks)} results are there; {len(lacking)} missing{about}")


def write_report(experiments: Sequence[Experiment], known: Mapping[str, float], folder: Path, document: Path) -> None:
    from examples.study.report import write

    write(experiments, known, folder, document)
    say(f"report: {document}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
