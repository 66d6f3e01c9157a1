"""The route job: a mode for every response by the entropies of its probe, and what that is worth. Imports no torch.

Accuracy and tokens are means over the problems that no rule was fitted to; every problem counts the same. Letters:
P problems, S samples, M modes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eopd.stages.engines.sampling import derive_seed
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.intervals import bootstrap
from eopd.stages.job import Progress
from eopd.stages.route.settings import SHORTEST, RuleSettings
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError
from eopd.storage.sources import filled_parts

RESULTS_VERSION = 1
COLUMNS = ("benchmark", "problem_id", "sample", "correct", "response_token_ids")
Name = tuple[str, str, int]  # benchmark, problem, sample


@dataclass(frozen=True)
class RouteJob:
    """Routing of complete evaluations, in one part."""

    output: Artifact
    evaluations: Mapping[str, Artifact]  # by mode, `standard` first
    entropies: Artifact  # of the standard samples
    settings: EvaluateSettings  # with ``route``
    seed: int
    progress: Progress


@dataclass(frozen=True)
class Routed:
    """Responses in every mode, and the mode chosen for each."""

    modes: list[str]
    right: Floats  # [P, S, M]
    tokens: Floats  # [P, S, M] of the response alone
    probe: Floats  # [P, S] tokens of the probe
    choice: NDArray[np.int64]  # [P, S]

    @property
    def with_probe(self) -> Floats:
        """Tokens of each mode when it is routed to: a probe that another mode does not continue is paid for."""
        cost = self.tokens + self.probe[..., None]
        cost[..., 0] = self.tokens[..., 0]
        return np.asarray(cost)

    def part(self, problems: NDArray[np.bool_]) -> Routed:
        right, tokens, probe = (array[problems] for array in (self.right, self.tokens, self.probe))
        return Routed(self.modes, right, tokens, probe, self.choice[problems])


def run(job: RouteJob) -> None:
    """Route every response and commit the table.

    Raises:
        ValueError: fewer than twice as many problems were answered in all modes as are to calibrate the rule.
    """
    for _ in claimed_parts(job.output, [0], job.progress.line):
        _write(job)


def _write(job: RouteJob) -> None:
    settings, route = job.settings, job.settings.route
    assert route is not None
    names, data, described, left_out = _read(job)
    problems, samples = data.choice.shape
    calibration = np.zeros(problems, dtype=bool)
    if route.rule is None:
        route.check_calibration(problems)
        drawn = sorted(range(problems), key=lambda p: derive_seed(job.seed, "calibration", *names[p][0][:2]))
        calibration[drawn[: route.calibration]] = True
        flat = [array[calibration].reshape(-1, len(data.modes)) for array in (data.right, data.with_probe)]
        rule = fit(described[calibration].reshape(-1, 3), flat[0], flat[1], data.modes)
    else:
        rule = route.rule
    data.choice[:] = routed(described.reshape(-1, 3), rule, data.modes).reshape(problems, samples)
    results = {
        "record": "routing_results",
        "version": RESULTS_VERSION,
        "problems": int((~calibration).sum()),
        "calibration": int(calibration.sum()),
        "samples": samples,
        "left_out": left_out,  # problems that are not answered in every mode
        "too_short": int(np.isnan(described[~calibration][..., 0]).sum()),  # responses whose probe has no descriptors
        "rule": rule.model_dump(mode="json"),
        **table(data.part(~calibration), resamples=settings.resamples, confidence=settings.confidence),
        "settings": route.model_dump(mode="json"),
        "confidence": settings.confidence,
        "artifact": {"key": job.output.key, "inputs": dict(job.output.identity.inputs)},
    }
    best = _oracle(data)
    solved = data.right.max(axis=-1) > 0
    rows = [
        {
            **dict(zip(("benchmark", "problem_id", "sample"), name, strict=True)),
            "calibration": bool(calibration[p]),
            "mode": data.modes[data.choice[p, s]],
            "oracle": data.modes[best[p, s]] if solved[p, s] else None,
            **dict(zip(("entropy", "trend", "roughness"), _known(described[p, s]), strict=True)),
        }
        for p, of_problem in enumerate(names)
        for s, name in enumerate(of_problem)
    ]
    with job.output.write_part(0, info={"responses": len(rows)}) as folder:
        analyses.ROUTING_CHOICES.write(folder, rows)
        (folder / analyses.ROUTING_RESULTS).write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False))
    router, difference = results["policies"]["router"], results["against"]["random"]
    job.progress.line(
        f"route: accuracy {router['accuracy']:.3f} with {router['tokens']:.1f} tokens, {difference['accuracy']:+.3f} "
        "against a random router of the same proportions"
    )


def table(data: Routed, *, resamples: int, confidence: float) -> dict[str, Any]:
    """Return accuracy and tokens of every policy, the router against each, and the shares of the modes.

    ``random`` sends problems to modes in the router's proportions without looking at them, so it needs no probe; its
    figures are expectations, not draws.
    """
    count = len(data.modes)
    chosen = np.eye(count)[data.choice]  # [P, S, M]
    shares = chosen.mean(axis=(0, 1))
    perfect = np.eye(count)[_oracle(data)]
    picks = {
        **{name: np.broadcast_to(np.eye(count)[mode], chosen.shape) for mode, name in enumerate(data.modes)},
        "random": np.broadcast_to(shares, chosen.shape),
        "oracle": perfect,
        "router": chosen,
    }
    values = {  # name -> [P, 2] accuracy and tokens
        name: _by_problem(data, pick, data.with_probe if name == "router" else data.tokens)
        for name, pick in picks.items()
    }

    def figures(rows: Floats, low: float) -> dict[str, Any]:
        means = rows.mean(axis=0)
        accuracy, tokens = (
            bootstrap(column[:, None], bounds=bounds, resamples=resamples, confidence=confidence)[0]
            for column, bounds in zip(rows.T, ((low, 1.0), None), strict=True)
        )
        return {
            "accuracy": float(means[0]),
            "accuracy_interval": None if accuracy is None else [accuracy.low, accuracy.high],
            "tokens": float(means[1]),
            "tokens_interval": None if tokens is None else [tokens.low, tokens.high],
        }

    against = {name: values["router"] - rows for name, rows in values.items() if name != "router"}
    # the proportions are those of these problems and vary with them: the difference is a covariance
    centred = chosen - shares
    gain, cost = (np.asarray(rows - rows.mean(axis=(0, 1))) for rows in (data.right, data.tokens))
    paid = (data.with_probe - data.tokens) * chosen
    against["random"] = np.stack([(centred * gain).sum(-1).mean(-1), (centred * cost + paid).sum(-1).mean(-1)], axis=-1)
    return {
        "policies": {name: figures(rows, 0.0) for name, rows in values.items()},
        "against": {name: figures(rows, -1.0) for name, rows in against.items()},
        "shares": dict(zip(data.modes, shares.tolist(), strict=True)),
    }


def _by_problem(data: Routed, pick: Floats, tokens: Floats) -> Floats:
    return np.stack([(pick * rows).sum(axis=-1).mean(axis=-1) for rows in (data.right, tokens)], axis=-1)


def _oracle(data: Routed) -> NDArray[np.int64]:
    """Return the right mode with the fewest tokens [P, S]; where none is right, the mode with the fewest."""
    most = data.tokens.max() + 1.0
    return np.asarray(np.argmin(data.tokens + np.where(data.right > 0, 0.0, most), axis=-1))


def _read(job: RouteJob) -> tuple[list[list[Name]], Routed, Floats, int]:
    """Return the responses of the problems that every mode answered, their descriptors [P, S, 3], and the count of
    other problems."""
    modes = list(job.evaluations)
    by_mode = [_samples(evaluation) for evaluation in job.evaluations.values()]
    probes = {
        _name(row): row["entropy"]
        for part in filled_parts(job.entropies)
        for row in analyses.ENTROPIES.read(job.entropies.part_folder(part)).to_pylist()
    }
    everything = {name[:2] for samples in by_mode for name in samples}
    answered: dict[tuple[str, str], list[Name]] = {}
    for name in sorted(set(probes).intersection(*by_mode)):
        answered.setdefault(name[:2], []).append(name)
    names = [of_problem for of_problem in answered.values() if len(of_problem) == job.settings.samples]
    if not names:
        raise InputError(
            "evaluate.route: no problem was answered in every mode",
            setting="evaluate.route",
            remedy="`eopd store verify --repair` re-queues parts that were set aside, and "
            "evaluate.max_prompt_tokens says which prompts are too long",
        )
    both = np.array([[[samples[name] for samples in by_mode] for name in group] for group in names], dtype=np.float64)
    probe = np.array([[len(probes[name]) for name in group] for group in names], dtype=np.float64)
    described = np.array([[descriptors(probes[name]) or (np.nan,) * 3 for name in group] for group in names])
    data = Routed(modes, both[..., 0], both[..., 1], probe, np.zeros(probe.shape, dtype=np.int64))
    return names, data, described, len(everything) - len(names)


def _samples(evaluation: Artifact) -> dict[Name, tuple[bool, int]]:
    """Return the verdict and the tokens of every response."""
    return {
        _name(row): (row["correct"], len(row["response_token_ids"]))
        for part in filled_parts(evaluation)
        for row in evaluations.SAMPLES.read(evaluation.part_folder(part), COLUMNS).to_pylist()
    }


def _name(row: Mapping[str, Any]) -> Name:
    return row["benchmark"], row["problem_id"], row["sample"]


def _known(values: Floats) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


# -- the router -------------------------------------------------------------------------------------------------------

# Descriptors of a probe's entropies, and the rule that chooses a mode by them. Imports no torch.
#
# Letters: R responses, M modes, N tokens of a probe.


Floats = NDArray[np.float64]
GRID = 10
"""Shares of the calibration responses, in tenths, at which thresholds are tried."""


def descriptors(entropy: Sequence[float]) -> tuple[float, float, float] | None:
    """Return sum, trend and roughness of a probe's entropies H_1 .. H_N; None if N < 3.

    The trend is Spearman's rank correlation of i and H_i; the roughness is the von Neumann ratio
    sum (H_{i+1} - H_i)^2 / sum (H_i - mean H)^2. Both are 0 if all entropies are equal.
    """
    values = np.asarray(entropy, dtype=np.float64)
    if len(values) < SHORTEST:
        return None
    spread = float(((values - values.mean()) ** 2).sum())
    if not np.ptp(values) or not spread:
        return float(values.sum()), 0.0, 0.0
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # ties share their mean rank
    trend = float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])
    return float(values.sum()), trend, float((np.diff(values) ** 2).sum()) / spread


def regions(described: Floats, entropy: float, trend: float, roughness: float) -> NDArray[np.int64]:
    """Return the place of each response of ``described`` [R, 3] among ``RuleSettings.modes``.

    A response without descriptors has NaN, and the place after the last.
    """
    sums, trends, ratios = described.T
    rest = np.where((trends > trend) | (ratios > roughness), 1, 2)
    return np.where(np.isnan(sums), 3, np.where(sums < entropy, 0, rest))


def routed(described: Floats, rule: RuleSettings, modes: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the mode of each response; the first mode where the probe is too short."""
    bounds = -math.inf if rule.entropy is None else rule.entropy, *map(_above, (rule.trend, rule.roughness))
    chosen = np.array([*map(modes.index, rule.modes), 0])
    return np.asarray(chosen[regions(described, *bounds)])


def fit(described: Floats, right: Floats, tokens: Floats, modes: Sequence[str]) -> RuleSettings:
    """Return the rule that is right most often on these responses, and among equals takes the fewest tokens.

    Thresholds are tried at every tenth of the responses' own descriptors, each also as never reached; each region gets
    the mode that does best in it.

    Args:
        right, tokens: [R, M] of each response in each mode; tokens with those of the probe.
    """
    known = described[~np.isnan(described[:, 0])]
    grids = [_grid(column) for column in known.T]
    best: tuple[float, float] = (-math.inf, -math.inf)
    rule = RuleSettings()
    for low, trend, rough in itertools.product(*grids):
        places = regions(described, -math.inf if low is None else low, _above(trend), _above(rough))
        member = np.stack([places == place for place in range(3)]).astype(np.float64)  # [3, R]
        hits, cost = member @ right, member @ tokens  # [3, M]
        order = [max(range(len(modes)), key=lambda mode: (hits[place, mode], -cost[place, mode])) for place in range(3)]
        value = sum(hits[place, mode] for place, mode in enumerate(order))
        spent = sum(cost[place, mode] for place, mode in enumerate(order))
        if (value, -spent) > best:
            best = (value, -spent)
            certain, unsettled, otherwise = (modes[mode] for mode in order)
            rule = RuleSettings(
                entropy=low, trend=trend, roughness=rough, certain=certain, unsettled=unsettled, otherwise=otherwise
            )
    return rule


def _above(threshold: float | None) -> float:
    return math.inf if threshold is None else threshold


def _grid(values: Floats) -> list[float | None]:
    shares = np.arange(1, GRID) / GRID
    return [None, *(sorted({float(value) for value in np.quantile(values, shares)}) if len(values) else [])]
