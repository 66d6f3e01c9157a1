"""Verifier against plain comparison: what is extracted, what counts as equal, what is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from eopd.stages.evaluate.disagreements import disagreements, final_answer, same_answer
from eopd.storage import evaluations
from eopd.storage.artifacts import Artifact, Identity


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} and not \boxed{3", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{ x^{2} }.", "x^{2}"),
        ("It is 1,234 or rather -3/4.", "-3/4"),
        ("The answer is 27.", "27"),
        ("It is 6.6e-3 J.", "0.0066"),
        ("nothing at all", ""),
        (r"\boxed{" + "{" * 5000, ""),
    ],
)
def test_the_final_answer_is_the_last_box_or_number(response: str, expected: str) -> None:
    assert final_answer(response) == expected


@pytest.mark.parametrize(
    ("found", "answer", "equal"),
    [
        (r"\dfrac{1}{2}", "0.5", True),
        ("1,234", "1234", True),
        ("0.50", ".5", True),
        (r"-\frac{3}{4}", "-0.75", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"\text{Monday}", "Monday", True),
        (r"$12$.", "12", True),
        (r"\$32,348", r"\$32,\!348", True),
        (r"3 \times 10^8", "3e8", True),
        (r"6.6 \cdot 10^{-34}", "6.6e-34", True),
        ("300,000,000", "3e8", True),
        ("361", "3.61e2", True),
        ("-1/3", "-1./3", True),
        ("6.6e-34", "1.6e-19", False),
        (r"3/2 \times 10^3", "3/2000", False),
        ("x^2+2x+1", "(x+1)^2", False),
        ("1/0", "2", False),
        ("1,2", "12", False),
        ("", "", False),
    ],
)
def test_equal_is_equal_text_or_equal_numbers(found: str, answer: str, equal: bool) -> None:
    assert same_answer(found, answer) == equal


@pytest.mark.timeout(60)  # each is done in a second; what is quadratic in the text takes minutes
def test_hostile_answers_do_not_hang() -> None:
    assert not same_answer("9" * 10**6, "9" * 10**6 + "1")
    assert not same_answer(r"\frac{" * 10**5, "{" * 10**5)
    assert not same_answer("1e999 " * 10**4, r"9\times" * 10**5)
    assert final_answer(r"\boxed{" * 10**5) == ""


def row(problem: str, response: str, answer: str, correct: bool, benchmark: str = "maths") -> dict[str, object]:
    return {
        "benchmark": benchmark,
        "problem_id": problem,
        "problem_index": 0,
        "sample": 0,
        "answer": answer,
        "prompt_tokens": 1,
        "response_token_ids": [1],
        "response_text": response,
        "finish_reason": "stop",
        "correct": correct,
        "form": "x" if correct else None,
        "reason": None if correct else "answered 3",
        "seed": 0,
    }


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Identity("evaluations", 1, 3))
    rows = [
        row("right", r"\boxed{4}", "4", True),
        row("algebra", r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        row("missed", r"\boxed{4}", "4", False),
        row("other", "4+4=8", "4,4=8", True, "countdown"),
    ]
    with artifact.write_part(1) as folder:
        evaluations.write_samples(folder, rows)
    artifact.set_aside(0, "NaN logits")  # holds no samples
    found = list(disagreements(artifact, ["maths"]))
    assert [(one.problem_id, one.verifier_correct, one.plain_correct) for one in found] == [
        ("algebra", True, False),
        ("missed", False, True),
    ]
    assert found[1].reason == "answered 3"
    assert found[0].extracted == "x^2+2x+1"
