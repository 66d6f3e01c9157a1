"""Whether two answers are the same. math-verify reads the expressions; what counts as equal is decided here.

``math_verify.verify`` rounds numbers to six places and drops differences below 1e-15, compares products of letters as
words and words as products, drops bases, takes any equation for its right-hand side, and holds equations without a
solution for equal: each calls wrong answers right. So numbers are compared exactly unless one is a decimal,
expressions by value at many points, and lists, tuples, sets, intervals and equations as such.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import permutations
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from sympy import S
from sympy.core.function import AppliedUndef

from eopd.stages.evaluate.verifiers import notation
from eopd.stages.evaluate.verifiers.notation import (
    Plain,
    bare,
    base_numeral,
    closing,
    plain_number,
    quantity,
    split,
    tidy,
)

ABSOLUTE = Fraction(1, 2_000_000)
"""How far a decimal may be from what it stands for: half of the sixth place, as in math-verify."""
RELATIVE = Fraction(1, 100_000)
"""The same as a share of the number: without it six places would call every tiny number equal."""
DIGITS = 50
"""Digits to which numbers that are not rational are compared before they are compared by algebra."""
MAX_ITEMS = 200

_NO_SOLUTION = frozenset({"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none"})
_ALL_REALS = frozenset({"all real numbers", "all reals", "real numbers", "all real x", "reals"})
_EMPTY = frozenset({r"\emptyset", r"\{\}", "{}"})
_SYNONYMS = {"dne": "does not exist", "t": "true", "f": "false"}
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])[.):])(?:[\s\\~].*)?|(?:(?i:option|choice|answer)\s+)?([A-J])",
    re.DOTALL,
)
_TIME = re.compile(r"(\d{1,2})\s*:\s*(\d{2})(?:\s*:\s*(\d{2}))?\s*([ap])?\.?\s*(?:m\.?)?", re.I)
_RATIO = re.compile(r"\s*:\s*|\\colon\s*")
_RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])|[<>]|(?<!\\)=")
_NAME = re.compile(r"[A-Za-z]|\\[A-Za-z]+|[A-Za-z]_\{?[^{}]+\}?|\\[A-Za-z]+_\{?[^{}]+\}?")
_CALL = re.compile(r"([A-Za-z])\s*\(\s*([A-Za-z])\s*\)")
_APPROXIMATION = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_UNREADABLE = re.compile(r"\.\d*\s*\\(?:overline|bar|dot)(?![A-Za-z])|(?<![_^\d.])\d+\s+[\d.]|\.\d*\.")
"""What the parser reads as something else: repeating decimals, numbers side by side (as their sum), two points."""
_SET_BUILDER = re.compile(
    r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![A-Za-z])|\||:)\s*([^{}]*(?:\\frac\{[^{}]*\}\{[^{}]*\}[^{}]*|\\sqrt\{[^{}]*\}[^{}]*)*)\\\}$"
)
_MODULUS = re.compile(r"\\pmod(?![A-Za-z])|\\[bp]?mod(?![A-Za-z])|(?<![A-Za-z])\(?(?:\\text\{\s*)?\(?mod(?![A-Za-z])")
_PAIRS = {"(": ")", "[": "]"}
_NOTATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, boxed="none")
_CONVERSION = ConversionConfig(lowercase_symbols=False)


def same_answer(reference: str, answer: str) -> bool:
    """Whether ``answer`` is the answer that ``reference`` is. Takes any time: call it where it can be killed."""
    expected, given = tidy(reference), tidy(answer)
    if not expected or not given:
        return False
    if bare(expected) == bare(given):
        return True
    for one in dict.fromkeys((expected, notation.uncommented(expected))):
        for other in dict.fromkeys((given, notation.uncommented(given))):
            if _same(one, other):
                return True
    return False


def _same(expected: str, given: str) -> bool:
    if bare(expected) == bare(given):
        return True
    for decide in (_choices, _times, _numerals, _texts, _residues):
        verdict = decide(expected, given)
        if verdict is not None:
            return verdict
    if r"\ldots" in expected or r"\ldots" in given:
        return _listed_alike(expected, given)
    return _structures(expected, given)


def _choices(expected: str, given: str) -> bool | None:
    """A reference that is a letter of a choice, alone or before the text of it."""
    plain = notation._TEXT.sub(r"\1", expected).strip()
    letter = _CHOICE.fullmatch(plain)
    labelled = re.fullmatch(r"\(([A-J])\)\s*(\S.*)", plain)
    chosen = _CHOSEN.fullmatch(notation._TEXT.sub(r"\1", given).strip())
    named = next((group for group in chosen.groups() if group), None) if chosen else None
    if letter:
        return named == letter[1] if named else (None if "=" in given else False)
    if labelled and len(labelled[2]) < 200 and not labelled[2].startswith((",", "\\cup", "=")):
        return named == labelled[1] if named else _same(tidy(labelled[2]), given)
    return None


def _times(expected: str, given: str) -> bool | None:
    """Times of day and ratios."""
    one, other = (notation._TEXT.sub(r"\1", text).strip() for text in (expected, given))
    clock = _TIME.fullmatch(one), _TIME.fullmatch(other)
    if clock[0] and clock[1]:
        (*first, half), (*second, other_half) = clock[0].groups(), clock[1].groups()
        same = [int(part or 0) for part in first] == [int(part or 0) for part in second]
        return same and (not half or not other_half or half.lower() == other_half.lower())
    ratios = [[tidy(part) for part in _RATIO.split(text)] for text in (one, other)]
    if len(ratios[0]) < 2 or any(not part for ratio in ratios for part in ratio):
        return None
    if clock[0] or r"\ldots" in one + other:
        return [bare(part) for part in ratios[0]] == [bare(part) for part in ratios[1]]
    if len(ratios[0]) == 2 and len(ratios[1]) == 1:
        return _same(rf"\frac{{{ratios[0][0]}}}{{{ratios[0][1]}}}", given)
    if len(ratios[0]) != len(ratios[1]):
        return False
    numbers = [[plain_number(part) for part in ratio] for ratio in ratios]
    if all(number and number.value > 0 for ratio in numbers for number in ratio):
        values = [[number.value for number in ratio if number] for ratio in numbers]
        return len({a / b for a, b in zip(*values, strict=True)}) == 1
    return all(_same(a, b) for a, b in zip(*ratios, strict=True))


def _numerals(expected: str, given: str) -> bool | None:
    """Numerals of which one names its base: a reference with a base is also given by its digits alone."""
    one, other = base_numeral(expected), base_numeral(given)
    if one and other:
        return one == other
    if one:
        return bare(given).lower() == one[0]
    if other:
        number = plain_number(expected)
        if number is None:
            return None
        return other[1] == 10 and number == plain_number(other[0])
    return None


def _texts(expected: str, given: str) -> bool | None:
    """Answers in words, and the sets that words name."""
    one, other = notation.words(expected), notation.words(given)
    for names, signs in ((_NO_SOLUTION, _EMPTY), (_ALL_REALS, (r"\mathbb{R}", r"(-\infty,\infty)"))):
        named = [word in names or bare(text) in signs for word, text in ((one, expected), (other, given))]
        if any(named):
            if all(named):
                return True
            if (one if named[0] else other) is not None and names is _NO_SOLUTION:
                return False
            if names is _ALL_REALS:
                expected, given = (
                    r"(-\infty,\infty)" if known else text for known, text in zip(named, (expected, given), strict=True)
                )
                return _structures(expected, re.sub(r"^[A-Za-z]\s*\\in\s*", "", given))
    if one is None and other is None:
        return None
    if one is not None and other is not None:
        listed = [
            sorted(bare(_SYNONYMS.get(part, part)) for part in re.split(r" (?:and|or) ", text)) for text in (one, other)
        ]
        return listed[0] == listed[1]
    word, text = (one, given) if one is not None else (other, expected)
    if word in notation.NUMBER_WORDS:
        number = plain_number(quantity(text)[0])
        return number is not None and number.value == notation.NUMBER_WORDS[word]
    source = expected if one is not None else given
    if "\\text" in source or len(bare(source)) > 3:
        return False
    return None


def _residues(expected: str, given: str) -> bool | None:
    """Residues with their modulus: the same class of the same modulus."""
    pieces = [_MODULUS.split(text) for text in (expected, given)]
    if len(pieces[0]) == len(pieces[1]) == 1:
        return None
    if len(pieces[0]) != len(pieces[1]):
        return False
    (one, modulus, *_), (other, other_modulus, *_) = (
        [tidy(part).rstrip("(").strip("} )") for part in piece] for piece in pieces
    )
    one, other = (re.sub(r"^[A-Za-z]\s*(?:\\equiv|=)\s*", "", text) for text in (one, other))
    numbers = [plain_number(tidy(text)) for text in (one, other, modulus, other_modulus)]
    values = [number.value for number in numbers if number]
    return len(values) == 4 and values[2] == values[3] > 0 and (values[0] - values[1]) % values[2] == 0


def _listed_alike(expected: str, given: str) -> bool:
    """Lists that go on: the items that are written are the same, in order."""
    ours, theirs = split(expected), split(given)
    return len(ours) == len(theirs) > 1 and all(
        bare(a) == bare(b) or (r"\ldots" not in a + b and _leaf(a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def _structures(expected: str, given: str) -> bool:
    """Lists, tuples, sets and intervals item by item; anything else as one expression."""
    expected, given = (_by_coordinate(_SET_BUILDER.sub(r"\1", text)) for text in (expected, given))
    kind, items = _items(expected)
    other_kind, others = _items(given)
    if kind == "one" and other_kind == "one":
        return _leaf(expected, given)
    if max(len(items), len(others)) > MAX_ITEMS:
        return False
    if kind == "interval" or other_kind == "interval":
        if kind == other_kind:
            return _ends(expected) == _ends(given) and _in_order(items, others)
        if {kind, other_kind} <= {"interval", "tuple"}:
            return False
        return "one" in (kind, other_kind) and _leaf(expected, given)
    if kind == "tuple" and other_kind == "one":
        return len(items) == 2 and _leaf(expected, given)
    if other_kind == "tuple" and kind == "one":
        return len(others) == 2 and _leaf(expected, given)
    if kind == "tuple":
        if other_kind == "set":
            return False
        return _in_order(items, _by_name(others, len(items)))
    if other_kind == "tuple":
        return kind == "list" and _in_order(items, others)
    if kind == "set" or other_kind == "set":
        return _as_sets(items, others)
    if len(items) != len(others) and any("\\pm" in item or "\\mp" in item for item in items + others):
        items, others = _expanded(items), _expanded(others)
    return _as_bags(_unnamed(items, others), _unnamed(others, items))


def _items(text: str) -> tuple[str, list[str]]:
    """Kind of a structure (one, list, tuple, interval, set) and its items."""
    body = re.sub(r"^(?:\(?[A-Za-z]\)?\s*(?:\\in|=)\s*)(?=\\\{)", "", text)
    if body.startswith(r"\{") and closing(body, 1) == len(body) - 1 and body.endswith(r"\}"):
        inner = body[2:-2]
        if re.search(r"\\mid(?![A-Za-z])|(?<!\\)\||:", inner):
            return "one", [text]
        return "set", _expanded(split(inner))
    vector = re.fullmatch(r"\\langle\s*(.*?)\s*\\rangle", body)
    if vector:
        return "tuple", split(vector[1])
    body = re.sub(r"^[A-Za-z]\s*(?:\\in|=)\s*(?=[(\[])", "", body)
    if body[:1] in _PAIRS and closing(body, 0) == len(body) - 1:
        items = split(body[1:-1])
        if len(items) == 2 and (body[0] == "[" or body[-1] == "]"):
            return "interval", items
        if len(items) > 1:
            return "tuple", items
        return ("one", [text]) if body[0] == "(" else ("list", items)
    if plain_number(quantity(text)[0]) is not None:
        return "one", [text]
    items = split(text)
    if len(items) > 1 and all(re.search(r"\\(?:le|ge|lt|gt|ne)(?![A-Za-z])|[<>]", item) for item in items):
        return "one", [text]
    if re.search(r"\d,\d{3}(?!\d)", text) and re.search(r",\s", text):  # 1,234, 5,678
        spaced = [part for part in re.split(r",\s+", text) if part]
        if all(plain_number(part) for part in spaced):
            items = spaced
    if len(items) == 1 and re.search(r"\\[pm][pm](?![A-Za-z])", text):
        items = _expanded(items)
    return ("list", items) if len(items) > 1 else ("one", [text])


def _ends(text: str) -> tuple[str, str]:
    text = re.sub(r"^[A-Za-z]\s*(?:\\in|=)\s*", "", text)
    return text[0], text[-1]


def _expanded(items: list[str]) -> list[str]:
    """Items with both signs for each ``\\pm``."""
    both = []
    for item in items:
        if re.search(r"\\(?:pm|mp)(?![A-Za-z])", item):
            for plus, minus in (("+", "-"), ("-", "+")):
                signed = re.sub(r"\\pm(?![A-Za-z])", plus, item)
                both.append(re.sub(r"\\mp(?![A-Za-z])", minus, signed))
        else:
            both.append(item)
    return both


def _in_order(items: list[str], others: list[str]) -> bool:
    return len(items) == len(others) and all(_same(a, b) for a, b in zip(items, others, strict=True))


def _as_sets(items: list[str], others: list[str]) -> bool:
    """Every item is in the other set."""
    return all(any(_same(a, b) for b in others) for a in items) and all(any(_same(a, b) for a in items) for b in others)


def _as_bags(items: list[str], others: list[str]) -> bool:
    """The same items, each as often, in any order."""
    if len(items) != len(others):
        return False
    left = list(others)
    for item in items:
        match = next((other for other in left if _same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _assignment(text: str) -> tuple[str, str] | None:
    """Name and value of ``x = 5``."""
    name, sign, value = (part.strip() for part in text.partition("="))
    return (bare(name), value) if sign and _NAME.fullmatch(name) and not _RELATION.search(value) else None


def _by_name(items: list[str], count: int) -> list[str]:
    """Values of ``y=3, x=5`` in the order of the names; other items as they are."""
    pairs = [_assignment(item) for item in items]
    named = [pair for pair in pairs if pair]
    if len(named) != len(items) or len({name for name, _ in named}) != count:
        return items
    return [value for _, value in sorted(named)]


def _unnamed(items: list[str], others: list[str]) -> list[str]:
    """Values of ``x=1, 2, 3`` or ``x=1, x=2`` where the other list names nothing, or names the first only."""
    pairs = [_assignment(item) for item in items]
    names = {pair[0] for pair in pairs if pair}
    if len(names) != 1 or pairs[0] is None:
        return items
    other_names = {pair[0] for item in others if (pair := _assignment(item))}
    if other_names - names:
        return items
    return [pair[1] if pair else item for pair, item in zip(pairs, items, strict=True)]


def _by_coordinate(text: str) -> str:
    """``(x,y)=(5,3)`` as ``x=5, y=3``."""
    left, sign, right = (part.strip() for part in text.partition("="))
    (kind, names), (other_kind, values) = (_items(side) if sign else ("", []) for side in (left, right))
    if kind != "tuple" or other_kind != "tuple" or len(names) != len(values) or not all(map(_NAME.fullmatch, names)):
        return text
    return ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


# One expression


def _leaf(expected: str, given: str) -> bool:
    """Two answers that are one number, expression, equation, inequality, set or matrix each."""
    if bare(expected) == bare(given):
        return True
    chains = [_APPROXIMATION.split(text) for text in (expected, given)]
    if any(len(chain) > 1 for chain in chains):
        return any(_leaf(tidy(a), tidy(b)) for a in chains[0] for b in chains[1]) and all(map(_coherent, chains))
    (core, unit), (other, other_unit) = quantity(expected), quantity(given)
    if (
        {unit, other_unit} <= {None, "?"}
        or None in (unit, other_unit)
        or "?" in (unit, other_unit)
        or unit == other_unit
    ):
        one, two = plain_number(core), plain_number(other)
        if one and two:
            return _same_plain(one, two)
        if (unit == "deg" and other_unit == "rad") or (unit == "rad" and other_unit == "deg"):
            return False
        if bare(core) == bare(other):
            return True
    else:
        return False
    if "=" in core or "=" in other or _RELATION.search(core) or _RELATION.search(other):
        verdict = _equations(core, other)
        if verdict is not None:
            return verdict
    if (unit is None) != (other_unit is None) and (_variables(core) or _variables(other)):
        core, other = expected, given  # what looks like a unit may be a factor
    a, b = _read(core), _read(other)
    return a is not None and b is not None and _same_value(a, b)


def _coherent(chain: list[str]) -> bool:
    """Whether the sides of an approximate equality are near each other."""
    values = [_read(tidy(side)) for side in chain]
    numbers = [abs(sympy.N(value, 20)) for value in values if isinstance(value, sympy.Expr) and not value.free_symbols]
    return len(numbers) < 2 or all(abs(a - numbers[0]) <= numbers[0] / 50 for a in numbers)


def _same_plain(one: Plain, two: Plain) -> bool:
    """Numbers as they are written. A whole percentage is also its number without the sign, as in math-verify."""
    a, b = one.value, two.value
    if one.percent != two.percent:
        percentage = one if one.percent else two
        if percentage.step is None and percentage.value.denominator == 1 and a == b:
            return True
    a, b = (number.value / 100 if number.percent else number.value for number in (one, two))
    steps = [number.step / 100 if number.percent else number.step for number in (one, two) if number.step]
    return a == b or (bool(steps) and _near(a, b, max(steps)))


def _near(a: Any, b: Any, step: Any = None) -> bool:
    """Whether a decimal stands for the other number: nearer than its last place, and than both tolerances."""
    difference = abs(a - b)
    return bool(
        difference <= ABSOLUTE and difference <= RELATIVE * max(abs(a), abs(b)) and (step is None or difference < step)
    )


def _variables(text: str) -> bool:
    value = _read(text)
    return value is None or bool(getattr(value, "free_symbols", ()))


def _read(text: str) -> Any:
    """What the parser of math-verify reads: a sympy object with exact numbers; None for a text that it cannot read.

    A factor ``_inexact`` marks decimals. Unlike ``math_verify.parse`` this keeps capitals (``R`` is not ``r``) and
    takes no last letter for a unit.
    """
    text = _readable(text)
    number = plain_number(text)
    if number is not None:
        value = number.value / 100 if number.percent else number.value
        rational = sympy.Rational(value.numerator, value.denominator)
        return rational if number.step is None else sympy.Mul(rational, _inexact, evaluate=False)
    try:
        return _exact(latex2sympy(text, is_real=True, normalization_config=_NOTATION, conversion_config=_CONVERSION))
    except Exception:  # whatever a generated parser raises
        return None


_inexact = sympy.Symbol("inexact")
"""A factor of one that marks decimals."""


def _readable(text: str) -> str:
    """Notation that the parser of math-verify does not know, in one that it does."""
    text = re.sub(r"(\d+)\s+(?=\\frac)", r"\1", text)
    text = re.sub(r"\)\s*(?=\()", r")\\cdot ", text)
    text = re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)
    if _UNREADABLE.search(text):
        return ""
    # \gamma is read as Euler's constant, or as a function of what follows.
    text = re.sub(r"\\gamma(?![A-Za-z])(?:\s*_\s*\{?(\w+)\}?)?", lambda name: f"{{g_{{gamma{name[1] or ''}}}}}", text)
    text = re.sub(r"\^\\circ", "", text).replace("\\$", "")
    text = re.sub(r"\\langle\s*(.*?)\s*\\rangle", r"(\1)", text)
    text = re.sub(r"(?<=\d)\.(?=\s|$|[^\d\s])", "", text)
    text = re.sub(r"(?<![\\A-Za-z_^{}\d.])(\d+(?:\.\d+)?)\s*(?=\()", r"\1 \\cdot ", text)
    text = re.sub(r"((?:\d+|[A-Za-z])!)(?=\^)", r"{(\1)}", text)
    text = re.sub(
        r"([A-Za-z)])('+)", lambda prime: f"{prime[1]}^{{{' '.join([chr(92) + 'prime'] * len(prime[2]))}}}", text
    )
    return re.sub(r"\s+", " ", text)


def _exact(value: Any) -> Any:
    if isinstance(value, sympy.MatrixBase):
        return value.applyfunc(_exact)
    if not isinstance(value, sympy.Basic) or value.has(S.ComplexInfinity, S.NaN):
        return None
    derivatives = {derivative: sympy.Symbol(str(derivative)) for derivative in value.atoms(sympy.Derivative)}
    value = value.xreplace(derivatives)  # sympy takes the derivative of any symbol for zero
    floats = value.atoms(sympy.Float)
    replaced = {number: sympy.Rational(repr(float(number))) * _inexact for number in floats}
    imaginary = {symbol: sympy.I for symbol in value.atoms(sympy.Symbol) if symbol.name == "i"}
    return value.xreplace(replaced | imaginary) if floats or imaginary else value


def _same_value(a: Any, b: Any) -> bool:
    """Two sympy objects."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return (
            isinstance(a, sympy.MatrixBase)
            and isinstance(b, sympy.MatrixBase)
            and a.shape == b.shape
            and all(_same_value(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, (sympy.Set, sympy.Tuple)) or isinstance(b, (sympy.Set, sympy.Tuple)):
        return _same_set(a, b)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(a == b)
    inexact = _inexact in a.free_symbols | b.free_symbols
    a, b = (value.xreplace({_inexact: S.One}) for value in (a, b))
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    return _same_function(a, b, symbols, inexact) if symbols else _same_number(a, b, inexact)


def _same_number(a: sympy.Expr, b: sympy.Expr, inexact: bool) -> bool:
    a, b = _done(a), _done(b)
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return inexact and _near(a, b)
    if a.is_infinite or b.is_infinite or a is S.NaN or b is S.NaN:
        return False
    x, y = _evaluated(a, DIGITS), _evaluated(b, DIGITS)
    if x is None or y is None:
        return False
    scale = max(abs(x), abs(y))
    if abs(x - y) > scale * sympy.Float(10) ** (10 - DIGITS):
        return inexact and _near(x, y)
    if (a - b).is_zero or sympy.simplify(a - b) == 0:
        return True
    # Algebra that sympy cannot do: digits beyond what two expressions of this size agree in by chance.
    magnitude = abs(int(sympy.log(scale, 10).evalf())) if scale else 0
    digits = 300 + 4 * magnitude
    x, y = _evaluated(a, digits), _evaluated(b, digits)
    return x is not None and y is not None and bool(abs(x - y) <= scale * sympy.Float(10, 30) ** (20 - digits))


def _done(value: sympy.Expr) -> sympy.Expr:
    try:
        return value.doit()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return value


def _evaluated(value: sympy.Expr, digits: int) -> Any:
    try:
        number = sympy.N(value, digits)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return (
        number
        if number.is_number
        and number.is_comparable is not None
        and not number.has(S.NaN, S.ComplexInfinity)
        and (number.is_Number or number.as_real_imag()[0].is_Number)
        else None
    )


_POINTS = [
    [3, 5, 7, 11, 2, 13, 4, 17],
    [6, 2, 9, 5, 8, 3, 10, 7],
    [12, 7, 4, 3, 9, 5, 6, 2],
    *[[sympy.Rational(p + 3 * k, q + k) for k in range(8)] for p, q in ((7, 5), (3, 11), (29, 13), (5, 3), (11, 17))],
    *[[sympy.Rational(-p - 2 * k, q + k) for k in range(8)] for p, q in ((7, 5), (4, 11), (23, 7))],
]


def _same_function(a: sympy.Expr, b: sympy.Expr, symbols: list[Any], inexact: bool) -> bool:
    """Equal by value wherever both are real, at whole, fractional, positive and negative points; or by algebra."""
    if len(symbols) > 8 or a.has(AppliedUndef) or b.has(AppliedUndef):
        return _zero(a - b)
    agreed = 0
    for point in _POINTS:
        values = dict(zip(symbols, map(sympy.sympify, point), strict=False))
        x, y = (_evaluated(_done(value.xreplace(values)), DIGITS) for value in (a, b))
        if x is None or y is None:
            continue
        if (x.is_real is False) != (y.is_real is False):
            continue
        scale = max(abs(x), abs(y))
        close = abs(x - y) <= scale * sympy.Float(10) ** (15 - DIGITS)
        if not close and not (inexact and abs(x - y) <= scale * RELATIVE / 10):
            return False
        agreed += 1
    return agreed >= 3 if agreed else _zero(a - b)


def _zero(value: Any) -> bool:
    try:
        return bool(sympy.simplify(value) == 0)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False


# Equations and inequalities


def _equations(expected: str, given: str) -> bool | None:
    """Answers of which at least one is an equation, an inequality or a membership."""
    ours, theirs = _Statement(expected), _Statement(given)
    if ours.sign == "=" and theirs.sign == "=":
        return _both_equations(ours, theirs)
    if not ours.sign and theirs.sign == "=":
        return _names_value(theirs) and _same(expected, theirs.right)
    if ours.sign == "=" and not theirs.sign:
        return ours.is_name and _same(ours.right, given)
    if ours.variable and theirs.variable and ours.variable != theirs.variable:
        return False
    one, two = ours.as_set(), theirs.as_set()
    if one is None or two is None:
        return _proportional(ours, theirs) if ours.sign and theirs.sign else False
    return _same_set(one, two)


class _Statement:
    """A text cut at its relation signs."""

    def __init__(self, text: str) -> None:
        self.text = text
        signs = _RELATION.findall(text)
        self.sign = ("=" if set(signs) == {"="} else next(sign for sign in signs if sign != "=")) if signs else ""
        sides = [tidy(side) for side in _RELATION.split(text)]
        self.left, self.right = sides[0], sides[-1]
        self.chain = sides
        self.is_name = bool(_NAME.fullmatch(self.left) or _CALL.fullmatch(self.left))
        self.variable = self._variable() if self.sign and self.sign != "=" else ""

    def _variable(self) -> str:
        """The one letter that an inequality bounds."""
        sides = [tidy(side) for part in split(self.text) for side in _RELATION.split(part)]
        names = {bare(side) for side in sides if _NAME.fullmatch(side) and side not in (r"\infty", r"\pi", "e")}
        return names.pop() if len(names) == 1 else ""

    def as_set(self) -> Any:
        """The set of numbers that it allows: "or" joins inequalities, "and" limits each by the others."""
        parts = split(self.text)
        if len(parts) > 1 and all(_RELATION.search(part) for part in parts):
            sets = [_Statement(tidy(part)).as_set() for part in parts]
            if any(part is None for part in sets):
                return None
            both = sympy.Intersection(*sets)
            either = re.search(r"(?<![A-Za-z\\])or(?![A-Za-z])", self.text) or both is S.EmptySet
            return sympy.Union(*sets) if either else both
        if not self.sign:
            return _as_set(_read(self.text))
        if r"\in" in _RELATION.findall(self.text):
            return _as_set(_read(self.right)) if len(self.chain) == 2 and self.is_name else None
        value = _read(self.text)
        return _as_set(value)


def _names_value(statement: _Statement) -> bool:
    """Whether ``left = right`` gives the value of something: a name, an expression of several, or a sum that is right.

    ``2x + 3 = 5`` has still to be solved, and gives none.
    """
    if statement.is_name or notation.words(statement.left):
        return True
    left, right = _read(statement.left), _read(statement.right)
    if isinstance(left, AppliedUndef):
        return True
    if left is None:
        return not re.search(r"[+\-*/^\d]", statement.left)
    if not getattr(left, "free_symbols", set()):
        return right is not None and _same_value(left, right)
    return len(left.free_symbols) > 1 or left.is_Function


def _both_equations(ours: _Statement, theirs: _Statement) -> bool:
    if ours.is_name and theirs.is_name:
        calls = _CALL.fullmatch(ours.left), _CALL.fullmatch(theirs.left)
        right = theirs.right
        if calls[0] and calls[1] and calls[0][1] == calls[1][1] and calls[0][2] != calls[1][2]:
            right = re.sub(rf"(?<![A-Za-z\\]){calls[1][2]}(?![A-Za-z])", calls[0][2], right)
            return _same(ours.right, right)
        if bare(ours.left) == bare(theirs.left):
            return _same(ours.right, theirs.right)
        if not (_NAME.fullmatch(ours.left) and _NAME.fullmatch(theirs.left)):
            return False
        return bool(_free(ours.right)) and _proportional(ours, theirs)
    if ours.is_name and not _free(ours.right):
        return False  # x = 5 has to be solved for
    return _proportional(ours, theirs)


def _free(text: str) -> Any:
    return getattr(_read(text), "free_symbols", ()) or ()


def _proportional(ours: _Statement, theirs: _Statement) -> bool:
    """Equations (or inequalities) that differ by a factor that is constant (and of the right sign)."""
    if len(ours.chain) != 2 or len(theirs.chain) != 2:
        return False
    sides = [_read(side) for side in (*ours.chain, *theirs.chain)]
    if any(not isinstance(side, sympy.Expr) for side in sides):
        return False
    f, g = sides[0] - sides[1], sides[2] - sides[3]
    f, g = f.xreplace({_inexact: S.One}), g.xreplace({_inexact: S.One})
    flip = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\lt": ">", r"\gt": "<"}
    equal = ours.sign == theirs.sign
    opposite = flip.get(ours.sign) == theirs.sign
    if ours.sign in ("=", r"\ne"):
        opposite = equal
    if not (equal or opposite) or f.free_symbols != g.free_symbols or not f.free_symbols:
        return False
    if (equal and _zero(f - g)) or (opposite and _zero(f + g)):
        return True
    try:
        ratio = sympy.simplify(f / g)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    if not ratio.is_number or not ratio.is_finite or ratio == 0:
        return False
    return (equal and (ours.sign in ("=", r"\ne") or bool(ratio > 0))) or (opposite and bool(ratio < 0))


def _as_set(value: Any) -> Any:
    """The set of real numbers that an interval, an inequality or a union of such is; None for anything else."""
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import And, Or

    if value is None:
        return None
    if isinstance(value, sympy.Eq) and isinstance(value.rhs, sympy.Set):
        value = value.rhs
    value = value.xreplace({_inexact: S.One}) if isinstance(value, sympy.Basic) else value
    try:
        if isinstance(value, sympy.FiniteSet) and all(isinstance(item, Relational) for item in value.args):
            value = Or(*value.args)
        if isinstance(value, (Relational, And, Or)):
            return value.as_set() if len(value.free_symbols) == 1 else None
        return value.doit() if isinstance(value, sympy.Set) else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def _same_set(a: Any, b: Any) -> bool:
    """Sets by their pieces, whose ends are compared as numbers; tuples and open intervals of two by their ends."""
    if isinstance(a, sympy.Tuple) or isinstance(b, sympy.Tuple):
        if not all(isinstance(value, sympy.Tuple) or _is_open(value) for value in (a, b)):
            return False
        ends = [value.args if isinstance(value, sympy.Tuple) else (value.start, value.end) for value in (a, b)]
        return len(ends[0]) == len(ends[1]) and all(_same_value(x, y) for x, y in zip(*ends, strict=True))
    pieces = [_pieces(value) for value in (a, b)]
    if pieces[0] is None or pieces[1] is None:
        return bool(a == b)
    if len(pieces[0]) != len(pieces[1]):
        return False
    if len(pieces[0]) > 6:
        return bool(a == b)
    return any(
        all(_same_piece(x, y) for x, y in zip(pieces[0], order, strict=True)) for order in permutations(pieces[1])
    )


def _is_open(value: Any) -> bool:
    return isinstance(value, sympy.Interval) and bool(value.left_open and value.right_open)


def _pieces(value: Any) -> list[Any] | None:
    """Intervals and points of a set."""
    if isinstance(value, sympy.Expr):
        return [value]
    try:
        value = sympy.Union(value.doit(), evaluate=True) if isinstance(value, sympy.Set) else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    if value is S.Reals:
        value = sympy.Interval(-sympy.oo, sympy.oo)
    if value is S.EmptySet:
        return []
    parts = value.args if isinstance(value, sympy.Union) else (value,)
    pieces: list[Any] = []
    for part in parts:
        if isinstance(part, sympy.Interval):
            pieces.append(part)
        elif isinstance(part, sympy.FiniteSet):
            pieces += part.args
        else:
            return None
    return pieces


def _same_piece(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        return (
            (a.left_open, a.right_open) == (b.left_open, b.right_open)
            and _same_value(a.start, b.start)
            and _same_value(a.end, b.end)
        )
    return isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and _same_value(a, b)
