"""Equality of two answers. math-verify reads the expressions; this module decides which are equal.

``math_verify.verify`` rounds numbers to six places and drops differences below 1e-15, compares products of letters as
words and words as products, drops bases, takes any equation for its right-hand side, and holds equations without a
solution for equal: each calls wrong answers right. So numbers are compared exactly unless one is a decimal,
expressions by value at many points, and lists, tuples, sets, intervals and equations as such.
"""

from __future__ import annotations

import re

import sympy

from eopd.stages.verifiers import notation
from eopd.stages.verifiers import statements as choices
from eopd.stages.verifiers.notation import Plain, bare, base_numeral, closing, plain_number, split, tidy
from eopd.stages.verifiers.quantities import quantity, same_remarks, uncommented, unit_words
from eopd.stages.verifiers.statements import (
    CALL,
    NAME,
    RELATION,
    Statement,
    agree,
    free,
    is_name,
    names_value,
    proportional,
)
from eopd.stages.verifiers.values import near, number_of, read, same_set, same_value

MAX_ITEMS = 200

_NO_SOLUTION = frozenset({"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none"})
_ALL_REALS = frozenset({"all real numbers", "all reals", "real numbers", "all real x", "reals"})
_EMPTY = frozenset({r"\emptyset", r"\{\}", "{}"})
_THERE_IS = re.compile(
    r"(?:there (?:is|are|exists?)|(?:the |this )?(?:equation|inequality|system|problem) has|it has|we have) (?=no )"
)
_SYNONYMS = {"dne": "does not exist", "t": "true", "f": "false"}
_TIME = re.compile(r"(\d{1,2})\s*:\s*(\d{2})(?:\s*:\s*(\d{2}))?\s*([ap])?\.?\s*(?:m\.?)?", re.I)
_RATIO = re.compile(r"\s*:\s*|\\colon\s*")
_RADIANS = re.compile(r"\\pi(?![A-Za-z])|\\arc|\\(?:sin|cos|tan|cot)\s*\^")
"""In what is no number of degrees, whatever else it is: a degree sign may not be missing there."""
_APPROXIMATION = re.compile(r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])")
_SET_BUILDER = re.compile(
    r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![A-Za-z])|\||:)\s*([^{}]*(?:\\frac\{[^{}]*\}\{[^{}]*\}[^{}]*|\\sqrt\{[^{}]*\}[^{}]*)*)\\\}$"
)
_MODULUS = re.compile(r"\\pmod(?![A-Za-z])|\\[bp]?mod(?![A-Za-z])|(?<![A-Za-z])\(?(?:\\text\{\s*)?\(?mod(?![A-Za-z])")
_PAIRS = {"(": ")", "[": "]"}


def same_answer(reference: str, answer: str) -> bool:
    """True if ``answer`` equals ``reference``. May take unbounded time: call it where it can be killed."""
    expected, given = tidy(reference), tidy(answer)
    if not expected or not given:
        return False
    if bare(expected) == bare(given):
        return True
    for one in dict.fromkeys((expected, uncommented(expected))):
        for other in dict.fromkeys((given, uncommented(given))):
            remarks = expected[len(one) :], given[len(other) :]
            if same_remarks(*remarks) and _same(one, other):
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
    """Compare with a reference that is a letter of a choice, alone or before its text."""
    letter, labelled = choices.letter(expected), choices.labelled(expected)
    chosen = choices.chosen(given)
    if letter:
        return chosen[0] == letter if chosen else (None if "=" in given else False)
    if labelled:
        if chosen is None:
            return _same(labelled[1], given)
        return chosen[0] == labelled[0] and (not chosen[1] or _same(labelled[1], chosen[1]))
    return None


def _times(expected: str, given: str) -> bool | None:
    """Compare times of day and ratios."""
    one, other = (notation.TEXT.sub(r"\1", text).strip() for text in (expected, given))
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
    """Compare numerals if one names its base: a reference with a base is also given by its digits alone."""
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
    """Compare answers in words, and the sets that words name."""
    one, other = (_THERE_IS.sub("", text) if text else text for text in map(notation.words, (expected, given)))
    for names, signs in ((_NO_SOLUTION, _EMPTY), (_ALL_REALS, (r"\mathbb{R}", r"(-\infty,\infty)"))):
        named = [word in names or bare(text) in signs for word, text in ((one, expected), (other, given))]
        if any(named):
            if all(named):
                return True
            if names is _NO_SOLUTION and ((one if named[0] else other) is not None or _nested(expected, given)):
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


def _nested(expected: str, given: str) -> bool:
    """True if one text is the set that holds the empty set, which is not empty."""
    return any(bare(text) in (r"\{\emptyset\}", r"\{\{\}\}") for text in (expected, given))


def _residues(expected: str, given: str) -> bool | None:
    """Compare residues with their modulus: the same class of the same modulus."""
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
    """Compare lists that continue: the written items are the same, in order."""
    ours, theirs = split(expected), split(given)
    return len(ours) == len(theirs) > 1 and all(
        bare(a) == bare(b) or (r"\ldots" not in a + b and _leaf(a, b)) for a, b in zip(ours, theirs, strict=True)
    )


def _structures(expected: str, given: str) -> bool:
    """Compare lists, tuples, sets and intervals item by item; anything else as one expression."""
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
    """Return the kind of a structure (one, list, tuple, interval, set) and its items."""
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
    """True if every item is in the other set."""
    pairs = [[_is_set(a) == _is_set(b) and _same(a, b) for b in others] for a in items]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True))) and bool(items) == bool(others)


def _is_set(text: str) -> bool:
    """True if a text is written as a set: elements of a set are not the set."""
    return bare(text) in _EMPTY or _items(text)[0] == "set"


def _as_bags(items: list[str], others: list[str]) -> bool:
    """True if both hold the same items, each as often, in any order."""
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
    """Return name and value of ``x = 5``."""
    name, sign, value = (part.strip() for part in text.partition("="))
    return (bare(name), value) if sign and NAME.fullmatch(name) and not RELATION.search(value) else None


def _by_name(items: list[str], count: int) -> list[str]:
    """Return values of ``y=3, x=5`` in the order of the names; other items as they are."""
    pairs = [_assignment(item) for item in items]
    named = [pair for pair in pairs if pair]
    if len(named) != len(items) or len({name for name, _ in named}) != count:
        return items
    return [value for _, value in sorted(named)]


def _unnamed(items: list[str], others: list[str]) -> list[str]:
    """Return values of ``x=1, 2, 3`` or ``x=1, x=2`` if the other list names nothing, or names the first only."""
    pairs = [_assignment(item) for item in items]
    names = {pair[0] for pair in pairs if pair}
    if len(names) != 1 or pairs[0] is None:
        return items
    other_names = {pair[0] for item in others if (pair := _assignment(item))}
    if other_names - names:
        return items
    return [pair[1] if pair else item for pair, item in zip(pairs, items, strict=True)]


def _by_coordinate(text: str) -> str:
    """Rewrite ``(x,y)=(5,3)`` as ``x=5, y=3``."""
    left, sign, right = (part.strip() for part in text.partition("="))
    (kind, names), (other_kind, values) = (_items(side) if sign else ("", []) for side in (left, right))
    if kind != "tuple" or other_kind != "tuple" or len(names) != len(values) or not all(map(NAME.fullmatch, names)):
        return text
    return ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))


# One expression


def _leaf(expected: str, given: str) -> bool:
    """Compare two answers that are one number, expression, equation, inequality, set or matrix each."""
    if bare(expected) == bare(given):
        return True
    chains = [_APPROXIMATION.split(text) for text in (expected, given)]
    if any(len(chain) > 1 for chain in chains):
        sides = [[tidy(side) for side in chain] for chain in chains]
        sides = [chain[1:] if len(chain) > 1 and is_name(chain[0]) else chain for chain in sides]
        return all(map(_coherent, chains)) and any(_leaf(a, b) for a in sides[0] for b in sides[1] if a and b)
    (core, unit), (other, other_unit) = quantity(expected, None), quantity(given, unit_words(expected))
    if {unit, other_unit} == {"deg", None} and _RADIANS.search(core + other):
        return False
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
    if "=" in core or "=" in other or RELATION.search(core) or RELATION.search(other):
        verdict = _equations(core, other)
        if verdict is not None:
            return verdict
    if (unit is None) != (other_unit is None) and (_variables(core) or _variables(other)):
        core, other = expected, given  # what looks like a unit may be a factor
    a, b = read(core), read(other)
    return a is not None and b is not None and same_value(a, b)


def _coherent(chain: list[str]) -> bool:
    """True if the sides of an approximate equality are numbers near each other; the first may be a name of them."""
    sides = [tidy(side) for part in chain for side in re.split(r"(?<!\\)=", part)]
    sides = [side for place, side in enumerate(sides) if side and not (place == 0 and is_name(side))]
    if len(chain) < 2 or len(sides) < 2:
        return True
    cores = [quantity(side, None)[0] for side in sides]
    steps = [number.step for number in map(plain_number, cores) if number and number.step]
    numbers = [number_of(core) for core in cores]
    if any(number is None for number in numbers):
        return False
    reach = max(abs(numbers[0]) / 50, *(sympy.Rational(step.numerator, step.denominator) for step in steps), 0)
    return all(abs(number - numbers[0]) <= reach for number in numbers)


def _same_plain(one: Plain, two: Plain) -> bool:
    """Compare numbers as they are written. A whole percentage is also its number without the sign, as in
    math-verify."""
    a, b = one.value, two.value
    if one.percent != two.percent:
        percentage = one if one.percent else two
        if percentage.step is None and percentage.value.denominator == 1 and a == b:
            return True
    a, b = (number.value / 100 if number.percent else number.value for number in (one, two))
    steps = [number.step / 100 if number.percent else number.step for number in (one, two) if number.step]
    return a == b or (bool(steps) and near(a, b, max(steps)))


def _variables(text: str) -> bool:
    value = read(text)
    return value is None or bool(getattr(value, "free_symbols", ()))


# Equations and inequalities


def _equations(expected: str, given: str) -> bool | None:
    """Compare answers of which at least one is an equation, an inequality or a membership."""
    ours, theirs = Statement(expected), Statement(given)
    if ours.sign == "=" and theirs.sign == "=":
        return _both_equations(ours, theirs)
    if not ours.sign and theirs.sign == "=":
        return names_value(theirs) and agree(theirs) and _same(expected, theirs.right)
    if ours.sign == "=" and not theirs.sign:
        return ours.is_name and _same(ours.right, given)
    if ours.variable and theirs.variable and ours.variable != theirs.variable:
        return False
    one, two = ours.as_set(), theirs.as_set()
    if one is None or two is None:
        return proportional(ours, theirs) if ours.sign and theirs.sign else False
    return same_set(one, two)


def _both_equations(ours: Statement, theirs: Statement) -> bool:
    if ours.is_name and theirs.is_name:
        if not agree(theirs):
            return False
        calls = CALL.fullmatch(ours.left), CALL.fullmatch(theirs.left)
        right = theirs.right
        if calls[0] and calls[1] and calls[0][1] == calls[1][1] and calls[0][2] != calls[1][2]:
            right = re.sub(rf"(?<![A-Za-z\\]){calls[1][2]}(?![A-Za-z])", calls[0][2], right)
            return _same(ours.right, right)
        if bare(ours.left) == bare(theirs.left):
            return _same(ours.right, theirs.right)
        if not (NAME.fullmatch(ours.left) and NAME.fullmatch(theirs.left)):
            return False
        return bool(free(ours.right)) and proportional(ours, theirs)
    if ours.is_name and not free(ours.right):
        return False  # x = 5 has to be solved for
    return proportional(ours, theirs)
