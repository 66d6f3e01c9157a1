"""Processes that grade mathematics: answers that hang or kill them, and graders that do not start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eopd.stages.verifiers import mathematics
from eopd.stages.verifiers.mathematics import MATH_RULES, MathVerifier
from tests.stages.test_verifiers import MATH_HANGING

MATH_BOMBS = [
    r"\boxed{9**9**9**9}",
    r"\boxed{(x+y+z)^{3000}}",  # expands into millions of terms
    r"\boxed{100000000!}",
    r"\boxed{7^{10^{12}}}",
    r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^n}}",
]


def test_math_outlives_whatever_the_algebra_behind_it_cannot() -> None:
    """Each is wrong within its limit, and the answers around it are graded."""
    with MathVerifier(seconds=1.5, workers=2) as verifier:
        asked = [pair for bomb in MATH_BOMBS for pair in ((bomb, "27"), (r"\boxed{\frac{6}{4}}", "1.5"))]
        verdicts = verifier.verify_many(asked)
    assert [v.correct for v in verdicts] == [False, True] * len(MATH_BOMBS)
    assert sum((v.reason or "").startswith(mathematics.TIMED_OUT) for v in verdicts) >= 2


STUBBORN = """
import sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if 'hang' in line:
        while True: time.sleep(1)
    if 'die' in line:
        sys.exit(3)
    print('{"correct": true, "form": "x"}', flush=True)
"""


def test_a_worker_that_hangs_or_dies_costs_its_own_answer_only() -> None:
    with MathVerifier(seconds=0.5, workers=2, command=(sys.executable, "-c", STUBBORN)) as verifier:
        asked = ["fine", "hang", "fine", "die", "fine", "hang", "fine"]
        verdicts = verifier.verify_many([(response, "1") for response in asked])
    assert [v.correct for v in verdicts] == [response == "fine" for response in asked]
    reasons = {response: v.reason or "" for response, v in zip(asked, verdicts, strict=True)}
    assert reasons["hang"].startswith(mathematics.TIMED_OUT)
    assert reasons["die"] == mathematics.DIED


SLOW_ONCE = """
import pathlib, sys, time
print('{"ready": true, "version": "7"}', flush=True)
for line in sys.stdin:
    seen = pathlib.Path(sys.argv[1])
    if 'slow' in line and not seen.exists():
        seen.touch()
        time.sleep(60)
    print('{"correct": true, "form": "x"}', flush=True)
"""


def test_an_answer_that_was_slow_once_is_graded_again(tmp_path: Path) -> None:
    """As on a machine that was busy with something else."""
    command = (sys.executable, "-c", SLOW_ONCE, str(tmp_path / "seen"))
    with MathVerifier(seconds=1.0, workers=2, command=command) as verifier:
        verdicts = verifier.verify_many([("fine", "1"), ("slow", "1"), ("fine", "1")])
        assert verifier.named() == f"math {MATH_RULES} (math-verify 7)"
    assert [v.correct for v in verdicts] == [True] * 3


COUNTS_HANGING = """
import pathlib, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if 'hang' in line:
        with open(sys.argv[1], 'a') as asked:
            asked.write('x')
        time.sleep(60)
    print('{"correct": true, "form": "x"}', flush=True)
"""


def test_equal_answers_are_graded_once_and_hanging_ones_not_for_ever(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    responses = ["fine", "fine", *(f"hang {number % 23}" for number in range(40))]
    with MathVerifier(seconds=0.2, workers=2, command=(sys.executable, "-c", COUNTS_HANGING, str(asked))) as verifier:
        verdicts = verifier.verify_many([(response, "1") for response in responses])
    assert [v.correct for v in verdicts] == [True] * 2 + [False] * 40
    assert all((v.reason or "").startswith(mathematics.TIMED_OUT) for v in verdicts[2:])
    assert len(asked.read_text()) == 23 + mathematics.GIVE_UP_AFTER


DIES_ONCE_STARTED = """
import json, pathlib, sys
starts = pathlib.Path(sys.argv[1])
started = len(starts.read_text()) if starts.exists() else 0
starts.write_text('x' * (started + 1))
if started in json.loads(sys.argv[2]):
    sys.exit(1)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if 'die' in line:
        sys.exit(3)
    print('{"correct": true, "form": "x"}', flush=True)
"""


@pytest.mark.parametrize(
    ("failing", "correct"), [([1], [True, False, True, True]), ([1, 2], [True, False, False, True])]
)
def test_a_grader_that_cannot_be_started_again_costs_one_answer(
    tmp_path: Path, failing: list[int], correct: list[bool]
) -> None:
    """Starts are counted from 0; one that fails is tried once more."""
    command = (sys.executable, "-c", DIES_ONCE_STARTED, str(tmp_path / "starts"), json.dumps(failing))
    with MathVerifier(seconds=5.0, workers=1, command=command) as verifier:
        verdicts = verifier.verify_many([(response, "1") for response in ("fine", "die", "again", "last")])
    assert [v.correct for v in verdicts] == correct
    assert {v.reason for v in verdicts if not v.correct} == {mathematics.DIED}


def test_a_grader_left_alone_ends_by_itself() -> None:
    asked = {"response": MATH_HANGING, "answer": "27", "seconds": 0.5}
    done = subprocess.run(
        [sys.executable, "-m", mathematics.WORKER], input=json.dumps(asked) + "\n", capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGXCPU
    assert json.loads(done.stdout)["ready"]


def test_a_grader_that_does_not_start_says_so() -> None:
    broken = MathVerifier(seconds=1.0, workers=1, command=(sys.executable, "-c", "raise SystemExit(1)"))
    with broken, pytest.raises(RuntimeError, match="did not start"):
        broken.verify_many([("1", "1")])
