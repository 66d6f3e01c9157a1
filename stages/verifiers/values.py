"""Expressions as the parser of math-verify reads them, and equality of their values."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import permutations
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from sympy import S
from sympy.core.function import AppliedUndef

from eopd.stages.verifiers.notation import plain_number

ABSOLUTE = Fraction(1, 2_000_000)
"""How far a decimal may be from what it stands for: half of the sixth place, as in math-verify."""
RELATIVE = Fraction(1, 100_000)
"""The same as a share of the number: without it six places would call every tiny number equal."""
DIGITS = 50
"""Digits to which numbers that are not rational are compared before they are compared by algebra."""
_UNREADABLE = re.compile(
    r"\.\d*\s*\\(?:overline|bar|dot)(?![A-Za-z])|(?<![_^\d.])\d+\s+[\d.]|\.\d*\.|\d\.\s*\\frac"
    r"|[\d}\]]\s*'|\"|\d\s*\^\s*\{?\s*\\prime|(?:^|[^\w\\.}])\d+(?:\.\d+)?\s*_|\)\s*_"
    r"|\\not(?![A-Za-z])|\\[hv]?phantom(?![A-Za-z])"
)
"""Notation that the parser reads as something else (repeating decimals, numbers side by side, two points) or
not at all (primes and subscripts of numbers, quotes, strokes, phantoms)."""
_TRANSPOSED = re.compile(r"\^\s*(?:T(?![A-Za-z])|\{\s*T\s*\})")
_NOTATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, boxed="none")
_CONVERSION = ConversionConfig(lowercase_symbols=False)


def near(a: Any, b: Any, step: Any = None) -> bool:
    """True if a decimal stands for the other number: nearer than its last place, and than both tolerances."""
    difference = abs(a - b)
    return bool(
        difference <= ABSOLUTE and difference <= RELATIVE * max(abs(a), abs(b)) and (step is None or difference < step)
    )


def read(text: str) -> Any:
    """Parse a text with math-verify's parser into a sympy object with exact numbers; None if it cannot be read.

    A factor ``INEXACT`` marks decimals. Unlike ``math_verify.parse`` this keeps capitals (``R`` is not ``r``) and
    takes no last letter for a unit.
    """
    text = _readable(text)
    number = plain_number(text)
    if number is not None:
        value = number.value / 100 if number.percent else number.value
        rational = sympy.Rational(value.numerator, value.denominator)
        return rational if number.step is None else sympy.Mul(rational, INEXACT, evaluate=False)
    try:
        return _exact(latex2sympy(text, is_real=True, normalization_config=_NOTATION, conversion_config=_CONVERSION))
    except MemoryError:
        raise  # of this process, which says nothing about the text
    except Exception:  # whatever a generated parser raises
        return None


INEXACT = sympy.Symbol("inexact")
"""A factor of one that marks decimals."""


def _readable(text: str) -> str:
    """Rewrite notation that the parser of math-verify does not know."""
    text = re.sub(r"(\d+)\s+(?=\\frac)", r"\1", text)
    text = re.sub(r"\)\s*(?=\()", r")\\cdot ", text)
    text = re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)", r"\1\\frac{\2}{\3}", text)
    if _UNREADABLE.search(text):
        return ""
    if "\\begin" not in text:
        text = _TRANSPOSED.sub("^{(T)}", text)  # of what is no matrix, a power
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
    replaced = {number: sympy.Rational(repr(float(number))) * INEXACT for number in floats}
    imaginary = {symbol: sympy.I for symbol in value.atoms(sympy.Symbol) if symbol.name == "i"}
    return value.xreplace(replaced | imaginary) if floats or imaginary else value


def number_of(text: str) -> Any:
    """Return the number that a text is, to 20 digits; None for other texts."""
    value = read(text)
    value = value.xreplace({INEXACT: S.One}) if isinstance(value, sympy.Expr) else None
    return None if value is None or value.free_symbols else _evaluated(_done(value), 20)


def same_value(a: Any, b: Any) -> bool:
    """True if two sympy objects have the same value."""
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return (
            isinstance(a, sympy.MatrixBase)
            and isinstance(b, sympy.MatrixBase)
            and a.shape == b.shape
            and all(same_value(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, (sympy.Set, sympy.Tuple)) or isinstance(b, (sympy.Set, sympy.Tuple)):
        return same_set(a, b)
    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr):
        return bool(a == b)
    inexact = INEXACT in a.free_symbols | b.free_symbols
    a, b = (value.xreplace({INEXACT: S.One}) for value in (a, b))
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    return _same_function(a, b, symbols, inexact) if symbols else _same_number(a, b, inexact)


def _same_number(a: sympy.Expr, b: sympy.Expr, inexact: bool) -> bool:
    a, b = _done(a), _done(b)
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return inexact and near(a, b)
    if a.is_infinite or b.is_infinite or a is S.NaN or b is S.NaN:
        return False
    x, y = _evaluated(a, DIGITS), _evaluated(b, DIGITS)
    if x is None or y is None:
        return False
    scale = max(abs(x), abs(y))
    if abs(x - y) > scale * sympy.Float(10) ** (10 - DIGITS):
        return inexact and near(x, y)
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
    """True if both are equal wherever both are real, at whole, fractional, positive and negative points; or by
    algebra."""
    if len(symbols) > 8 or a.has(AppliedUndef) or b.has(AppliedUndef):
        return zero(a - b)
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
    return agreed >= 3 if agreed else zero(a - b)


def zero(value: Any) -> bool:
    try:
        return bool(sympy.simplify(value) == 0)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False


def as_set(value: Any) -> Any:
    """Return the set of real numbers that an interval, an inequality or a union of such is; None for anything else."""
    from sympy.core.relational import Relational
    from sympy.logic.boolalg import And, Or

    if value is None:
        return None
    if isinstance(value, sympy.Eq) and isinstance(value.rhs, sympy.Set):
        value = value.rhs
    value = value.xreplace({INEXACT: S.One}) if isinstance(value, sympy.Basic) else value
    try:
        if isinstance(value, sympy.FiniteSet) and all(isinstance(item, Relational) for item in value.args):
            value = Or(*value.args)
        if isinstance(value, (Relational, And, Or)):
            return value.as_set() if len(value.free_symbols) == 1 else None
        return value.doit() if isinstance(value, sympy.Set) else None
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return None


def same_set(a: Any, b: Any) -> bool:
    """Compare sets by their pieces, whose ends are compared as numbers; tuples and open intervals of two by their
    ends."""
    if isinstance(a, sympy.Tuple) or isinstance(b, sympy.Tuple):
        if not all(isinstance(value, sympy.Tuple) or _is_open(value) for value in (a, b)):
            return False
        ends = [value.args if isinstance(value, sympy.Tuple) else (value.start, value.end) for value in (a, b)]
        return len(ends[0]) == len(ends[1]) and all(same_value(x, y) for x, y in zip(*ends, strict=True))
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
    """Return the intervals and points of a set."""
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
            and same_value(a.start, b.start)
            and same_value(a.end, b.end)
        )
    return isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr) and same_value(a, b)
