"""Made-up report data for the tests of the report stage. Nothing here was measured by anything."""

from __future__ import annotations

import math
import random

from eopd.stages.report.data import (
    OWN,
    BinnedMeans,
    CostRow,
    Estimate,
    Histogram,
    ProblemScores,
    ReportData,
    RolloutView,
    RoundData,
    RunData,
    StepRow,
)

EDGES = [round(0.1 * step, 1) for step in range(31)]


def round_data(number: int, avg: float, rng: random.Random) -> RoundData:
    def near(value: float, spread: float) -> Estimate:
        value += rng.uniform(-0.005, 0.005)
        return Estimate(value, max(value - spread, 0.0), value + spread)

    left = math.exp(-number / 3)
    figures = {
        "avg": Estimate(avg, avg - 0.022, avg + 0.022),
        "distinct_correct": near(1.8 - 0.6 * left, 0.1),
        "truncation_rate": near(0.05 * left + 0.01, 0.004),
        "response_length": near(25.4, 1.0),
        "ungraded": Estimate(0),
        "left_out": Estimate(0),
        "student_entropy": near(0.32 + 0.2 * left, 0.0),
        "teacher_entropy": near(0.3, 0.0),
        "gate_fraction": near(0.12 + 0.04 * left, 0.0),
        "rkl": near(0.05 + 0.4 * left, 0.0),
        "tokens": Estimate(51_200 + rng.randrange(4000)),
        "held_out_fkl": near(0.08 + 0.5 * left, 0.03),
        "held_out_student_above": near(0.17 + 0.03 * left, 0.01),
        "held_out_teacher_above": near(0.16, 0.0),
    }
    passed = {k: 1 - (1 - avg) ** (k**0.78) for k in range(1, 9)}
    bounds = {k: Estimate(value, value - 0.03, min(value + 0.03, 1.0)) for k, value in passed.items()}
    return RoundData(number, figures, bounds, problems=200, samples=8)


def training_rows(seed: int, rounds: int = 5, steps: int = 64) -> list[StepRow]:
    rng = random.Random(seed)
    rows = []
    for step in range(rounds * steps):
        level = math.exp(-1.6 * step / (rounds * steps))
        values = {"loss": 0.7, "rkl": 0.42, "gate_fraction": 0.14, "student_entropy": 0.4, "teacher_entropy": 0.3}
        figures = {name: value * level * rng.uniform(0.9, 1.1) for name, value in values.items()}
        figures |= {"retained_mass": 0.994, "tokens_per_s": 21_000 + rng.gauss(0, 900), "clip_fraction": 0.08 * level}
        rows.append(StepRow(step // steps, step % steps, figures))
    return rows


def histogram(seed: int, scale: float) -> Histogram:
    rng = random.Random(seed)
    return Histogram(EDGES, [int(40_000 * math.exp(-edge / scale) * rng.uniform(0.8, 1.2)) for edge in EDGES[:-1]])


def rollout(seed: int, tokens: int = 40, prompt: str = "") -> RolloutView:
    rng = random.Random(seed)
    words = ["24", " = ", "(", "3", " + ", "5", ")", " * ", "\n", "8", " then ", "<b>"]
    prompt = prompt or f"Reach 24 from 3, 5, 8 and {seed % 5 + 1}."
    return RolloutView(
        prompt=prompt,
        key=prompt,
        tokens=[rng.choice(words) for _ in range(tokens)],
        entropy=[rng.expovariate(2.2) for _ in range(tokens)],
        logprobs=[-rng.expovariate(1.5) for _ in range(tokens)],
        correct=rng.random() < 0.5,
        truncated=seed % 4 == 0,
        round=5,
    )


def cost_rows(rounds: int = 5, shared: bool = False) -> list[CostRow]:
    rows = [CostRow("evaluate", 0, 6.1, 52_000, 310_000, shared)]
    for number in range(rounds):
        first = shared and number == 0
        rows += [
            CostRow("rollout", number, 7.9, 52_300, 1_300_000, first),
            CostRow("score", number, 3.4, 52_300, 8_900_000, first),
            CostRow("train", number, 19.2, 209_200, 3_400_000),
        ]
    return rows


def problem_scores(seed: int, gain: float, problems: int = 200, seeds: int = 1, round_: int = 5) -> ProblemScores:
    """Hard and easy problems that every run shares, so that pairing pays."""
    ease = [random.Random(number).betavariate(0.5, 0.8) for number in range(problems)]
    correct = []
    for one in range(seeds):
        rng = random.Random(f"{seed} {one}")
        correct.append([sum(rng.random() < min(p + gain / 4, 1.0) for _ in range(8)) for p in ease])
    names = [f"made up/{number}" for number in range(problems)]
    return ProblemScores(round_, names, ["made up"] * problems, 8, list(range(seeds)), correct)


def made_up_run(name: str = "quickstart", seed: int = 1, gain: float = 0.24, shared: bool = False) -> RunData:
    rng = random.Random(seed)
    means = [Estimate(0.02 + 0.15 * edge**1.5, 0.01, 1.0) for edge in EDGES[::3][:-2]]
    return RunData(
        name=name,
        settings={"rounds": 5, "train": {"objective": name, "lr": 5e-4}, "rollout": {"temperature": 1.0}},
        rounds=[round_data(number, 0.22 + gain * (1 - math.exp(-number / 2)), rng) for number in range(6)],
        training=training_rows(seed),
        teacher_entropy=histogram(seed, 0.45),
        student_entropy=histogram(seed + 50, 0.6),
        bins={OWN: {"fkl": BinnedMeans(EDGES[::3], [*means, None])}},
        rollouts=[rollout(100 * seed + index, 30 + 7 * (index % 5)) for index in range(12)],
        cost=cost_rows(shared=shared),
        read_with={"evaluate.alignment.tau": "0.8", "the teacher": "made up"},
        threshold=0.8,
        scores=[problem_scores(seed, 0.0, round_=0), problem_scores(seed, gain)],
        seed=seed,
        interval="95 % bootstrap over problems",
        gains={"avg": Estimate(gain, gain - 0.025, gain + 0.025), "pass": Estimate(0.1, -0.02, 0.22)},
        graders=["exact 1"],
        head="the 16 most probable ids",
    )


def made_up_report(runs: int = 1) -> ReportData:
    names = ["eopd", "opd", "fkl", "jsd", "tropd", "lightning"]
    chosen = [
        made_up_run(names[index % 6] + ("" if index < 6 else f"-{index}"), index + 1, 0.24 - 0.03 * index, runs > 1)
        for index in range(runs)
    ]
    return ReportData("Countdown with made-up numbers", "1 January 2001, 00:00", chosen)
