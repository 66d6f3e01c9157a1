"""Equations, inequalities and memberships: their sides, and the numbers that they admit."""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy import S
from sympy.core.function import AppliedUndef

from eopd.stages.verifiers import notation
from eopd.stages.verifiers.notation import TEXT, bare, split, tidy
from eopd.stages.verifiers.quantities import quantity
from eopd.stages.verifiers.values import INEXACT, as_set, read, same_value, zero

# -- choices ----------------------------------------------------------------------------------------------------------

# Multiple-choice letters: which one a text chooses, and the text of the option after it.


_LETTER = re.compile(r"\(?([A-J])\)?")
_LABELLED = re.compile(r"(?:\(([A-J])\)\s*|([A-J])[.):]\s+)(\S.*)", re.DOTALL)
_CHOSEN = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\(([A-J])\)|([A-J])[.):])(?P<text>[\s\\~].*)?"
    r"|(?:(?i:option|choice|answer)\s+)?([A-J])",
    re.DOTALL,
)
_AFFIRMED = re.compile(r"\s*is\s+(?:the\s+)?(?:correct|right|true|final)?(?:\s*(?:answer|choice|option|one))?\W*")
_OTHER = re.compile(  # a second letter, or words that take the first one back
    r"(?<![A-Za-z])(?:\([A-J]\)|[A-J](?:[):](?!\S)|\.(?=\s|$)))"
    r"|(?:[,;/&|]|\\(?:lor|vee|land|wedge|to|and|or)\b|\b(?:or|and|nor|not|but|than|to|vs|versus)\b)\s*"
    r"(?:(?i:option|choice|answer|is|also|maybe|perhaps|not)\s+)*[A-J](?![A-Za-z(])"
    r"|(?:^|\s)[A-J]\s+[-+\d\\$]"
    r"|^\W*(?:or|and|nor|but|is|isn|are|aren|was|wasn|were|will|would|can|cannot|could|couldn|does|doesn|do|did|didn|has"
    r"|hasn|may|might|must|should|shouldn|seems|looks|appears|if|unless|maybe|perhaps|probably|possibly)\b"
    r"|^\W*not\W*(?:$|(?:correct|right|true|valid|possible|it|this|that|the|chosen|an?)\b)"
    r"|\b(?:wrong|incorrect|invalid|untrue|rejected|eliminated|excluded|discarded|mistaken|ruled|unlikely|error)\b",
    re.DOTALL,
)


def letter(text: str) -> str | None:
    """Return the letter if a tidy text is nothing else."""
    match = _LETTER.fullmatch(_plain(text))
    return match[1] if match else None


def labelled(text: str) -> tuple[str, str] | None:
    """Letter and text of an option: ``(B) 12``, ``\\text{B. } 12``."""
    match = _LABELLED.fullmatch(_plain(text))
    if match is None or len(match[3]) >= 200 or match[3].startswith((",", "\\cup", "\\cap", "\\setminus", "=")):
        return None
    return match[1] or match[2], tidy(match[3])


def chosen(text: str) -> tuple[str, str] | None:
    """Return the one letter that a tidy text chooses and its text for the option, which may be empty.

    None for a text that chooses none, or names a second letter, or takes the first back.
    """
    match = _CHOSEN.fullmatch(_plain(text))
    if match is None:
        return None
    rest = tidy(match["text"] or "")
    name = next(group for group in (match[1], match[2], match[4]) if group)
    if _AFFIRMED.fullmatch(rest):
        return name, ""
    symbols = re.sub(r"\\[A-Za-z]+|\b(?:and|or|not)\b", "", rest)
    if _OTHER.search(rest) or re.fullmatch(r"[\W_]*[A-J][\W_]*", symbols):
        return None
    return name, rest


def _plain(text: str) -> str:
    return TEXT.sub(r"\1", text).strip()


# -- equations --------------------------------------------------------------------------------------------------------

# The equations of a written solution, so that rewording it makes no new one.


_LATEX = (  # spelling that says nothing of the mathematics
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]"), " "),
    (re.compile(r"\\[()\[\]]|\\?\$|&"), " "),
    (re.compile("[−–]"), "-"),
)
_BULLET = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])[ \t]+", re.MULTILINE)
_BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_AROUND = re.compile(r" ?([=+\-*/^<>]) ?")


def equations(text: str) -> list[str]:
    """Return the distinct equations of a text, sorted: words, order, repetition and the spelling of signs do not count.

    ``Half of 48 is 48 / 2 = 24, so 48 + 24 = 72`` holds ``48+24=72`` and ``48/2=24``.
    """
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    for pattern in (_BULLET, _BOLD, _WORD):
        text = pattern.sub(" ", text)
    text = re.sub(r"[ \t]+", " ", _THOUSANDS.sub("", text))
    text = _AROUND.sub(r"\1", text)
    pieces = (piece.strip(".,;:!?=") for piece in re.split(r"[\s,;]+", text))
    return sorted({piece for piece in pieces if "=" in piece})


# -- statements -------------------------------------------------------------------------------------------------------

RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|in)(?![A-Za-z])|[<>]|(?<!\\)=")
NAME = re.compile(r"[A-Za-z]|\\[A-Za-z]+|[A-Za-z]_\{?[^{}]+\}?|\\[A-Za-z]+_\{?[^{}]+\}?")
CALL = re.compile(r"([A-Za-z])\s*\(\s*([A-Za-z])\s*\)")


class Statement:
    """A text cut at its relation signs."""

    def __init__(self, text: str) -> None:
        self.text = text
        signs = RELATION.findall(text)
        self.sign = ("=" if set(signs) == {"="} else next(sign for sign in signs if sign != "=")) if signs else ""
        sides = [tidy(side) for side in RELATION.split(text)]
        self.left, self.right = sides[0], sides[-1]
        self.chain = sides
        self.is_name = bool(NAME.fullmatch(self.left) or CALL.fullmatch(self.left))
        self.variable = self._variable() if self.sign and self.sign != "=" else ""

    def _variable(self) -> str:
        """Return the one letter that an inequality bounds."""
        sides = [tidy(side) for part in split(self.text) for side in RELATION.split(part)]
        names = {bare(side) for side in sides if NAME.fullmatch(side) and side not in (r"\infty", r"\pi", "e")}
        return names.pop() if len(names) == 1 else ""

    def as_set(self) -> Any:
        """Return the set of numbers that the statement admits: "or" joins inequalities, "and" limits each by the
        others."""
        parts = split(self.text)
        if len(parts) > 1 and all(RELATION.search(part) for part in parts):
            sets = [Statement(tidy(part)).as_set() for part in parts]
            if any(part is None for part in sets):
                return None
            both = sympy.Intersection(*sets)
            either = re.search(r"(?<![A-Za-z\\])or(?![A-Za-z])", self.text) or both is S.EmptySet
            return sympy.Union(*sets) if either else both
        if not self.sign:
            return as_set(read(self.text))
        if r"\in" in RELATION.findall(self.text):
            return as_set(read(self.right)) if len(self.chain) == 2 and self.is_name else None
        value = read(self.text)
        return as_set(value)


def names_value(statement: Statement) -> bool:
    """True if ``left = right`` gives the value of something: a name, an expression of several, or a sum that is right.

    ``2x + 3 = 5`` has still to be solved, and gives none.
    """
    if statement.is_name or notation.words(statement.left):
        return True
    left, right = read(statement.left), read(statement.right)
    if isinstance(left, AppliedUndef):
        return True
    if left is None:
        return not re.search(r"[+\-*/^\d]", statement.left)
    if not getattr(left, "free_symbols", set()):
        return right is not None and same_value(left, right)
    return len(left.free_symbols) > 1 or left.is_Function


def free(text: str) -> Any:
    return getattr(read(text), "free_symbols", ()) or ()


def is_name(text: str) -> bool:
    """True if a tidy text names something: ``x``, ``a_1``, ``f(x)``; the names of numbers do not."""
    return bool(NAME.fullmatch(text) or CALL.fullmatch(text)) and text not in (
        "e",
        "i",
        r"\pi",
        r"\infty",
        r"\emptyset",
    )


def agree(statement: Statement) -> bool:
    """True if the sides in a chain of equal signs are the same: ``x = 5+2 = 7``, and not ``x = 8 = 7``."""
    *between, last = statement.chain[1:]
    values = [read(quantity(side, None)[0]) for side in between if not is_name(side)]
    return not values or all(value is None or same_value(value, read(quantity(last, None)[0])) for value in values)


def proportional(ours: Statement, theirs: Statement) -> bool:
    """True for equations (or inequalities) that differ by a factor that is constant (and of the right sign)."""
    if len(ours.chain) != 2 or len(theirs.chain) != 2:
        return False
    sides = [read(side) for side in (*ours.chain, *theirs.chain)]
    if any(not isinstance(side, sympy.Expr) for side in sides):
        return False
    f, g = sides[0] - sides[1], sides[2] - sides[3]
    f, g = f.xreplace({INEXACT: S.One}), g.xreplace({INEXACT: S.One})
    flip = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\lt": ">", r"\gt": "<"}
    equal = ours.sign == theirs.sign
    opposite = flip.get(ours.sign) == theirs.sign
    if ours.sign in ("=", r"\ne"):
        opposite = equal
    if not (equal or opposite) or f.free_symbols != g.free_symbols or not f.free_symbols:
        return False
    if (equal and zero(f - g)) or (opposite and zero(f + g)):
        return True
    try:
        ratio = sympy.simplify(f / g)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    if not ratio.is_number or not ratio.is_finite or ratio == 0:
        return False
    return (equal and (ours.sign in ("=", r"\ne") or bool(ratio > 0))) or (opposite and bool(ratio < 0))
