"""Made-up report data for the tests of the report stage. Nothing here was measured by anything."""

from __future__ import annotations

import math
import random

from eopd.stages.report.data import (
    FORWARD_KL,
    BinnedMean,
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


def made_up_binned() -> BinnedMean:
    """The last bin is empty."""
    means = [0.02 + 0.15 * edge**1.5 for edge in EDGES[::3][:-2]]
    intervals = [(0.9 * mean, 1.15 * mean) for mean in means]
    return BinnedMean(EDGES[::3], [*means, None], intervals=[*intervals, None])


def made_up_rounds(seed: int, rounds: int = 6, gain: float = 0.24, start: float = 0.221) -> list[RoundData]:
    rng = random.Random(seed)
    found = []
    for number in range(rounds):
        reach = 1 - math.exp(-number / 2)
        avg = start + gain * reach + rng.uniform(-0.008, 0.008)
        ks = {k: 1 - (1 - avg) ** (k**0.78) for k in range(1, 9)}
        found.append(
            RoundData(
                round=number,
                avg_at_k={8: avg},
                pass_at_k=ks,
                avg_interval={8: (avg - 0.022, avg + 0.022)},
                pass_interval={k: (value - 0.03, min(value + 0.03, 1.0)) for k, value in ks.items()},
                student_entropy=0.52 - 0.2 * reach + rng.uniform(-0.01, 0.01),
                teacher_entropy=None if number == 0 else 0.34 - 0.06 * reach,
                gate_fraction=None if number == 0 else 0.152 - 0.04 * reach,
                rkl=None if number == 0 else 0.44 * math.exp(-number / 3) + 0.05,
                fkl=None if number == 0 else 0.61 * math.exp(-number / 4) + 0.09,
                tokens=None if number == 0 else 51_200 + rng.randrange(4000),
                truncation_rate=0.04 * math.exp(-number / 2),
                response_length=25.4 + rng.uniform(-1, 1),
                distinct_correct=1.28 + 0.6 * reach,
                stop_rate=1 - 0.04 * math.exp(-number / 2),
                self_bleu=0.3 + 0.2 * reach,
                distinct_4=0.6 - 0.2 * reach,
                token_entropy=0.6 - 0.25 * reach,
                ungraded=0,
                left_out=0,
                held_out_entropy=0.5 - 0.15 * reach,
                held_out_teacher_entropy=0.33,
                held_out_fkl=0.55 * math.exp(-number / 4) + 0.08,
                held_out_rkl=0.4 * math.exp(-number / 3) + 0.05,
                uncertain_fkl=0.9 * math.exp(-number / 5) + 0.2,
                agreement=0.7 + 0.15 * reach,
                student_above=0.2 - 0.03 * reach,
                teacher_above=0.16,
                intervals={"uncertain_fkl": (0.9 * math.exp(-number / 5) + 0.15, 0.9 * math.exp(-number / 5) + 0.25)},
            )
        )
    return found


def made_up_training(seed: int, rounds: int = 5, steps: int = 64) -> list[StepRow]:
    rng = random.Random(seed)
    rows = []
    for step in range(rounds * steps):
        decay = math.exp(-step / (rounds * steps) * 1.6)
        rows.append(
            StepRow(
                round=1 + step // steps,
                step=step % steps,
                loss=0.7 * decay + rng.gauss(0, 0.03),
                rkl=0.42 * decay + rng.gauss(0, 0.02),
                fkl=0.6 * decay + rng.gauss(0, 0.03),
                gate_fraction=min(max(0.14 * decay + 0.03 + rng.gauss(0, 0.008), 0), 1),
                teacher_entropy=0.3 * decay + 0.05 + rng.gauss(0, 0.01),
                student_entropy=0.4 * decay + 0.08 + rng.gauss(0, 0.01),
                retained_mass=0.994 + rng.gauss(0, 0.001),
                grad_norm=abs(1.1 * decay + rng.gauss(0, 0.1)),
                tokens_per_s=21_000 + rng.gauss(0, 900),
                further={"clip_fraction": abs(0.08 * decay + rng.gauss(0, 0.005))},
            )
        )
    return rows


def made_up_histogram(seed: int, scale: float) -> Histogram:
    rng = random.Random(seed)
    counts = [int(40_000 * math.exp(-edge / scale) * rng.uniform(0.8, 1.2)) for edge in EDGES[:-1]]
    counts[0] *= 6
    return Histogram(EDGES, counts)


def made_up_rollout(seed: int, tokens: int = 40, prompt: str = "") -> RolloutView:
    rng = random.Random(seed)
    words = ["24", " = ", "(", "3", " + ", "5", ")", " * ", "3", "\n", "8", " - ", "7", " then ", "<b>", "1"]
    chosen = [rng.choice(words) for _ in range(tokens)]
    entropy: list[float | None] = [rng.expovariate(2.2) if rng.random() < 0.35 else rng.random() * 0.05 for _ in chosen]
    return RolloutView(
        prompt=prompt or f"Reach 24 from 3, 5, 8 and {seed % 5 + 1}.",
        tokens=[*chosen, "<|im_end|>"],
        entropy=[*entropy, 0.001],
        logprobs=[-rng.expovariate(1.5) for _ in range(tokens + 1)],
        correct=rng.random() < 0.5,
        round=5,
    )


def made_up_cost(rounds: int = 5, shared: bool = False) -> list[CostRow]:
    rows = [CostRow("evaluate", 0, 6.1, 52_000, 310_000, shared)]
    for number in range(1, rounds + 1):
        first = shared and number == 1
        rows += [
            CostRow("rollout", number, 7.9, 52_300, 1_300_000, first),
            CostRow("score", number, 3.4, 52_300, 8_900_000, first),
            CostRow("train", number, 19.2, 209_200, 3_400_000),
            CostRow("evaluate", number, 6.3, 51_700, 310_000),
        ]
    return rows


def made_up_scores(seed: int, gain: float, problems: int = 200, seeds: int = 1, round_: int = 5) -> ProblemScores:
    """Hard and easy problems that every run shares, so that pairing pays."""
    ease = [random.Random(number).betavariate(0.5, 0.8) for number in range(problems)]
    correct = []
    for one in range(seeds):
        rng = random.Random(f"{seed} {one}")
        correct.append([sum(rng.random() < min(p + gain / 4, 1.0) for _ in range(8)) for p in ease])
    names = [f"made up/{number}" for number in range(problems)]
    return ProblemScores(round_, names, ["made up"] * problems, 8, list(range(seeds)), correct)


def made_up_run(name: str = "quickstart", seed: int = 1, gain: float = 0.24, shared: bool = False) -> RunData:
    rounds = made_up_rounds(seed, gain=gain)
    gained = rounds[-1].avg_at_k[8] - rounds[0].avg_at_k[8]
    return RunData(
        name=name,
        settings={
            "rounds": 5,
            "train": {"objective": name, "lr": 5e-4, "tau": 0.8 + 0.1 * seed},
            "rollout": {"samples_per_prompt": 4, "temperature": 1.0},
        },
        rounds=rounds,
        training=made_up_training(seed),
        entropy_histogram_teacher=made_up_histogram(seed, 0.45),
        entropy_histogram_student=made_up_histogram(seed + 50, 0.6),
        by_entropy_bin={
            FORWARD_KL: made_up_binned(),
            "Top-1 agreement": BinnedMean(EDGES[::3], [0.97 - 0.2 * edge for edge in EDGES[::3][:-1]]),
        },
        rollouts=[made_up_rollout(seed * 100 + index, 30 + 7 * (index % 5)) for index in range(12)],
        cost=made_up_cost(shared=shared),
        read_with={"evaluate.alignment.tau": "0.8", "the teacher": "made up"},
        threshold=0.8,
        scores=[made_up_scores(seed, 0.0, round_=0), made_up_scores(seed, gain)],
        seed=seed,
        interval="95 % bootstrap over problems",
        avg_gain=Estimate(gained, gained - 0.025, gained + 0.025) if seed == 1 else None,
    )


def made_up_report(runs: int = 1) -> ReportData:
    names = ["eopd", "opd", "fkl", "jsd", "tropd", "lightning"]
    chosen = [
        made_up_run(names[index % 6] + ("" if index < 6 else f"-{index}"), index + 1, 0.24 - 0.03 * index, runs > 1)
        for index in range(runs)
    ]
    title = "Countdown with made-up numbers" if runs == 1 else f"{runs} objectives on made-up numbers"
    return ReportData(title=title, generated="1 January 2001, 00:00", runs=chosen)
