"""Train each example of this folder beside its control, with several seeds, and print paired differences.

    python -m examples.sources [--only best_of_n] [--seeds 3] [--out sources]

Resumable: everything is kept in ``--out``. Runs share what they can (one teacher's answers, one scoring).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eopd.stages.intervals import t_interval

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Variant:
    """A run of an example."""

    name: str
    changes: dict[str, Any]


WITH_SOLUTIONS = ("offline_data", "mixsd", "opsd", "two_teachers")
"""Examples whose prompts come with a solution, and with the name of a teacher."""

EXPERT = {"path": str(HERE.parent / "countdown" / "teacher")}

EXAMPLES: dict[str, tuple[Variant, ...]] = {  # the first of each is the example, the others are its controls
    "offline_data": (
        Variant("data, forward KL", {}),
        Variant("data, sft", {"train": {"objective": {"name": "sft"}}}),
        Variant("student, forward KL", {"rollout": {"source": "student"}}),
    ),
    "best_of_n": (
        Variant("first right of 8", {}),
        Variant("first of 8, right or wrong", {"train": {"select": {"verdict": "any", "per_prompt": "first"}}}),
    ),
    "guidance": (
        Variant("tropd, guided", {}),
        Variant("tropd", {"rollout": {"source": "student"}}),
        Variant("opd, guided", {"train": {"objective": {"name": "opd"}}}),
        Variant("opd", {"rollout": {"source": "student"}, "train": {"objective": {"name": "opd"}}}),
    ),
    "two_teachers": (
        Variant("expert and initial student", {}),
        Variant("expert for every prompt", {"teachers": {"expert": EXPERT, "self": EXPERT}}),
        Variant("the expert's prompts alone", {"train": {"select": {"where": {"teacher": ["expert"]}}}}),
    ),
    "opsd": (
        Variant("shown its solution", {}),
        Variant("shown another's solution", {"score": {"teacher_prompt": {"shuffled": True}}}),
    ),
    "sd_zero": (
        Variant("told its verdict", {}),
        Variant("told another's verdict", {"score": {"teacher_prompt": {"shuffled": True}}}),
        Variant("rejection fine-tuning", {"train": {"objective": {"name": "sft"}, "select": {"verdict": "right"}}}),
    ),
    "mixsd": (
        Variant("mixed, half and half", {}),
        Variant(
            "plain prompt alone (rejection fine-tuning)",
            {"rollout": {"mixed": {"student_share": 1.0, "temperature": 1.0}}},
        ),
    ),
}
FIGURES = ("avg_at_8", "pass_at_8")


def runs(example: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Entries of a sweep, whose runs are called EXAMPLE-NUMBER-SEED."""
    for number, variant in enumerate(EXAMPLES[example]):
        for seed in range(seeds):
            yield {"name": f"{number}-{seed}", "seed": seed, **variant.changes}


def train(example: str, seeds: int, out: Path, changes: list[str]) -> None:
    """Do all runs of an example."""
    sweep = out / f"{example}.yaml"
    sweep.write_text(yaml.safe_dump({"sweep": list(runs(example, seeds))}), encoding="utf-8")
    places = [f"store={out / 'store'}", f"runs={out / 'runs'}", *changes]
    if example in WITH_SOLUTIONS:
        from examples.sources.data import PROBLEMS, solved

        data = out / "solved.jsonl"
        if not data.exists():
            data.write_text("".join(json.dumps(row) + "\n" for row in solved(PROBLEMS, 4096)), encoding="utf-8")
        places.append(f"prompts.path={data}")
    overrides = [part for place in places for part in ("--set", place)]
    command = [sys.executable, "-m", "eopd.pipeline.cli", "run", str(HERE / f"{example}.yaml"), "--sweep", str(sweep)]
    subprocess.run([*command, *overrides], check=True)


def figures(example: str, number: int, seed: int, out: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the student before and after a run."""
    name = f"{example.replace('_', '-')}-{number}-{seed}"
    text = (out / "runs" / name / "summary.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(text)["rounds"] if row.get(FIGURES[0]) is not None]
    return rows[0], rows[-1]


def shown(values: list[float]) -> str:
    mean, interval = sum(values) / len(values), t_interval(values)
    return f"{mean:+.3f}" if interval is None else f"{mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def table(example: str, seeds: int, out: Path) -> str:
    """Change from the untrained student, and the example against each control, over seeds, as Markdown."""
    lines = [f"| {example} | Avg@8, change | Pass@8, change | Avg@8 against the first | Pass@8 against the first |"]
    lines.append("|---|---|---|---|---|")
    changes: list[dict[str, list[float]]] = []
    for number, variant in enumerate(EXAMPLES[example]):
        pairs = [figures(example, number, seed, out) for seed in range(seeds)]
        changes.append({name: [after[name] - before[name] for before, after in pairs] for name in FIGURES})
        against = [
            [own - first for own, first in zip(changes[-1][name], changes[0][name], strict=True)] for name in FIGURES
        ]
        cells = [shown(changes[-1][name]) for name in FIGURES] + (
            [shown(one) for one in against] if number else ["", ""]
        )
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(EXAMPLES), action="append", help="this example (may be repeated)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sources"), help="folder for store, runs and sweeps")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="as of eopd run"
    )
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for example in given.only or EXAMPLES:
        train(example, given.seeds, out, given.changes)
        print(table(example, given.seeds, out), flush=True)


if __name__ == "__main__":
    main()
