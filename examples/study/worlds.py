"""The two tasks of the study: their models, their problems, and what differs in a config. Imports no torch.

``countdown``: the committed teacher and student of ``examples/countdown``, problems with four numbers, drawn anew from
a fixed seed. ``gsm8k``: the small language models of ``examples/gsm8k/pair.py``, trained once below the work folder,
which solve nothing: only their alignment is measured.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from examples.study.errors import StudyError

if TYPE_CHECKING:
    from examples.study.design import Scale

EXAMPLES = Path(__file__).parent.parent
FILES = ("train", "evaluate", "tuning")
PROBLEM_SEED = 7


@dataclass(frozen=True)
class World:
    """A task. ``row_tokens``: of a packed row, about two sequences; longer rows cost attention."""

    name: str
    new_tokens: int
    samples: int  # evaluated responses a problem
    verifier: str
    suffix: str
    row_tokens: int
    max_batch: int
    model_steps: tuple[int, int] | None = None  # of GSM8K's teacher and student; None: as many as the pair is made with

    def models(self, work: Path) -> dict[str, Path]:
        """Folders of student and teacher."""
        folder = EXAMPLES / "countdown" if self.name == "countdown" else work / "gsm8k-pair"
        return {role: folder / role for role in ("student", "teacher")}

    def problems(self, work: Path, scale: Scale) -> Path:
        """Folder of train.jsonl, evaluate.jsonl and tuning.jsonl."""
        return work / f"{self.name}-{scale.problems}-{scale.train_problems}"

    def prepare(self, work: Path, scale: Scale) -> None:
        """Make what is missing of models and problems; safe to call from several processes.

        Raises:
            StudyError: GSM8K is not at hand; names where it is looked for.
        """
        folder = self.problems(work, scale)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(work / f".{self.name}.lock"):
            if not all((folder / f"{name}.jsonl").exists() for name in FILES):
                _countdown_problems(folder, scale) if self.name == "countdown" else _gsm8k_problems(folder, work, scale)
            if not all((model / "model.safetensors").exists() for model in self.models(work).values()):
                _gsm8k_models(work, self.model_steps)


COUNTDOWN = World("countdown", 32, 8, "countdown", "", 64, 1024)
GSM8K = World("gsm8k", 160, 1, "exact", "\n", 512, 256)
TOY_GSM8K = replace(GSM8K, new_tokens=32, model_steps=(8, 4))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _countdown_problems(folder: Path, scale: Scale) -> None:
    """The held-out side of Countdown is a hash of the problem; tuning problems are those of it after the evaluated
    ones: the three files share no problem."""
    from eopd.examples.countdown import task
    from eopd.examples.countdown.make import write_problems

    rules = task.Rules()
    write_problems(folder / "train.jsonl", scale.train_problems, 1.0, PROBLEM_SEED, rules, held_out=False)
    held_out = folder / "held_out.jsonl"
    write_problems(held_out, scale.problems + scale.tuning_problems, 1.0, PROBLEM_SEED, rules, held_out=True)
    _split(held_out.read_text(encoding="utf-8").splitlines(keepends=True), folder, scale)
    held_out.unlink()


def _split(lines: list[str], folder: Path, scale: Scale) -> None:
    both = scale.problems + scale.tuning_problems
    (folder / "evaluate.jsonl").write_text("".join(lines[: scale.problems]), encoding="utf-8")
    (folder / "tuning.jsonl").write_text("".join(lines[scale.problems : both]), encoding="utf-8")


def gsm8k_data(work: Path) -> Path:
    """Where ``examples.gsm8k.data`` puts it, of this repository or of the current folder; then other places.

    Raises:
        StudyError: it is in none of them; names them.
    """
    root = EXAMPLES.parent
    places = (root / "data" / "gsm8k", Path("data/gsm8k"), root.parent / "shared" / "data" / "gsm8k", work / "gsm8k")
    for folder in places:
        if (folder / "train.jsonl").exists() and (folder / "test.jsonl").exists():
            return folder
    looked = ", ".join(str(folder.absolute()) for folder in places)
    raise StudyError(
        f"GSM8K's train.jsonl and test.jsonl are in none of {looked}: make them (python -m examples.gsm8k.data), or "
        "leave the experiment out with --only"
    )


def _gsm8k_problems(folder: Path, work: Path, scale: Scale) -> None:
    data = gsm8k_data(work)
    train = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(train[: scale.train_problems]), encoding="utf-8")
    _split((data / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), folder, scale)


def _gsm8k_models(work: Path, steps: tuple[int, int] | None) -> None:
    """About 20 minutes on one thread where no fewer ``steps`` are asked for, once a work folder; goes on where it was
    stopped."""
    from eopd.examples.gsm8k import pair

    arguments = ["--data", str(gsm8k_data(work)), "--out", str(work / "gsm8k-pair"), "--threads", "1"]
    arguments += ["--only", "teacher", "--only", "student"]
    if steps:
        arguments += ["--teacher-steps", str(steps[0]), "--student-steps", str(steps[1])]
    pair.main(arguments)
