"""Spelling of mathematics: one spelling for texts that differ in LaTeX alone, and the values of plain numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 2000
"""Digits of a plain number. A longer one is left to the algebra, and to its time limit."""

_UNICODE = str.maketrans(
    {
        **dict(zip("−–—‐", "----", strict=True)),
        **dict(zip("０１２３４５６７８９（），：＝＋％．", "0123456789(),:=+%.", strict=True)),
        **dict(zip("²³⁴", ("^2", "^3", "^4"), strict=True)),
        "×": r"\times ",
        "⋅": r"\cdot ",
        "·": r"\cdot ",
        "÷": "/",
        "°": r"^\circ ",
        "…": r"\ldots ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "∓": r"\mp ",
        "≈": r"\approx ",
        "ℝ": r"\mathbb{R}",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        **dict.fromkeys("\u00a0\u2009\u202f\u3000\n\t\r", " "),
    }
)
_SPELLING = (
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"^\s*\*\*(?=\S)([^*]+)\*\*[.\s]*$"), r"\1"),
    (re.compile(r'^\s*"([^"]*)"\s*$'), r"\1"),
    (re.compile(r"~~(?=\S)[^~]*\S~~"), r"\\struck "),
    (re.compile(r"\*\*(?=\s*[-({\d])"), "^"),
    (re.compile(r"\*\*"), ""),
    (re.compile(r"\\(?:d|t|c)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{"), r"\\text{"),
    (re.compile(r"\\text\s+([A-Za-z])(?![A-Za-z])"), r"\\text{\1}"),
    (re.compile(r"\\text\{\s*,?\s*(and|or|;|,)\s*\}"), r" \1 "),
    (re.compile(r"\\text\{\s*([-+]?[\d.,/]+\s*%?|,|\()\s*\}"), r"\1"),
    (
        re.compile(
            r"\\text\{\s*\}|\\(?:(?:display|text)style|limits|nonumber|tiny|small|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
        ),
        "",
    ),
    (re.compile(r"^\s*\\text\{\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?", re.IGNORECASE), r"\\text{"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|\{,\\!\}|,\\!|~)\s*(?=\d{3}(?!\d))"), ","),
    (re.compile(r"^\s*(-?\d{1,3})((?: \d{3})+)\s*$"), lambda number: number[0].strip().replace(" ", ",")),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;: ]|q?quad(?![A-Za-z]))|~"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\(?:le|leq)slant(?![A-Za-z])|\\leq(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:ge|geq)slant(?![A-Za-z])|\\geq(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|!=|\\not\s*="), r"\\ne "),
    (re.compile(r"\\not\s*\\in(?![A-Za-z])"), r"\\notin "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\[lcv]?dots[cbmi]?(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"(?<=[\d})])\s*\\(?:text)?(?:degrees?|deg)(?![A-Za-z])(?:\{\})?"), r"^\\circ "),
    (re.compile(r"\\(?:degree|deg)(?![A-Za-z])|\{\\circ\}"), r"\\circ "),
    (re.compile(r"(?<=\d)\s*\\circ\s*$"), r"^\\circ "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), r"^\\circ "),
    (re.compile(r"\\(?:l|r)(?:brace)(?![A-Za-z])"), lambda brace: r"\{" if "lb" in brace[0] else r"\}"),
    (re.compile(r"\\l(?:angle)(?![A-Za-z])"), r"\\langle "),
    (re.compile(r"(?<!\\)\\%"), "%"),
    (re.compile(r"\s*(?:\\text\{\s*(?:percent|per cent|pct)\s*\}|\b(?:percent|per cent|pct)\b)"), "%"),
)
_MARKS = re.compile(r"(?<!\\)\$|^[\s.,;:]+(?!\d)|[\s,;:]+$|(?<!\\)\.\s*$|(?<!\d)\.$")
_FRAC = re.compile(r"\\frac\s*(?:\{\s*([-+]?[\d.]+)\s*\}|(\d))\s*(?:\{\s*([-+]?[\d.]+)\s*\}|(\d))")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s+|(?=\\frac)))?(?:\(?(?P<over>[-+]?\d+)\)?\s*/\s*\(?(?P<under>\d+)\)?"
    rf"|(?P<number>{_DIGITS}))\s*(?:(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,4}})\s*\}}?)?\s*(?P<percent>%?)"
)
_REPEATING = re.compile(r"([-+]?)(\d{0,50})\.(\d{0,50})\s*\\(?:overline|bar|dot)\s*\{?(\d{1,50})\}?")
_BASE = re.compile(
    r"(?:\\text\{)?\(?(?P<digits>-?[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\)?\}?\s*"
    r"(?:_\s*\{?\s*(?:\\text\s*\{)?\s*(?:base\s*)?(?P<under>\d+|[a-z]+)\s*\}*"
    r"|\(?\s*(?:\\text\s*\{)?\s*\(?(?:in\s+)?base[\s}\-]*(?P<named>\d+|[a-z]+)\s*\}?\s*\)?\}?)"
)
_COUNTED = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
"""
NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTED.split())}

_WORDS = re.compile(r"[^\W\d_]+(?:(?:['’-]| +(?:& +)?)[^\W\d_]+)*['’]?")
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


@dataclass(frozen=True)
class Plain:
    """A number as it is written.

    ``step`` is the value of the last decimal, and None for a number without decimals; ``percent``: whether a percent
    sign follows (``value`` is the number before it).
    """

    value: Fraction
    step: Fraction | None = None
    percent: bool = False


def tidy(text: str) -> str:
    """Normalise spelling: no delimiters of mathematics, spacing, sizes, fonts and closing punctuation."""
    text = text.translate(_UNICODE)
    for pattern, spelling in _SPELLING:
        text = pattern.sub(spelling, text)
    text = re.sub(r"(?<!\\)\\+\s*$", "", text)  # a space or a break that was cut
    for _ in range(3):
        text = _MARKS.sub("", text).strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def bare(text: str) -> str:
    """Reduce a tidy text for a comparison character by character: without fonts, braces of one token and white
    space."""
    text = re.sub(r"\{([A-Za-z0-9])\}", r"\1", TEXT.sub(r"\1", text))
    if re.search(r"\d,\s+\d{3}(?!\d)", text):  # 1, 234 are two numbers, but (1,234) are so too
        text = _apart(text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _apart(text: str) -> str:
    """Replace commas before a space outside brackets by semicolons."""
    places, depth = [], 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        places.append(";" if sign == "," and depth == 0 and text[place + 1 : place + 2].isspace() else sign)
    return "".join(places)


def closing(text: str, opening: int) -> int:
    """Return the position of the bracket that closes the one at ``opening``, or -1. Brackets of any kind close each
    other."""
    depth = 0
    for place in range(opening, len(text)):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
            if depth == 0:
                return place
    return -1


def split(text: str, separators: str = ",;") -> list[str]:
    """Split a text at separators, and at the words "and" and "or", outside brackets."""
    parts, depth, start = [], 0, 0
    place = 0
    while place < len(text):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
        elif depth == 0:
            word = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])").match(text, place)
            if text[place] in separators or word:
                parts.append(text[start:place])
                place = start = word.end() if word else place + 1
                continue
        place += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def plain_number(text: str) -> Plain | None:
    """Return the number that a tidy text is: integer, decimal, fraction, mixed number, power of ten, or percentage."""
    text = _FRAC.sub(lambda frac: f" {frac[1] or frac[2]}/{frac[3] or frac[4]} ", text).strip()
    text = re.sub(r"^([-+])\s+", r"\1", text)
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        whole, once, again = repeating[2] or "0", repeating[3], repeating[4]
        value = Fraction(int(whole + once + again) - int(whole + once), 10 ** len(once) * (10 ** len(again) - 1))
        return Plain(-value if repeating[1] == "-" else value)
    if len(text) > MAX_DIGITS or not any(character.isdigit() for character in text):
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return _decimal_fraction(text)
    sign = -1 if match["sign"] == "-" else 1
    step = None
    if match["number"] is not None:
        if match["whole"] is not None:
            return None
        digits = match["number"].replace(",", "")
        value = Fraction(digits.rstrip(".") or 0)
        decimals = len(digits.partition(".")[2])
        step = Fraction(1, 10**decimals) if decimals else None
    else:
        over, under = int(match["over"]), int(match["under"])
        if under == 0 or (match["whole"] is not None and not 0 <= over < under):
            return None
        value = int(match["whole"] or 0) + Fraction(over, under)
    if match["power"]:
        scale = Fraction(10) ** int(match["power"])
        value, step = value * scale, step * scale if step else None
    return Plain(sign * value, step, bool(match["percent"]))


def _decimal_fraction(text: str) -> Plain | None:
    """Parse fractions of decimals such as ``1.5/2`` or ``-0.25/100``."""
    over, slash, under = text.partition("/")
    try:
        return Plain(Fraction(over.strip()) / Fraction(under.strip())) if slash else None
    except (ValueError, ZeroDivisionError):
        return None


def base_numeral(text: str) -> tuple[str, int] | None:
    """Digits and base of a numeral that names its base: ``1101_2``, ``(52)_{\\text{eight}}``, ``21 (base 3)``."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    name = match["under"] or match["named"]
    base = int(name) if name.isdigit() and len(name) < 4 else NUMBER_WORDS.get(name, 0)
    digits = match["digits"].lower()
    if not 2 <= base <= 36 or not any(digit.isdigit() for digit in digits):
        return None
    return (digits, base) if all(int(digit, 36) < base for digit in digits if digit.isalnum()) else None


def words(text: str) -> str | None:
    """Return the lower-case words of a tidy text of words alone, without an article; None for a text with mathematics.

    A single letter is no word unless a font of text says so; two and more always are: a product is not read from them.
    """
    plain = TEXT.sub(r" \1 ", text)
    plain = re.sub(r"[.,!\"“”]+(?=\s|$)", "", plain).strip()
    if not _WORDS.fullmatch(plain) or (len(plain) > 1 and not re.search(r"[^\W\d_]{2}", plain)):
        return None
    if plain.lower() in ("pi", "e", "i", "") or (len(plain) == 1 and "\\text" not in text):
        return None
    return re.sub(r"^(?:the|an|a)\s+(?=\S{2})", "", " ".join(re.sub("[-’']", " ", plain).lower().split()))
