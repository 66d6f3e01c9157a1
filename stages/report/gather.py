"""Gathering of a report's data, and of ``summary.json``, from artifacts.

Round r is the student at its start: the first one, or the one that round r - 1 trained. Its entropy and divergences are
those of the round's first training step, before any update; the student of the last training has none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eopd.stages.format import listed
from eopd.stages.report.compare import gains
from eopd.stages.report.data import (
    FIRST,
    OWN,
    AttributionData,
    BinnedMeans,
    CostRow,
    Estimate,
    Histogram,
    ProblemScores,
    RoundData,
    RoutingData,
    RunData,
    StepRow,
)
from eopd.stages.report.rollouts import TOKENIZER, Judge, no_verdicts, rollout_views
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.jsonl import read_lines, read_whole
from eopd.storage.paths import CHECKPOINTS
from eopd.storage.teacher_cache import JointCache
from eopd.storage.teacher_record import HeadRule
from eopd.storage.untrusted import naming_misfits, read_json
from eopd.storage.verdict_signal import verdict_signal

ENTROPY_EDGES = [round(0.1 * i, 1) for i in range(41)]
ENTROPY_END = 20.0
SIGNAL_PARTS = 4
"""Parts of a round whose scores are read to compare them with verdicts."""
FIRST_STEP = ("student_entropy", "teacher_entropy", "gate_fraction", "rkl", "fkl")
EVALUATED = ("distinct_correct", "self_bleu", "distinct_4", "token_entropy", "truncation_rate", "stop_rate", "ungraded")
HELD_OUT = {  # name -> (tokens, figure) of an alignment
    "held_out_entropy": ("all", "student_entropy"),
    "held_out_teacher_entropy": ("all", "teacher_entropy"),
    "held_out_fkl": ("all", "fkl"),
    "held_out_rkl": ("all", "rkl"),
    "held_out_uncertain_fkl": ("above", "fkl"),
    "held_out_agreement": ("all", "agreement"),
    "held_out_student_above": ("all", "student_above"),
    "held_out_teacher_above": ("above", "share"),
}
BINNED = ("fkl", "rkl", "agreement", "student_entropy", "share")
_BENCHMARK = "benchmark "  # precedes a benchmark's name among an evaluation's inputs


@dataclass(frozen=True)
class RoundArtifacts:
    """The artifacts of a round; None for those that are not complete."""

    round: int
    evaluation: Artifact | None  # summary of it, of the student at the start of the round
    rollouts: Artifact | None = None
    scores: tuple[Artifact, ...] = ()  # of each teacher
    checkpoint: Artifact | None = None
    alignment: Artifact | None = None  # summary of it
    measured: bool = True  # whether the run evaluates that student at all (evaluate.every)
    made: Mapping[str, Artifact] = field(default_factory=dict)  # everything complete of the round, by stage: its costs

    @property
    def round_start(self) -> Path | None:
        """Return the student's own entropies at the round's start; None once they were pruned."""
        if self.checkpoint is None or not self.checkpoint.is_committed(1):
            return None
        path = self.checkpoint.part_folder(1) / "round_start.safetensors"
        return path if path.exists() else None  # none is made where the student did not write the responses


@dataclass(frozen=True)
class RunArtifacts:
    name: str
    settings: dict[str, Any]
    rounds: Sequence[RoundArtifacts]
    tokenizer: str  # folder
    tau: float | None
    metrics: Path  # the run's metrics.jsonl, with timings
    jobs: Path  # the run's jobs.jsonl
    seed: int = 0
    kin: str = ""  # equal for runs that differ in nothing but their seed
    judge: Judge = no_verdicts
    elsewhere: Sequence[Path] = ()  # jobs.jsonl of the other runs on the page
    also_read: Collection[str] = ()  # keys of artifacts that other runs on the page read too


def gather(run: RunArtifacts) -> RunData:
    """Gather everything that is complete; missing artifacts are left out."""
    results = {item.round: _evaluation(item.evaluation) for item in run.rounds if item.evaluation}
    aligned = {item.round: _alignment(item.alignment) for item in run.rounds if item.alignment}
    last_alignment = aligned[max(aligned)] if aligned else None
    scored = [item for item in run.rounds if item.rollouts and item.scores]
    scores = [_scores(item.evaluation, item.round, run.seed) for item in run.rounds if item.evaluation]
    readable = (Path(run.tokenizer) / TOKENIZER).exists()
    teacher, student = _histograms(run.rounds)
    levels = sorted({result["settings"]["confidence"] for result in results.values()})
    return RunData(
        name=run.name,
        settings=run.settings,
        rounds=[_round(item, results.get(item.round), aligned.get(item.round)) for item in run.rounds],
        training=_training(run),
        teacher_entropy=teacher,
        student_entropy=student,
        bins=_bins(last_alignment) if last_alignment else {},
        read_with=_read_with(last_alignment) if last_alignment else {},
        routing=next((_routing(item) for item in reversed(run.rounds) if "route" in item.made), None),
        attribution=next(
            (_attribution(item) for item in reversed(run.rounds) if "attribution_summary" in item.made), None
        ),
        rollouts=[
            view
            for item in (scored[:1] + scored[1:][-1:] if readable else [])
            if item.rollouts and item.scores
            for view in rollout_views(item.rollouts, item.scores, item.round, run.tokenizer, run.judge)
        ],
        cost=_costs(run),
        threshold=run.tau,
        interval=f"{listed([f'{100 * level:g}' for level in levels])} % bootstrap over problems" if levels else "",
        gains=gains(scores[0], scores[-1], levels[-1]) if len(scores) > 1 else {},
        scores=scores,
        seed=run.seed,
        kin=run.kin,
        graders=sorted({name for result in results.values() for name in result.get("verifiers", ())}),
        head=_heads(run),
        warnings=_warnings(results),
        notes=[] if readable or not scored else [f"Rollouts are not shown: {run.tokenizer} has no {TOKENIZER}."],
    )


def summary_rows(data: RunData, k: int) -> list[dict[str, Any]]:
    """Return one row per round for ``summary.json``."""
    rows = []
    for item in data.rounds:
        passed = item.pass_at.get(k)
        row: dict[str, Any] = {"round": item.round}
        row[f"avg_at_{k}"] = item.value("avg") if item.samples == k else None
        row[f"pass_at_{k}"] = passed.value if passed else None
        row["problems"] = item.problems or None
        row |= {name: item.value(name) for name in (*FIRST_STEP, "distinct_correct", "truncation_rate")}
        if "signal" in item.figures:
            row["signal_auc"] = item.value("signal")
        rows.append(row)
    return rows


def _evaluation(artifact: Artifact) -> dict[str, Any]:
    """Read the results of an evaluation. Raises DamagedPart if the report cannot be made from them."""
    path = artifact.part_folder(artifact.parts - 1) / evaluations.RESULTS
    content: dict[str, Any] = read_json(path)
    with naming_misfits(str(path)):
        _round(RoundArtifacts(0, None), content, None)
        _warnings({0: content})
        f"{content['settings']['confidence']:g}, {listed(content.get('verifiers', ()))}"
    return content


def _alignment(artifact: Artifact) -> dict[str, Any]:
    """Read the results of an alignment. Raises DamagedPart if the report cannot be made from them."""
    path = artifact.part_folder(artifact.parts - 1) / analyses.ALIGNMENT_RESULTS
    content: dict[str, Any] = read_json(path)
    with naming_misfits(str(path)):
        _round(RoundArtifacts(0, None), None, content)
        _bins(content)
        _read_with(content)
    return content


def _routing(item: RoundArtifacts) -> RoutingData:
    """Read a routing. Raises DamagedPart if the report cannot be made from it."""
    folder = item.made["route"].part_folder(0)
    path = folder / analyses.ROUTING_RESULTS
    content: dict[str, Any] = read_json(path)
    points: dict[str, list[tuple[float, float]]] = {}
    for row in analyses.ROUTING_CHOICES.read(folder).to_pylist():
        if row["entropy"] is not None and row["roughness"] is not None:
            points.setdefault(row["oracle"] or "", []).append((row["entropy"], row["roughness"]))
    with naming_misfits(str(path)):
        policies, against = (
            {
                str(name): (
                    Estimate(float(one["accuracy"]), *(one["accuracy_interval"] or (None, None))),
                    Estimate(float(one["tokens"]), *(one["tokens_interval"] or (None, None))),
                )
                for name, one in content[group].items()
            }
            for group in ("policies", "against")
        )
        return RoutingData(item.round, int(content["problems"]), policies, against, points)


def _attribution(item: RoundArtifacts) -> AttributionData:
    """Read a table of bins. Raises DamagedPart if the report cannot be made from it."""
    path = item.made["attribution_summary"].part_folder(0) / analyses.ATTRIBUTION_RESULTS
    content: dict[str, Any] = read_json(path)
    with naming_misfits(str(path)):
        return AttributionData.of(item.round, content)


def _round(item: RoundArtifacts, results: Mapping[str, Any] | None, aligned: Mapping[str, Any] | None) -> RoundData:
    figures = _first_step(item) | _signal(item)
    for whose, figures_of in aligned["responses"].items() if aligned else ():
        prefix = "" if whose == OWN else "first_"
        for name, (tokens, figure) in HELD_OUT.items():
            group = figures_of[tokens]
            _add(figures, prefix + name, group[figure], group["intervals"].get(figure))
    if results is None:
        return RoundData(item.round, figures, measured=item.measured)
    by_benchmark = results["benchmarks"]
    benchmarks = {
        name: _evaluated(item.round, values, values["problems"], values["samples"], sum(_left_out(results, name)))
        for name, values in by_benchmark.items()
    }
    counts = sum(one["problems"] for one in by_benchmark.values()), max(one["samples"] for one in by_benchmark.values())
    mean = _evaluated(item.round, results["mean"], *counts, sum(_left_out(results)))
    return RoundData(
        item.round, figures | mean.figures, mean.pass_at, mean.problems, mean.samples, item.measured, benchmarks
    )


def _evaluated(round_: int, values: Mapping[str, Any], problems: int, samples: int, left_out: int) -> RoundData:
    """Return the figures of one benchmark, or of the mean over several."""
    figures: dict[str, Estimate] = {}
    _add(figures, "avg", values["avg_at_k"], values["avg_interval"])
    for name in EVALUATED:
        _add(figures, name, values.get(name), values.get(f"{name}_interval"))
    _add(figures, "response_length", values["response_tokens"]["mean"], values["response_tokens"].get("interval"))
    _add(figures, "left_out", left_out)
    passed: dict[int, Estimate] = {}
    for k, value in values["pass_at_k"].items():
        _add(passed, int(k), value, values["pass_interval"].get(k))
    return RoundData(round_, figures, passed, problems, samples)


def _add(figures: dict[Any, Estimate], name: Any, value: float | None, bounds: Sequence[float] | None = None) -> None:
    if value is not None:
        figures[name] = Estimate(value, *(bounds or (None, None)))


def _signal(item: RoundArtifacts) -> dict[str, Estimate]:
    """Return whether the teacher tells right from wrong responses, from the first parts that have verdicts."""
    verdicts = item.made.get("judge")
    if item.rollouts is None or not item.scores or verdicts is None:
        return {}
    cache = JointCache(item.scores)
    signal = verdict_signal(cache, item.rollouts, verdicts, islice(cache.parts(), SIGNAL_PARTS))
    return {} if signal.auc is None else {"signal": Estimate(signal.auc)}


def _first_step(item: RoundArtifacts) -> dict[str, Estimate]:
    if item.checkpoint is None:
        return {}
    steps = _steps(item.checkpoint)
    figures = {name: Estimate(float(steps[0][name])) for name in FIRST_STEP if name in steps[0]}
    return {**figures, "tokens": Estimate(int(sum(row["tokens"] for row in steps if row["epoch"] == 0)))}


def _steps(checkpoint: Artifact) -> list[dict[str, Any]]:
    """Read steps. Raises DamagedPart if the report cannot be made from them."""
    path = checkpoint.remaining_folder(0) / "metrics.jsonl"
    rows = read_whole(path)
    with naming_misfits(str(path)):
        _ = [float(rows[0][name]) for name in FIRST_STEP if name in rows[0]]
        for row in rows:
            if not all(isinstance(row[name], (int, float)) for name in ("round", "step", "epoch", "tokens")):
                raise TypeError("a step without its number")
    return rows


def _training(run: RunArtifacts) -> list[StepRow]:
    """Return steps from the checkpoints; their speed from the run's own file, if the step is in it."""
    speeds = {str((row.get("round"), row.get("step"))): row.get("tokens_per_s") for row in read_lines(run.metrics)}
    rows = []
    for item in run.rounds:
        for row in _steps(item.checkpoint) if item.checkpoint else ():
            row["tokens_per_s"] = speeds.get(str((row["round"], row["step"])))
            figures = {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, (int, float)) and name not in ("round", "step", "epoch")
            }
            rows.append(StepRow(row["round"], row["step"], figures))
    return rows


def _heads(run: RunArtifacts) -> str:
    """Describe which ids of the teacher's head the objective reads, over all rounds."""
    trained = [scores for item in run.rounds if item.checkpoint for scores in item.scores]
    return listed(sorted({_head(scores, run.settings["train"]["objective"]) for scores in trained}))


def _head(scores: Artifact, objective: Mapping[str, Any]) -> str:
    coverage = scores.identity.coverage or {}
    if "head" not in coverage:  # imported, of another kind of record
        return "not known"
    name = objective["name"]
    with naming_misfits(repr(scores)):
        rule = HeadRule(**coverage["head"])
    if name == "sft":
        most = 1
    elif objective["support"] == "sampled":
        most = rule.k_max  # draws stand for what the stored head leaves out
    else:
        most = min(objective["k"], rule.k_max)
    if most == 1:
        text = "the most probable id"
    elif rule.full_head_above < 0:
        text = f"the {most} most probable ids"
    else:
        text = f"ids of probability {rule.min_prob:g} and more, {most} at most and past {rule.full_head_above:g} nats"
    return f"{text}, as {name} reads it" if ":" in name else text


def _scores(evaluation: Artifact, round_: int, seed: int) -> ProblemScores:
    folder = evaluation.part_folder(evaluation.parts - 1)
    columns = ["benchmark", "problem_id", "correct", "samples"]
    table = evaluations.PROBLEMS.read(folder, columns).to_pylist()
    rows = sorted(table, key=lambda row: (row["benchmark"], row["problem_id"]))
    if any(not 0 <= row["correct"] <= row["samples"] or row["samples"] < 1 for row in rows):
        raise DamagedPart(f"{evaluation}: a problem has no samples, or more right ones than samples")
    inputs = evaluation.identity.inputs
    return ProblemScores(
        round=round_,
        names=[f"{row['benchmark']}/{row['problem_id']}" for row in rows],
        benchmarks=[row["benchmark"] for row in rows],
        samples=max((row["samples"] for row in rows), default=0),
        seeds=[seed],
        correct=[[row["correct"] for row in rows]],
        sources={key.removeprefix(_BENCHMARK): inputs[key] for key in inputs if key.startswith(_BENCHMARK)},
    )


def _histograms(rounds: Sequence[RoundArtifacts]) -> tuple[Histogram | None, Histogram | None]:
    """Return entropy histograms of teacher and student on the tokens of the last round that has both, else of one that
    has either."""
    either = [item for item in rounds if item.scores or item.round_start]
    both = [item for item in either if item.scores and item.round_start]
    if not either:
        return None, None
    return _teacher_histogram((both or either)[-1].scores), _student_histogram((both or either)[-1].round_start)


def _teacher_histogram(scores: tuple[Artifact, ...]) -> Histogram | None:
    if not scores:
        return None
    cache = JointCache(scores)
    return _histogram([cache.read_part(part).entropy for part in cache.parts()])


def _student_histogram(path: Path | None) -> Histogram | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if path is None:
        return None
    try:
        with naming_misfits(str(path)):
            return _histogram([load_file(path)["entropy"]])
    except SafetensorError as error:
        raise DamagedPart(f"{path} cannot be read: {error}") from error


def _histogram(parts: Sequence[np.ndarray[Any, Any]]) -> Histogram | None:
    """Count entropies in a histogram; None without any token."""
    values = np.concatenate(parts) if parts else np.zeros(0)
    if not values.size:
        return None
    edges = ENTROPY_EDGES if values.max() < ENTROPY_EDGES[-1] else [*ENTROPY_EDGES, ENTROPY_END]
    counts, _ = np.histogram(np.clip(values, 0.0, ENTROPY_END - 0.1), edges)
    return Histogram(list(edges), counts.tolist())


def _bins(aligned: Mapping[str, Any]) -> dict[str, dict[str, BinnedMeans]]:
    return {
        whose: {
            name: BinnedMeans(
                list(response["edges"]),
                [
                    Estimate(row[name], *(row["intervals"].get(name) or (None, None))) if row["tokens"] else None
                    for row in response["bins"]
                ],
            )
            for name in BINNED
        }
        for whose, response in aligned["responses"].items()
        if whose in (OWN, FIRST)
    }


def _read_with(aligned: Mapping[str, Any]) -> dict[str, str]:
    settings = aligned["settings"]
    options = {
        f"evaluate.alignment.{name}": json.dumps(settings[name])
        for name in ("tau", "temperature", "merge_stops", "limit")
    }
    options["evaluate.alignment.responses"] = listed(sorted(aligned["responses"]))
    options["score.teacher_prompt"] = json.dumps(aligned["teacher_prompt"], sort_keys=True)
    options["the teacher"] = aligned["teacher"]["fingerprint"][:12]
    if FIRST in aligned["responses"]:
        options["the fixed set"] = aligned["artifact"]["inputs"].get("first evaluation", "")[:12]
    return options


def _warnings(results: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """List problems that spoil the figures of some rounds."""
    ungraded, missing, too_long, unread = [], [], [], []
    for number, result in sorted(results.items()):
        benchmarks = result["benchmarks"].values()
        answers = sum(one["problems"] * one["samples"] for one in benchmarks)
        gave_up = sum(one["ungraded"] for one in benchmarks)
        set_aside, skipped = _left_out(result)
        if gave_up:
            ungraded.append(f"{gave_up} of {answers} answers in round {number}")
        if set_aside:
            missing.append(f"{set_aside} in round {number}")
        if skipped:
            too_long.append(f"{skipped} in round {number}")
        unread += [f"{name} in round {number}" for name, one in result["benchmarks"].items() if not one["problems"]]
    graders = sorted({tuple(result.get("verifiers", ())) for result in results.values()})
    texts = {
        "The grader gave up, which counts as wrong": ungraded,
        "Problems are missing because their parts failed; figures are of the others": missing,
        "Problems with too long prompts are left out": too_long,
        "Benchmarks without a single problem": unread,
        "Rounds were graded by different verifiers": [listed(names) or "not recorded" for names in graders[:6]],
    }
    texts["Rounds were graded by different verifiers"] *= len(graders) > 1
    return [f"{text}: {_first_few(items)}." for text, items in texts.items() if items]


def _first_few(items: Sequence[str], most: int = 6) -> str:
    more = len(items) - most
    return listed([*items[:most], f"{more} more"]) if more > 0 else listed(items)


def _left_out(results: Mapping[str, Any], benchmark: str | None = None) -> tuple[int, int]:
    """Count problems of failed parts and those with too long prompts, of one benchmark or of all (None)."""
    aside = [rows for rows in results.get("left_out", ()) if benchmark in (None, rows["benchmark"])]
    skipped = [result["skipped"] for name, result in results["benchmarks"].items() if benchmark in (None, name)]
    return sum(rows["stop"] - rows["start"] for rows in aside), sum(map(len, skipped))


def _costs(run: RunArtifacts) -> list[CostRow]:
    """Return one row per job. Its time is that of all runs on the page that did parts of it; a job that this run found
    complete, or that others on the page read too, is shared."""
    own, elsewhere = seconds_by_key(run.jobs), seconds_by_key(*run.elsewhere)
    rows = []
    for item in run.rounds:
        for stage, artifact in item.made.items():
            read = sum(row["tokens"] for row in _steps(artifact)) if artifact.kind == CHECKPOINTS else None
            took = [log[artifact.key] for log in (own, elsewhere) if artifact.key in log]
            markers = [artifact.remains(part) for part in range(artifact.parts)]
            counted = [int(marker.info["tokens"]) for marker in markers if "tokens" in marker.info]
            rows.append(
                CostRow(
                    stage,
                    item.round,
                    sum(took) if took else None,
                    tokens=read if read is not None else sum(counted) if counted else None,
                    bytes=sum(marker.committed_bytes for marker in markers),
                    shared=artifact.key not in own or artifact.key in run.also_read,
                    key=artifact.key,
                )
            )
    return rows


def seconds_by_key(*logs: Path) -> dict[str, float]:
    """Return seconds spent on each artifact, by key, from the ``jobs.jsonl`` of runs."""
    seconds: dict[str, float] = {}
    for log in logs:
        for row in read_lines(log):
            key, took = row.get("key"), row.get("seconds")
            if isinstance(key, str) and isinstance(took, (int, float)):
                seconds[key] = seconds.get(key, 0.0) + took
    return seconds
