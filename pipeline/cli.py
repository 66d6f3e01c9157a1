"""The `eopd` command. Settings are parsed before anything heavy is imported, and `eopd --help` imports neither."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.pipeline.store_cli import app as store_app

if TYPE_CHECKING:
    from eopd.pipeline.plan import PlannedJob, Stage
    from eopd.pipeline.runner import Runner

app = typer.Typer(
    help="Offline-teacher distillation of language models: the teacher runs once, its scores are stored, training "
    "reads them.\n\nCONFIG is a YAML file, or the name of one that comes with eopd (such as quickstart).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(store_app, name="store")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="Settings: a YAML file, or a name such as quickstart.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a setting, as in train.optimizer.lr=1e-5. Repeatable."
    ),
]
Round = Annotated[int, typer.Option("--round", "-r", min=0, help="Round to work on, counted from 0.")]
EvaluatedRound = Annotated[
    int, typer.Option("--round", "-r", min=0, help="Which student: 0 is the first, R the one trained in round R - 1.")
]
Parts = Annotated[
    str | None,
    typer.Option("--parts", metavar="I/N", help="Work on share I of N of the parts (1/4 .. 4/4), beside other jobs."),
]


@app.command()
def rollout(config: Config, round_: Round = 0, parts: Parts = None, set_: Set = None) -> None:
    """Sample responses from the current student."""
    _stage("rollout", config, round_, parts, set_)


@app.command()
def score(config: Config, round_: Round = 0, parts: Parts = None, set_: Set = None) -> None:
    """Let the teacher read them: entropy, top log-probs and tail of every token, to Zarr."""
    _stage("score", config, round_, parts, set_)


@app.command()
def train(config: Config, round_: Round = 0, set_: Set = None) -> None:
    """Train the student on stored rollouts and scores."""
    _stage("train", config, round_, None, set_)


@app.command()
def evaluate(config: Config, round_: EvaluatedRound = 0, parts: Parts = None, set_: Set = None) -> None:
    """Measure a student: Avg@k and Pass@k on the benchmarks."""
    _stage("evaluate", config, round_, parts, set_)


@app.command()
def report(config: Config, set_: Set = None) -> None:
    """Write the HTML report of a run, from whatever is complete."""
    from eopd.pipeline.reporting import write_report

    runner = _open(config, set_)
    page = write_report(runner)
    runner.progress.line(f"report: {page}")


@app.command()
def run(config: Config, set_: Set = None) -> None:
    """Every stage of every round in order, skipping what is complete; then the report."""
    from eopd.pipeline.launchers.local import launch
    from eopd.pipeline.reporting import write_report
    from eopd.stages.train.extras import require_extras

    runner = _open(config, set_)
    require_extras(runner.settings.train)
    _write_resolved(runner)
    for job in runner.plan.jobs:
        if runner.is_done(job):
            runner.progress.line(f"{job.name}: complete already -> {runner.artifact(job.output).folder}")
        else:
            launch(runner, job)
    page = write_report(runner)
    runner.progress.line(f"report: {page}")


@app.command()
def plan(config: Config, set_: Set = None) -> None:
    """Show every job, its key and what is missing of it. Changes nothing."""
    runner = _open(config, set_)
    for job in runner.plan.jobs:
        sys.stdout.write(_describe(runner, job) + "\n")


def _describe(runner: Runner, job: PlannedJob) -> str:
    artifact = runner.artifact(job.output)
    done = len(artifact.committed())
    state = "complete" if done == artifact.parts else "missing" if done == 0 else f"{done} of {artifact.parts} parts"
    return f"{job.name:<12} {state:<18} {artifact}"


def _open(config: str, overrides: list[str] | None) -> Runner:
    from eopd.pipeline.config import load_config
    from eopd.pipeline.launchers.local import rank
    from eopd.pipeline.planning import plan_run
    from eopd.pipeline.progress import make_progress
    from eopd.pipeline.runner import Runner
    from eopd.stages.job import NullProgress

    settings = load_config(config, overrides or ())
    facts, plan_ = plan_run(settings)
    progress = make_progress() if rank() == 0 else NullProgress()
    return Runner(settings, facts, plan_, progress)


def _stage(stage: Stage, config: str, round_: int, parts: str | None, overrides: list[str] | None) -> None:
    from eopd.pipeline.launchers.local import train_together, trains_together

    runner = _open(config, overrides)
    _write_resolved(runner)
    job = runner.plan.job(stage, round_)
    chosen = _share(parts, job.output.parts)
    if not runner.is_done(job) and trains_together(runner, job):
        train_together(runner, job)
    elif not runner.run(job, chosen):
        runner.progress.line(f"{job.name}: complete already -> {runner.artifact(job.output).folder}")


def _share(text: str | None, parts: int) -> list[int] | None:
    """Part numbers of share i/n, or None for all of them."""
    from eopd.pipeline.config import ConfigError

    if text is None:
        return None
    share, slash, shares = text.partition("/")
    if not (slash and share.isdigit() and shares.isdigit() and 1 <= int(share) <= int(shares)):
        raise ConfigError(f"--parts {text!r}: expected I/N with 1 <= I <= N, such as 2/4")
    return list(range(int(share) - 1, parts, int(shares)))


def _write_resolved(runner: Runner) -> None:
    import yaml

    from eopd.pipeline.launchers.local import rank
    from eopd.storage.files import replace_atomically

    if rank() > 0:
        return
    resolved = runner.settings.model_dump(mode="json")
    replace_atomically(runner.paths.config, yaml.safe_dump(resolved, sort_keys=False))


def main() -> None:
    """Entry point: errors that a person can mend are one message, not a traceback (EOPD_DEBUG=1 shows it)."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; everything committed is kept, run the same command to go on\n")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("EOPD_DEBUG") or not _is_for_people(error):
            raise
        sys.stderr.write(f"eopd: {error}\n")
        sys.exit(1)


def _is_for_people(error: Exception) -> bool:
    from eopd.storage.errors import StoreError

    stopped = type(error).__name__ == "TrainingStopped"
    return isinstance(error, (StoreError, ValueError)) or stopped


if __name__ == "__main__":
    main()
