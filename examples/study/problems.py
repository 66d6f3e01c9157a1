"""The study's problems: Countdown with four numbers, made anew from a fixed seed wherever the study runs."""

from __future__ import annotations

import fcntl
from pathlib import Path

from eopd.examples.countdown import task
from eopd.examples.countdown.make import write_problems
from examples.study.design import Scale

SEED = 7
FILES = ("train", "evaluate", "tuning")


def make(folder: Path, scale: Scale) -> None:
    """Write train.jsonl, evaluate.jsonl and tuning.jsonl where they are missing.

    The held-out side of Countdown is a hash of the problem; the tuning problems are those of it that come after the
    evaluated ones, so the three sets share no problem. Safe to call from several processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if all((folder / f"{name}.jsonl").exists() for name in FILES):
            return
        rules = task.Rules()
        write_problems(folder / "train.jsonl", scale.train_problems, 1.0, SEED, rules, held_out=False)
        held_out = folder / "held_out.jsonl"
        write_problems(held_out, scale.problems + scale.tuning_problems, 1.0, SEED, rules, held_out=True)
        lines = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
        held_out.unlink()
        (folder / "evaluate.jsonl").write_text("".join(lines[: scale.problems]), encoding="utf-8")
        (folder / "tuning.jsonl").write_text("".join(lines[scale.problems :]), encoding="utf-8")
