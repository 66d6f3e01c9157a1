"""Refusals before any work: what a run plans to store must be what its objective reads, and must fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.pipeline.forecast import Forecast, Keep, forecast
from eopd.pipeline.inputs import check_same_tokens, check_weights, models_by_role
from eopd.pipeline.prompt_check import FIRST_ROWS, check_prompts
from eopd.pipeline.run import Run
from eopd.stages.format import size
from eopd.stages.models.memory import free_memory
from eopd.stages.rollout.stage import drawn_rows
from eopd.stages.stage import Job
from eopd.stages.table import TRAIN
from eopd.stages.train.stage import scores_role, student_bytes
from eopd.storage import listing
from eopd.storage.coverage import Coverage
from eopd.storage.errors import STAGES, require_packages
from eopd.storage.identity import Digests
from eopd.storage.paths import WEIGHTS

SPAREST = Keep(weights=1, optimizer=1)
LIKELY_SHARE = 0.1
"""Share of a bound on tokens that is likely to be used."""
SOON_FREED = 100_000_000
"""A disk that lacks less than this is soon cleared, and pauses the run until then."""
RESPONSE_BYTES = 1024
"""Memory of a response without tokens: the request, its sample, its row."""
ASSUMES_SFT_TEACHER = ("lightning_opd",)


def check_runs(
    runs: Sequence[Run], jobs: Sequence[Job] | None = None, *, works_here: bool = False, every_row: bool = False
) -> None:
    """Refuse runs that cannot succeed.

    Args:
        jobs: those that are to be done now; None: all.
        works_here: this process will do the work, so it may import torch.
        every_row: read every row of the prompt sources, and not the first ones only.

    Raises:
        ConfigError: the message names the setting and what to do.
        ValueError: packages that the work needs are not installed here.
    """
    for run in runs:
        if works_here or run.settings.launcher.kind == "local":
            require_stages(run, jobs)
    check_prompts(runs, None if every_row else FIRST_ROWS)
    for run in runs:
        facts = models_by_role(run.facts)
        models = {
            role: (settings, facts[role]) for role, settings in run.settings.models.items() if settings.path is not None
        }
        if not all(run.is_done(job) for job in run.plan.jobs):
            check_other_students(run, runs)
            check_weights(models, run.facts.digests or Digests(), in_process=works_here)
        check_same_tokens(run.facts)
        check_shuffled(run)
        check_calibration(run)
        for line in check_stages(run, jobs):
            run.progress.line(line)
        trainings = [job for job in run.plan.jobs if job.stage is TRAIN and not run.is_done(job)]
        if jobs is not None:
            trainings = [job for job in trainings if _takes_part(jobs, job)]
        for job in trainings:
            check_needs(run, job)
            check_selection(run, job)
        for warning in (other_sft_teacher(run), idle_teacher(run)) if trainings else ():
            if warning is not None:
                run.progress.line(warning)
    rows = forecast(runs)
    check_store_size(rows)
    check_machine(rows)


def require_stages(run: Run, jobs: Sequence[Job] | None = None) -> None:
    """Raise ValueError if a job is left to do and packages that stages import are not installed on this machine."""
    left = _left(run, jobs)
    if left:
        require_packages(f"the stage {left[0].stage.name}", STAGES, "train")
    for stage in dict.fromkeys(job.stage for job in left):
        lacking = stage.lacks()
        if lacking is not None:
            raise lacking


def check_stages(run: Run, jobs: Sequence[Job] | None = None) -> list[str]:
    """Let each stage refuse what it cannot read, and return the stages' warnings about the jobs that are left.

    Raises:
        ConfigError: as ``Stage.check``.
    """
    try:
        warnings = [job.stage.check(job, run.experiment) for job in _left(run, jobs)]
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error
    return [warning for warning in dict.fromkeys(warnings) if warning is not None]


def _left(run: Run, jobs: Sequence[Job] | None) -> list[Job]:
    return [job for job in (run.plan.jobs if jobs is None else jobs) if not run.is_done(job)]


def _takes_part(jobs: Sequence[Job], train: Job) -> bool:
    """True if a training job is among ``jobs`` or reads what one of them makes."""
    read = {(input_.identity.kind, input_.identity.key) for input_ in train.inputs.values()}
    return any(job is train or job.key in read for job in jobs)


def check_other_students(run: Run, runs: Sequence[Run]) -> None:
    """Refuse to start before the students of other runs are trained, unless such a run is started with this one.

    Raises:
        ConfigError: names the setting, the student and its run.
    """
    started = {job.key for one in runs for job in one.plan.jobs}
    for role, other in run.others().items():
        artifact = run.artifact(other.checkpoint)
        if artifact.is_committed(WEIGHTS) or (artifact.kind, artifact.key) in started:
            continue
        which = f"student {other.round} of the run {other.run}"
        if WEIGHTS in artifact.pruned():
            raise ConfigError(
                f"{which} was pruned",
                setting=f"{role}.run",
                remedy="run it over another store with train.keep_checkpoints: null, or name its last student",
            )
        raise ConfigError(
            f"{which} is not in {run.store} yet ({artifact.kind}/{artifact.key})",
            setting=f"{role}.run",
            artifact=f"{artifact.kind}/{artifact.key}",
            remedy=f"run {other.run} first, with the same store",
        )


def idle_teacher(run: Run) -> str | None:
    """Return a warning if a self teacher says at the start of training just what the student says."""
    settings = run.settings
    if settings.teacher.student is None or not settings.teacher_is_the_reader:
        return None
    return (
        "warning: the teacher is the student itself and reads what the student reads (score.teacher_prompt): in round "
        "0 every log-ratio is 0, so an objective that compares the two moves nothing"
    )


def check_shuffled(run: Run) -> None:
    """Refuse a control that has nothing to exchange: a part, or a benchmark, of one prompt.

    Raises:
        ConfigError: names the round or the benchmark.
    """
    settings = run.settings
    if not settings.score.teacher_prompt.shuffled:
        return
    for round_ in range(settings.rounds):
        if any(len(set(rows)) == 1 for rows in drawn_rows(run.experiment, round_)):
            raise ConfigError(
                f"score.teacher_prompt.shuffled exchanges answers among the prompts of a part, and round {round_} has "
                "a part of one prompt",
                setting="score.teacher_prompt.shuffled",
                remedy="change rollout.rows_per_part or rollout.prompts_per_round",
            )
    if settings.evaluate is not None and settings.evaluate.alignment is not None:
        for benchmark in run.facts.benchmarks:
            if benchmark.count == 1:
                raise ConfigError(
                    f"score.teacher_prompt.shuffled exchanges answers among problems, and the benchmark "
                    f"{benchmark.name} has one",
                    setting="score.teacher_prompt.shuffled",
                    remedy="leave out evaluate.alignment, or that benchmark",
                )


def check_calibration(run: Run) -> None:
    """Refuse to calibrate a routing rule on half of the problems or more. Raises ConfigError."""
    evaluate = run.settings.evaluate
    if evaluate is None or evaluate.route is None:
        return
    try:
        evaluate.route.check_calibration(sum(benchmark.count for benchmark in run.facts.benchmarks))
    except ValueError as error:
        raise ConfigError.of(error) from error


# -- needs of the objective ------------------------------------------------------------------------------------------


def check_needs(run: Run, train: Job) -> None:
    """Compare the objective's needs with the planned coverage of a round's scores.

    Raises:
        ConfigError: something is not covered, with the objective, what is missing and the command that adds it; or the
            objective reads q_old, and the rollouts truncate the distribution that they are sampled from.
    """
    from eopd.stages.train.objectives.registry import make_objective
    from eopd.stages.train.responses import refuse_other_writers, refuse_truncated_sampling

    settings = run.settings
    objective = make_objective(settings.train.objective, has_prefixes=settings.has_prefixes)
    try:
        refuse_truncated_sampling(objective, settings.rollout.parameters(()).truncates)
        refuse_other_writers(objective, settings.rollout.source)
    except ValueError as error:
        raise ConfigError.of(error) from error
    coverages = _planned_coverages(run, train)  # none if nothing reads scores
    missing = [
        lacking
        for coverage in coverages
        for need in objective.needs_with(run.facts.stop_ids if coverage.sampled else ())
        if (lacking := coverage.lacks(need)) is not None
    ]
    lacks = "; ".join(dict.fromkeys(one.what for one in missing))
    if not missing:
        return
    if settings.teacher.capture is not None:
        raise ConfigError(
            f"train.objective.name={settings.train.objective.name} reads what teacher.capture does not hold: it lacks "
            f"{lacks}",
            setting="train.objective.name",
            remedy="Choose another objective (fkl, jsd or rkl_topk), or, if every token has more entries than one, say "
            "how many in teacher.capture.top_k",
        )
    changes = {name: value for one in missing for name, value in one.settings.items()}
    command = " ".join(f"--set {name}={value}" for name, value in changes.items())
    raise ConfigError(
        f"train.objective.name={settings.train.objective.name} reads what the scores would not hold: they lack {lacks}",
        setting="train.objective.name",
        remedy=f"`eopd run CONFIG {command}` adds it beside what is there.",
    )


def check_selection(run: Run, train: Job) -> None:
    """Refuse a round of which `train.select.where` leaves no prompt. Raises ConfigError."""
    if run.experiment.most_responses(train.round):
        return
    selected, experiment = len(run.facts.selected_prompts or ()), run.experiment
    raise ConfigError(
        f"train.select.where leaves nothing to train on in round {train.round}: of {run.facts.prompt_count:,} prompts "
        f"it selects {selected:,}, and none is among the {experiment.prompts_per_round:,} that the round draws",
        setting="train.select.where",
        remedy="Raise rollout.prompts_per_round or select more prompts",
    )


def _planned_coverages(run: Run, train: Job) -> list[Coverage]:
    """Return the coverage of every teacher's scores that a training job reads."""
    coverages = []
    for teacher, experiment in run.experiment.by_teacher.items():
        scores = train.inputs.get(scores_role(teacher))
        if scores is None:
            continue
        coverage = dict(scores.identity.coverage or {})
        coverages.append(
            Coverage.from_mapping(
                {
                    "head": coverage["head"],
                    "stop_ids": run.facts.stop_ids,
                    "extra_k": run.settings.rollout.student_topk if coverage.get("extra") else 0,
                    "vocab_size": coverage.get("vocab_size", experiment.teacher_vocabulary),
                    "entropy": coverage.get("entropy", True),
                    "sampled": coverage.get("sampled", True),
                }
            )
        )
    return coverages


def other_sft_teacher(run: Run) -> str | None:
    """Return a warning if the objective assumes that the student was supervised by its teacher and the config names
    another."""
    named, teacher = run.settings.student.sft_teacher, run.settings.teacher.path
    if run.settings.train.objective.name not in ASSUMES_SFT_TEACHER or named is None or teacher is None:
        return None
    if named == teacher or Path(named).expanduser().resolve() == Path(teacher).expanduser().resolve():
        return None
    return (
        f"warning: {run.settings.train.objective.name} assumes that the student's supervised data came from its "
        f"teacher, {teacher}; student.sft_teacher names {named}. The advantages then also hold their disagreement."
    )


# -- size of the store -----------------------------------------------------------------------------------------------


def check_store_size(rows: Forecast) -> None:
    """Compare the size of the store at the runs' peak with `max_store_bytes`, if that is set.

    Nothing is measured on the disk: other artifacts' sizes are in their markers, and the rest is the forecast, with
    scores at the size that they cannot exceed.

    Raises:
        ConfigError: it is more; says how much, of what, and what would help.
    """
    runs = rows.runs
    limits = [run.settings.max_store_bytes for run in runs if run.settings.max_store_bytes is not None]
    if not limits:
        return
    others, peak = _bytes_of_others(runs), rows.peak_bytes(bounds=True)
    if others + peak <= min(limits):
        return
    whose = "this run's worst moment" if len(runs) == 1 else f"the worst moment of these {len(runs)} runs"
    raise ConfigError(
        f"max_store_bytes is {size(min(limits))}, and {rows.store} would hold about {size(others + peak)} at {whose}: "
        f"{size(peak)} of {'its' if len(runs) == 1 else 'their'} own, {size(others)} of other artifacts",
        setting="max_store_bytes",
        remedy=f"{_what_would_help(rows)} Nothing was started.",
    )


def check_machine(rows: Forecast) -> None:
    """Compare what `eopd plan` forecasts with the free disk, and one engine call with the free memory.

    Tokens are forecast as upper bounds until something alike was sampled, and runs often use a tenth of that; so a
    tenth is required. A disk that fills up all the same pauses the run.

    Raises:
        ConfigError: there is far too little; names the settings that ask for so much.
    """
    bounds = sum(row.size.bytes - row.present for row in rows.rows if row.size.at_most and not row.job.is_prunable)
    need = rows.peak_bytes() - rows.present_bytes - round((1 - LIKELY_SHARE) * bounds)
    if need > max(rows.free_bytes, SOON_FREED):
        missing = max(rows.rows, key=lambda row: row.size.bytes - row.present)
        raise ConfigError(
            f"{size(rows.free_bytes)} are free at {rows.store}, and {size(need)} and more would be needed, "
            f"most of it for `{missing.stage}`",
            setting="store",
            remedy=f"lower {missing.job.stage.size_settings}, free space, or choose another store. `eopd plan` shows "
            "what takes how much. Nothing was started.",
        )
    available = free_memory()
    if not available:  # unknown
        return
    for run in rows.runs:
        if run.settings.launcher.kind not in ("inline", "local"):  # other machines have other memory
            continue
        for settings, responses in _responses_of_a_part(run):
            if responses * RESPONSE_BYTES > available:
                raise ConfigError(
                    f"{' and '.join(settings)}: a part of {responses:,} responses is sampled at once and takes "
                    f"{size(responses * RESPONSE_BYTES)} of memory and more, of which {size(available)} are available",
                    setting=settings[0],
                    remedy="lower one of them. Nothing was started.",
                )


def _responses_of_a_part(run: Run) -> Iterator[tuple[tuple[str, str], int]]:
    """Return the settings that decide how many responses one engine call samples, and that number."""
    rollout, evaluate = run.settings.rollout, run.settings.evaluate
    prompts = min(rollout.rows_per_part, rollout.prompts_per_round, run.facts.prompt_count)
    yield ("rollout.samples_per_prompt", "rollout.rows_per_part"), prompts * rollout.samples_per_prompt
    if evaluate is not None:
        most = max((benchmark.count for benchmark in run.facts.benchmarks), default=0)
        yield ("evaluate.samples", "evaluate.rows_per_part"), min(evaluate.rows_per_part, most) * evaluate.samples


def _bytes_of_others(runs: Sequence[Run]) -> int:
    """Return the bytes of artifacts in the store that no plan of the runs names."""
    own = {job.key for run in runs for job in run.plan.jobs}
    own |= {(job.scratch.kind, job.scratch.key) for run in runs for job in run.plan.jobs if job.scratch is not None}
    store = runs[0].store
    return sum(listing.listed(store, *key).bytes for key in listing.keys(store) if key not in own)


def _what_would_help(rows: Forecast) -> str:
    spared = rows.peak_bytes() - rows.peak_bytes(SPAREST)
    checkpoint = max((student_bytes(run.experiment) for run in rows.runs), key=lambda one: one.weights)
    text = (
        f"A checkpoint is {size(checkpoint.weights)} of weights and {size(checkpoint.optimizer)} of optimiser state, "
        "one a round."
    )
    if spared > 0:
        text += f" train.keep_checkpoints=1 and train.keep_optimizer_states=1 would save {size(spared)}."
    fewer = "Fewer rounds" if len(rows.runs) == 1 else "Fewer rounds or runs"
    return f"{text} {fewer}, `eopd store gc --runs {rows.runs[0].settings.runs}`, or a higher limit help."
