"""Verifiers on right, wrong and hostile answers."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.stages.verifiers import countdown, exact, mathematics, values
from eopd.stages.verifiers.answers import final_answer
from eopd.stages.verifiers.mathematics import MATH_RULES, MathVerifier
from eopd.stages.verifiers.notation import tidy
from eopd.stages.verifiers.registry import NAMES, PLAIN, PlainVerifier, open_verifier
from eopd.stages.verifiers.statements import equations
from eopd.stages.verifiers.verdict import Verdict
from eopd.storage.errors import InputError
from tests.raises import raises

SHARED = Path(__file__).resolve().parents[3] / "shared"
BENCHMARKS = SHARED / "data" / "benchmarks"
GSM8K = SHARED / "data" / "gsm8k" / "test.jsonl"
PAIRS = {
    "own": Path(__file__).with_name("grading_pairs.jsonl"),
    "public threads": SHARED / "cases" / "grading.jsonl",
}
"""(reference, response, right) triples by kind: what other tools' threads and arithmetic say."""
NO_CURRENCY = r"(?<!\\)\$"

RIGHT = [
    ("9-7=2,2*2=4,4*4=16", "4,7,9,2=16"),
    ("4+7=11,11+9=20", "9,4,7=20"),
    (" 4 + 7 = 11 \n 11 + 9 = 20 \n", "9,4,7=20"),
    ("3-5=-2,-2+9=7", "3,5,9=7"),
    ("4-4=0,0*4=0", "4,4,4=0"),
]
WRONG = [
    ("", "4,7,9=20", "steps"),
    ("4+7=11", "4,7,9=20", "steps"),  # a number left over
    ("4+7=11,11+9=20,20+4=24", "4,7,9=24", "steps"),  # one used twice
    ("4+4=8,8+9=17", "4,7,9=17", "not at hand"),  # reused
    ("4+7=11,4+9=13", "4,7,9=13", "not at hand"),  # reused in the second step
    ("4+7=12,12+9=21", "4,7,9=21", "arithmetic"),
    ("4+7=11,11+9=20", "4,7,9=21", "ends at"),
    ("20", "20,1=20", "not a step"),
    ("9/3=3,3+4=7", "9,3,4=7", "not a step"),
    ("4+7=11,,11+9=20", "4,7,9=20", "steps"),
    ("(4+7)=11,11+9=20", "4,7,9=20", "not a step"),
    ("4+7=11.0,11+9=20", "4,7,9=20", "not a step"),
]
HOSTILE = [
    "__import__('os').system('touch /tmp/x')+7=11,11+9=20",
    "9**9**9**9=1,1+9=20",
    "(" * 100_000 + "4" + ")" * 100_000,
    "4+7=11," * 1_000_000,
    "\u0664+\u0667=\u0661\u0661,\u0661\u0661+\u0669=\u0662\u0660",  # Arabic-Indic digits
    "\uff14+\uff17=\uff11\uff11,\uff11\uff11+\uff19=\uff12\uff10",  # full-width digits
    "\u00b2+7=9,9+9=18",  # a superscript, which str.isdigit accepts
    "4+7=11\x00,11+9=20",
    "9" * 5000 + "+1=2,2+9=11",
    "-" * 5000,
    "4+7=11,11+9=" + "0" * 4000 + "20",
    "4+7=11\u2028,11+9=\u202e20",
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_countdown_accepts(response: str, answer: str) -> None:
    verdict = countdown.verify(response, answer)
    assert verdict.correct, verdict.reason
    assert verdict.form


@pytest.mark.parametrize(("response", "answer", "why"), WRONG)
def test_countdown_refuses(response: str, answer: str, why: str) -> None:
    verdict = countdown.verify(response, answer)
    assert not verdict.correct
    assert verdict.reason is not None
    assert why in verdict.reason


@pytest.mark.timeout(60)
@pytest.mark.parametrize("response", HOSTILE)
def test_countdown_survives_hostile_answers(response: str) -> None:
    assert not countdown.verify(response, "4,7,9=20").correct


@given(st.text(alphabet="0123456789+-*=,\n ()./eE_'٣", max_size=60))
@settings(max_examples=300, deadline=None)
def test_countdown_never_raises_on_a_response(response: str) -> None:
    verdict = countdown.verify(response, "1,2,3=6")
    assert verdict.correct == (verdict.reason is None)


def test_countdown_form_is_the_solution_not_its_spelling() -> None:
    def form(response: str) -> str | None:
        return countdown.verify(response, "2,3,4=14").form

    assert form("3+4=7,7*2=14") == form("4+3=7,2*7=14")
    assert form("3+4=7,7*2=14") is not None
    assert form("3*4=12,12+2=14") not in (None, form("3+4=7,7*2=14"))


@pytest.mark.parametrize("answer", ["", "4,7,9", "4,7=x", "7=7", "4,7,9=20:", "٤,7=11", "1," * 5000 + "1=2"])
def test_countdown_names_a_malformed_reference(answer: str) -> None:
    with raises(InputError, "numbers=target", remedy="4,7,9=24"):
        countdown.verify("4+7=11", answer)


def test_exact_ignores_unicode_form_and_white_space_only() -> None:
    assert exact.verify("  caf\u00e9\n 3 ", "cafe\u0301 3").correct
    assert not exact.verify("Cafe 3", "cafe 3").correct
    assert not exact.verify("", "3").correct


def test_registry_knows_the_names_that_settings_allow() -> None:
    assert {*PLAIN, "math"} == set(NAMES)
    with pytest.raises(ValueError, match="countdown, exact, math"):
        open_verifier("maths")
    verifier = open_verifier("countdown")
    assert verifier.named() == f"countdown {countdown.VERSION}"
    assert open_verifier("exact").named() == f"exact {exact.VERSION}"
    with raises(InputError, "numbers=target", remedy="4,7,9=24"):
        verifier.check_answer("24")
    asked = [("4+7=11", "4,7=11"), ("7-4=3", "4,7=11"), ("4+7=11", "24")]
    verdicts = verifier.verify_many(asked)
    assert [(v.correct, v.readable) for v in verdicts] == [(True, True), (False, True), (False, False)]


def test_a_plain_verifier_that_fails_on_a_response_does_not_blame_the_reference() -> None:
    def broken(response: str, answer: str) -> Verdict:
        return Verdict(int(response or 0) == int(answer))

    verifier = PlainVerifier("broken", broken, 1)
    assert [v.readable for v in verifier.verify_many([("1", "1"), ("1", "x")])] == [True, False]
    with pytest.raises(ValueError, match="'y'"):
        verifier.verify_many([("y", "1")])


MINERVA_72 = r"x_{0} \cos (\omega t)+$ $\dot{x}_{0} \sin (\omega t) / \omega"
MATH_RIGHT = [
    (r"So the answer is \boxed{\frac{1}{2}}.", "0.5"),
    (r"Thus $\boxed{(3, \pi/2)}$", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    ("The final answer is 27", "27\n"),
    (r"So $\boxed{(-\infty,0) \cup \{1\}}$", r"$(-\infty, 0) \cup\{1\}$."),
    (r"It takes \$5 each, so \boxed{1,234}", "1234"),
    # a currency is no mathematics mode, and dollars that make no pairs are none either
    (r"\boxed{\$36}", r"\$36"),
    (r"\boxed{36}", r"\$36"),
    (r"so \boxed{\$32,348}", r"\$32,\!348"),
    (r"\boxed{18.9}", r"\$18.90"),
    (r"\boxed{221, 8}", "$221,$8$"),
    (r"\boxed{x_0 \cos(\omega t) + \frac{\dot{x}_0}{\omega} \sin(\omega t)}", MINERVA_72),
    # numbers as programs print them, in either text, and in scientific notation
    (r"\boxed{3 \times 10^8}", "3e8"),
    (r"\boxed{300000000}", "3e8"),
    (r"\boxed{3.0E+08}", "300000000"),
    ("The speed is 3e8 m/s.", "3e8"),
    (r"\boxed{10^{-5}}", "1e-5"),
    (r"\boxed{0.00001}", "1e-5"),
    (r"\boxed{361}", "3.61e2"),
    (r"\boxed{4.5 \cdot 10^{33}\ \mathrm{erg}}", "4.5e33"),
    (r"\boxed{-\frac13}", "-1./3"),
    (r"\boxed{\arcsin\frac{10}{13}}", "np.arcsin(10/13)"),
    (r"\boxed{2e-1}", "2e - 1"),  # Euler's number
    # numbers of few digits, however small
    (r"\boxed{E = 2.88 \times 10^{-19} \text{ J}}", "2.88e-19"),
    (r"\boxed{\frac{1}{360000}}", "2.7778e-6"),
    (r"\boxed{0.333333}", r"\frac13"),
    (r"\boxed{0.0}", "0"),
    (r"\boxed{\sqrt2\sqrt3-\sqrt6}", "0"),
    # the convention: no units, and a percentage is its value or, if whole, its number
    (r"\boxed{12 \text{ cm}}", "12"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{0.625}", "62.5%"),
    # the last box counts; a set may be spread over several
    (r"\boxed{3} is wrong; final: \boxed{7}", "7"),
    (r"x is \boxed{3} or \boxed{7}", r"\{3, 7\}"),
    (r"\boxed{7}, and then \boxed{8", "7"),
]
MATH_WRONG = [
    (r"\boxed{\frac{1}{3}}", "0.5"),
    ("I do not know", "27"),
    ("", "27"),
    (r"\boxed{__import__('os').system('exit 1')}", "27"),
    (r"\boxed{" + "{" * 3000, "27"),
    (r"\boxed{" + r"\frac{1}{" * 400 + "2" + "}" * 400 + "}", "27"),
    ("\\boxed{\x00\ud7ff٢٧}", "28"),
    (r"\boxed{37}", r"\$36"),
    (r"\boxed{62.5}", "62.5%"),
    (r"\boxed{221}", "$221,$8$"),
    (r"\boxed{\frac{\dot{x}_0}{\omega} \sin(\omega t)}", MINERVA_72),
    (r"\boxed{3 \times 10^9}", "3e8"),
    (r"\boxed{-1}", "-1./3"),
    (r"\boxed{2}", r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}"),  # its last number
    (r"\boxed{6.6 \times 10^{-34}}", r"1.6 \times 10^{-19}"),
    (r"\boxed{E = 2.98e-19}", "2.88e-19"),
    (r"\boxed{0.0000001}", "0.0000004"),
    (r"\boxed{0.0000001}", "0.0"),
    (r"\boxed{0}", "1e-7"),
    (r"\boxed{2^{-101}}", "2^{-100}"),
    (r"\boxed{7} is wrong; final: \boxed{3}", "7"),
    (r"\boxed{3} is wrong; final: \boxed{7}", "3"),
    (r"\boxed{12 \text{ cm}}", r"12 \text{ m}"),
]
MATH_HANGING = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def math_verifier():  # type: ignore[no-untyped-def]
    with MathVerifier(seconds=4.0, workers=1) as verifier:
        yield verifier


def test_math_grades_as_people_would(math_verifier: MathVerifier) -> None:
    verdicts = math_verifier.verify_many([*MATH_RIGHT, *MATH_WRONG])
    right = [pair for pair, verdict in zip([*MATH_RIGHT, *MATH_WRONG], verdicts, strict=True) if verdict.correct]
    assert right == MATH_RIGHT
    assert all((v.form is not None) == v.correct for v in verdicts)


@pytest.mark.parametrize(
    "answer", ["$", "$$", "$ $", r"\boxed{}", "", "nan", "NaN", "None", "null", '{"style": "rule"}']
)
def test_math_names_a_reference_that_holds_nothing(math_verifier: MathVerifier, answer: str) -> None:
    with raises(InputError, "the reference answer (is empty|'.*' holds no answer)"):
        math_verifier.check_answer(answer)


def test_math_reads_references_as_they_come_and_judges_nothing_by_others(math_verifier: MathVerifier) -> None:
    for _, answer in MATH_RIGHT:
        math_verifier.check_answer(answer)
    with raises(InputError, r"'\$' holds no answer"):
        math_verifier.check_answer("$")
    verdicts = math_verifier.verify_many([(r"\boxed{2}", "2"), (r"\boxed{2}", "$"), (r"\boxed{3}", "2")])
    assert [(v.correct, v.readable) for v in verdicts] == [(True, True), (False, False), (False, True)]


@pytest.mark.parametrize("answer", ["x^{2", r"\frac{1}{2", "{"])
def test_math_names_a_reference_that_no_response_can_match(math_verifier: MathVerifier, answer: str) -> None:
    with raises(InputError, remedy="braces"):
        math_verifier.check_answer(answer)


def test_math_names_a_reference_whose_reading_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = MathVerifier(seconds=1.0, workers=1)
    monkeypatch.setattr(verifier, "verify_many", lambda pairs: [Verdict(False, reason=mathematics.DIED)])
    with raises(InputError, f"'3' cannot be read by math-verify: {mathematics.DIED}"):
        verifier.check_answer("3")
    verifier.close()


def test_a_lack_of_memory_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(values, "latex2sympy", full)
    with pytest.raises(MemoryError):
        values.read("x+1")


@pytest.mark.parametrize("source", PAIRS)
def test_math_grades_every_pair_as_it_is_right(math_verifier: MathVerifier, source: str) -> None:
    if not PAIRS[source].exists():
        pytest.skip(f"{PAIRS[source]} is not beside this checkout (../shared/cases)")
    rows = [json.loads(line) for line in PAIRS[source].read_text().splitlines()]
    verdicts = math_verifier.verify_many([(row["response"], row["gold"]) for row in rows])
    wrong = [
        (row["gold"], row["response"][-80:])
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict.correct != row["right"]
    ]
    assert wrong == []


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside this checkout (../shared/data)")
def test_math_reads_the_answer_of_a_gsm8k_solution(math_verifier: MathVerifier) -> None:
    solutions = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()[:200]]
    pairs = [(rf"\boxed{{{solution.rsplit('#### ')[-1]}}}", solution) for solution in solutions]
    assert all(verdict.correct for verdict in math_verifier.verify_many(pairs))
    changed = [(rf"\boxed{{{solution.rsplit('#### ')[-1]}1}}", solution) for solution in solutions]
    assert not any(verdict.correct for verdict in math_verifier.verify_many(changed))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>so 7</think> \\boxed{7}", "7"),
        ("<think>\\boxed{7}</think>", None),
        ("<think>\\boxed{7}", None),
        ("\\boxed{7}</think>", None),
        ("<think>\\boxed{5}</think>\n<answer>7</answer>", "7"),
        ("\\boxed{7}" + " and so on" * 100_000, "7"),
        ("\\fbox{7} and \\boxed{8", "7"),
        ("$\\boxed 12$", "1"),
        ("\\boxed{x=1}, or \\boxed{x=2}", "x=1, x=2"),
        ("#### 42\n the end", "42"),
        ("Answer: 12\n\nThat is 34.", "12"),
        ("2 + 5 = 7, \\boxed{", "7"),
        ("\\boxed{7", None),
        ("", None),
    ],
)
def test_where_a_response_states_its_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


HOSTILE_TEXTS = [
    "\\boxed{" * 120_000,
    "<think>" * 140_000,
    "answer " * 140_000,
    "{" * 10**6,
    "#### " * 200_000,
    "= " * 500_000,
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: text[:8])
def test_finding_an_answer_takes_time_linear_in_the_text(text: str) -> None:
    """A megabyte each: a search that is not linear would not end."""
    assert final_answer(text) in (None, "answer", "####" + " ####" * 799)
    assert len(tidy(text[:4000])) <= 4000


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not beside this checkout (../shared/data)")
def test_math_reads_every_reference_of_the_papers_benchmarks(math_verifier: MathVerifier) -> None:
    """All can be read, and each is right in a box of its own: before sampling, and before a GPU is paid for it."""
    answers = {}
    for path in sorted(BENCHMARKS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            answers[row["id"]] = row["answer"]
    assert len(answers) == 1547
    for answer in answers.values():
        math_verifier.check_answer(answer)
    boxes = [rf"so \boxed{{{re.sub(NO_CURRENCY, '', answer).strip().rstrip('.')}}}" for answer in answers.values()]
    verdicts = math_verifier.verify_many(list(zip(boxes, answers.values(), strict=True)))
    assert [name for name, verdict in zip(answers, verdicts, strict=True) if not verdict.correct] == []


@pytest.mark.timeout(120)
def test_math_outlives_an_answer_that_hangs(math_verifier: MathVerifier) -> None:
    verdicts = math_verifier.verify_many([(r"\boxed{2}", "2"), (MATH_HANGING, "27"), (r"\boxed{3}", "3")])
    assert [v.correct for v in verdicts] == [True, False, True]
    assert (verdicts[1].reason or "").startswith(mathematics.TIMED_OUT)


def test_a_reworded_solution_is_no_new_one_and_other_steps_are(math_verifier: MathVerifier) -> None:
    first = "In April she sold 48 clips.\nIn May she sold 48 / 2 = 24.\nAltogether 48 + 24 = 72. \\boxed{72}"
    reworded = (
        "- **May**: $48 \\div 2 = 24$ clips\n- so over both months that is $48+24 = 72$, the answer is \\boxed{72}"
    )
    reordered = "We want 48+24=72, for 48/2=24 were sold in May. \\boxed{72}"
    other = "Each half of May's clips is 12, so 48 * 1.5 = 72. \\boxed{72}"
    silent = "It is \\boxed{72}"
    forms = [
        v.form
        for v in math_verifier.verify_many([(text, "72") for text in (first, reworded, reordered, other, silent)])
    ]
    assert forms[0] is not None
    assert forms[0] == forms[1] == forms[2]
    assert len(set(forms)) == 3
    assert math_verifier.named() == f"math {MATH_RULES} (math-verify {version('math-verify')})"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", []),
        ("no equation, but 3 + 4", []),
        ("Total = 48 + 24 = 72.", ["48+24=72"]),
        (r"so $x = \dfrac{1}{2}$ and \(y=3\), thus", ["x=1/2", "y=3"]),
        (r"\[ 3 \times 4 = 12 \]", ["3*4=12"]),
        ("1. 1,234 apples + 6 pears = 1240 fruits", ["1234+6=1240"]),
        ("$5 + \\$3 = $8", ["5+3=8"]),
        (r"\boxed{x=5}", ["x=5"]),
        ("2x=6, x=3, 2x=6", ["2x=6", "x=3"]),
    ],
)
def test_equations_of_a_text(text: str, result: list[str]) -> None:
    assert equations(text) == result


@pytest.mark.timeout(60)  # what is quadratic in the text takes minutes
@pytest.mark.parametrize("text", [" " * 200_000, "=" * 200_000, "\\frac{" * 30_000, "1 = " * 50_000, "**" * 100_000])
def test_equations_of_hostile_text_do_not_hang(text: str) -> None:
    assert len(equations(text)) <= 1
