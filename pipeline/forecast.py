"""What the jobs of a plan will take: tokens, bytes, seconds, and the disk at its worst moment. Pure arithmetic.

Tokens a response and bytes a token come from committed parts. If a stage has none yet, tokens are what the settings
allow *at most*, bytes are an estimate, and scores also have a bound that no teacher exceeds. Seconds come from finished
jobs or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eopd.pipeline.config import RunSettings
from eopd.pipeline.estimate import ROLLOUT_TOKEN, CheckpointBytes, Keep, peak_bytes, score_token_bytes
from eopd.pipeline.plan import STAGES, Facts, PlannedJob, Stage, prompts_per_round
from eopd.pipeline.rates import Rate, Sizes
from eopd.pipeline.survey import JobState
from eopd.storage.size_bound import most_bytes
from eopd.storage.teacher_record import HeadRule

SIDE_ENTRY = 4.0  # bytes of an entry of the student's own top-k, before compression
ALIGNED_ROW = 20.0  # bytes of an alignment's sums of one response in one bin of entropy
SAMPLED = ("rollouts", "evaluations")  # artifacts whose tokens other stages read


@dataclass(frozen=True)
class RunSpec:
    """What a forecast must know of one run."""

    settings: RunSettings
    facts: Facts
    checkpoint: CheckpointBytes
    vocabulary: int = 0  # ids of the teacher; 0: not known


@dataclass(frozen=True)
class Row:
    """One job with what it takes as a whole; ``seconds`` are those of what is missing, None if not known yet."""

    state: JobState
    tokens: int
    bytes: int  # an estimate, unless the job is done
    present: int  # bytes of it that are there, in the store that is written to
    at_most: bool  # nothing like it was measured: tokens are a bound
    seconds: float | None
    most_bytes: int | None = None  # what ``bytes`` cannot exceed, if that is known

    @property
    def stage(self) -> Stage:
        return self.state.job.stage

    @property
    def round(self) -> int:
        return self.state.job.round


def responses_of(job: PlannedJob, spec: RunSpec) -> int:
    """Responses that a rollout or an evaluation samples."""
    if job.stage == "evaluate":
        evaluate = spec.settings.evaluate
        assert evaluate is not None
        return evaluate.samples * sum(benchmark.count for benchmark in spec.facts.benchmarks)
    return prompts_per_round(spec.settings, spec.facts) * spec.settings.rollout.samples_per_prompt


def forecast(
    states: Sequence[JobState],
    specs: Mapping[str, RunSpec],
    sizes: Mapping[str, Sizes],
    rates: Mapping[Stage, Rate],
) -> list[Row]:
    """A row for every state, in the same order. ``sizes``: artifact key -> sums over some of its parts."""
    by_stage: dict[Stage, Sizes] = defaultdict(Sizes)
    for state in states:
        by_stage[state.job.stage] += sizes.get(state.job.output.key, Sizes())
    rows: list[Row] = []
    tokens_of: dict[str, tuple[int, bool]] = {}  # of what was sampled: tokens, and whether that is a bound
    for state in states:
        job, spec = state.job, specs[state.runs[0]]
        again = job.output.key in tokens_of  # for a run that wants another side artifact of the same rollouts
        own, stage = sizes.get(job.output.key, Sizes()), by_stage[job.stage]
        if job.output.kind in SAMPLED:
            tokens, at_most = _sampled(job, spec, own if own.responses else stage)
            tokens_of[job.output.key] = (tokens, at_most)
        else:
            read = [tokens_of[identity.key] for identity in job.inputs if identity.kind in SAMPLED]
            tokens, at_most = sum(count for count, _ in read), any(bound for _, bound in read)
            if job.stage == "align":
                tokens = round(tokens * _aligned(spec))
        if job.stage == "train":
            tokens *= spec.settings.train.epochs
            size = float(spec.checkpoint.weights + spec.checkpoint.optimizer)
        else:
            size = tokens * (
                (0.0 if again else _bytes_per_token(job, spec, own if own.tokens else stage)) + _beside(job)
            )
        most = _most(job, spec, tokens) if job.stage == "score" and not (own if own.tokens else stage).tokens else None
        rate = rates.get(job.stage)
        left = tokens * state.missing / state.parts
        seconds = 0.0 if state.is_done else None if rate is None else left * rate.seconds_per_token
        rows.append(Row(state, tokens, round(size), round(_present(state, size, spec)), at_most, seconds, most))
    return rows


def _most(job: PlannedJob, spec: RunSpec, tokens: int) -> int:
    """Bytes that scores of so many tokens do not exceed."""
    coverage = job.output.coverage or {}
    return most_bytes(
        HeadRule(**coverage["head"]),
        stops=len(spec.facts.stop_ids),
        vocabulary=spec.vocabulary,
        extra_k=spec.settings.rollout.student_topk if coverage.get("extra") else 0,
        tokens=tokens,
        responses=responses_of(job, spec),
        parts=job.output.parts,
    )


def _present(state: JobState, size: float, spec: RunSpec) -> float:
    """Of ``size`` bytes, those that are in the store that is written to.

    A checkpoint's optimiser is written first and pruned first.
    """
    if state.elsewhere:
        return 0.0
    if state.job.stage != "train":
        return size * (state.done - state.pruned) / state.parts
    optimizer, weights = state.done >= 1 and state.pruned == 0, state.done == state.parts and state.pruned < 2
    return float(optimizer * spec.checkpoint.optimizer + weights * spec.checkpoint.weights)


def _aligned(spec: RunSpec) -> float:
    """Share of an evaluation's responses that an alignment reads."""
    evaluate = spec.settings.evaluate
    assert evaluate is not None
    assert evaluate.alignment is not None
    limit = evaluate.alignment.limit
    problems = [benchmark.count for benchmark in spec.facts.benchmarks]
    read = problems if limit is None else [min(limit, count) for count in problems]
    return evaluate.alignment.samples / evaluate.samples * sum(read) / sum(problems)


def _sampled(job: PlannedJob, spec: RunSpec, measured: Sizes) -> tuple[int, bool]:
    responses = responses_of(job, spec)
    if measured.responses:
        return round(responses * measured.tokens / measured.responses), False
    settings = spec.settings.evaluate if job.stage == "evaluate" else spec.settings.rollout
    assert settings is not None
    return responses * settings.parameters(()).max_new_tokens, True


def _bytes_per_token(job: PlannedJob, spec: RunSpec, measured: Sizes) -> float:
    if measured.tokens:
        found = measured.bytes / measured.tokens
    elif job.stage == "score":
        found = score_token_bytes(spec.settings.score.head, spec.vocabulary)
    elif job.stage == "align":
        evaluate = spec.settings.evaluate
        assert evaluate is not None
        assert evaluate.alignment is not None
        bins = len(evaluate.alignment.bins) + 2
        found = ALIGNED_ROW * bins / evaluate.parameters(()).max_new_tokens
    else:
        found = ROLLOUT_TOKEN
    return found


def _beside(job: PlannedJob) -> float:
    """Bytes a token of the student's own top-k, which a rollout makes beside its responses."""
    return SIDE_ENTRY * int(job.side.settings["k"]) if job.stage == "rollout" and job.side is not None else 0.0


def peak_disk(
    rows: Sequence[Row], specs: Mapping[str, RunSpec], keep: Keep | None = None, *, bounds: bool = False
) -> int:
    """Bytes of what these runs have or make in the store that is written to, at the worst moment.

    Should each run reach its own at the same time; what runs have in common is the first one's.

    Args:
        keep: what pruning leaves; None: as each run's settings say.
        bounds: take what a job's bytes cannot exceed instead of the estimate, if that is known.
    """

    def size(row: Row) -> int:
        return row.most_bytes if bounds and row.most_bytes is not None else row.bytes

    total = 0
    for run, spec in specs.items():
        own = [row for row in rows if row.state.runs[0] == run and not row.state.elsewhere]
        made = [row for row in own if row.stage == "train"]
        if not made:
            total += sum(map(size, own))
            continue
        first = spec.settings.rounds - len(made)  # those of the rounds before lie elsewhere
        data = [0] * len(made)
        for row in own:
            if row.stage != "train":
                data[min(max(row.round - first, 0), len(data) - 1)] += size(row)
        trained = sum(row.state.is_done for row in made)
        train = spec.settings.train
        kept = keep or Keep(train.keep_checkpoints, train.keep_optimizer_states)
        total += peak_bytes(spec.checkpoint, data, kept, train.keep_progress, trained)
    return total


@dataclass(frozen=True)
class Total:
    """Of one stage, or of all: jobs by state, and what they take."""

    jobs: int
    done: int
    parts: int
    missing: int  # parts
    tokens: int
    bytes: int
    at_most: bool
    seconds: float  # of what is missing and has a rate
    unknown: int  # jobs that are missing and have none


def totals(rows: Sequence[Row]) -> dict[Stage | str, Total]:
    """By stage, and ``all``."""
    found: dict[Stage | str, Total] = {}
    for name in (*STAGES, "all"):
        chosen = [row for row in rows if name in (row.stage, "all")]
        if chosen:
            found[name] = Total(
                jobs=len(chosen),
                done=sum(row.state.is_done for row in chosen),
                parts=sum(row.state.parts for row in chosen),
                missing=sum(row.state.missing for row in chosen),
                tokens=sum(row.tokens for row in chosen),
                bytes=sum(row.bytes for row in chosen),
                at_most=any(row.at_most for row in chosen),
                seconds=sum(row.seconds or 0.0 for row in chosen),
                unknown=sum(row.seconds is None for row in chosen),
            )
    return found
