"""How mathematics is spelled: one spelling for texts that differ in LaTeX alone, and what plain numbers say."""

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
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\[lcv]?dots[cbmi]?(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\(?:degree|deg)(?![A-Za-z])|\{\\circ\}"), r"\\circ "),
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
_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:\\\$|\\text\{\s*(?:US)?\\?\$\s*\}|US\\?\$|[€£¥₹₩]|\\pounds|\\euro|(?:USD|EUR|Rs\.?)\s)\s*"
)
_CURRENCY_NAMES = {
    "$": "usd",
    "\\$": "usd",
    "€": "eur",
    "£": "gbp",
    "¥": "cny",
    "₹": "inr",
    "\\pounds": "gbp",
    "\\euro": "eur",
}
_UNITS = {  # spellings of one unit
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "in": "in inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards",
    "mi": "mi mile miles",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ms": "ms millisecond milliseconds",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "l": "l L liter liters litre litres",
    "gal": "gal gallon gallons",
    "deg": "degree degrees deg",
    "rad": "rad rads radian radians",
    "usd": "dollar dollars usd USD buck bucks",
    "cent": "cent cents ¢",
    "eur": "euro euros eur EUR",
    "gbp": "gbp GBP",
    "cny": "元 yuan rmb RMB CNY",
    "mph": "mph",
    "km/h": "kph kmh kmph",
    "K": "K kelvin kelvins",
    "C": "celsius Celsius",
    "F": "fahrenheit Fahrenheit",
    "N": "N newton newtons",
    "J": "J joule joules",
    "kJ": "kJ kilojoule kilojoules",
    "W": "W watt watts",
    "kW": "kW kilowatt kilowatts",
    "V": "V volt volts",
    "A": "A amp amps ampere amperes",
    "Hz": "Hz hertz",
    "Pa": "Pa pascal pascals",
    "ohm": "ohm ohms",
    "erg": "erg ergs",
    "eV": "eV",
    "mol": "mol mole moles",
    "nm": "nm nanometer nanometers",
    "acre": "acre acres",
    "unit": "unit units",
}
UNITS = {spelling: unit for unit, spellings in _UNITS.items() for spelling in spellings.split()}
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|mod|base|factorial|squared|cubed|times|half|halves|thirds?|"
    r"quarters?|tenths?|plus|minus|not|if|when|for|where|than|least|most|or|and|to|between|of|except|remainder|only)\b"
    r"|[百千万億亿]|[0-9=<>+*\\]"
)
_UNIT_WORD = re.compile(r"[A-Za-z¢]+")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_COMMENT = re.compile(
    r"(?:\s*\\text\{\s*\((?!\s*base)[^{}]*[A-Za-z]{3}.*|\s+\((?!\s*base)(?=[^()]*[A-Za-z]{3})[^()]*\)"
    r"|[,;]\s*(?:\\text\{[^{}]*\}\s*)?\(?[A-Za-z]\s*\\in\s*\\mathbb\s*\{?[A-Z]\}?[^,;=]*$"
    r"|\s*(?:\\text\{)?,?\s*\bfor\s+(?:any|all|every|some|each|arbitrary)\b.*)$"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
_SCALE = re.compile(
    rf"(?P<core>.*\d)\s*(?:\\text\{{)?\s*(?P<scale>{'|'.join(_SCALES)})(?![a-z])\s*\}}?(?P<rest>.*)", re.DOTALL
)
_CJK = re.compile(r"(?<=[\d}%])\s*(?:\\text\{)?\s*[\u4e00-\u9fff]+(?:\^\{?\d\}?)?\s*\}?$")


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
    """One spelling: without delimiters of mathematics, spacing, sizes, fonts and closing punctuation."""
    text = text.translate(_UNICODE)
    for pattern, spelling in _SPELLING:
        text = pattern.sub(spelling, text)
    for _ in range(3):
        text = _MARKS.sub("", text).strip()
    while text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def bare(text: str) -> str:
    """A tidy text for a comparison character by character: fonts, braces of one token and white space do not count."""
    text = re.sub(r"\{([A-Za-z0-9])\}", r"\1", _TEXT.sub(r"\1", text))
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def closing(text: str, opening: int) -> int:
    """Place of the bracket that closes the one at ``opening``, or -1. Brackets of any kind close each other."""
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
    """Parts of a text between separators, and the words "and" and "or", that stand in no bracket."""
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
    """The number that a tidy text is: integer, decimal, fraction, mixed number, power of ten, or percentage."""
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
    """Such as ``1.5/2`` or ``-0.25/100``."""
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
    """Lower-case words of a tidy text that is nothing else, without an article; None for a text with mathematics.

    A single letter is no word unless a font of text says so; two and more always are: a product is not read from them.
    """
    plain = _TEXT.sub(r" \1 ", text)
    plain = re.sub(r"[.,!?\"“”]+(?=\s|$)", "", plain).strip()
    if not _WORDS.fullmatch(plain) or (len(plain) > 1 and not re.search(r"[^\W\d_]{2}", plain)):
        return None
    if plain.lower() in ("pi", "e", "i", "") or (len(plain) == 1 and "\\text" not in text):
        return None
    return re.sub(r"^(?:the|an|a)\s+(?=\S{2})", "", " ".join(re.sub("[-’']", " ", plain).lower().split()))


def uncommented(text: str) -> str:
    """A tidy text without a remark in words after it: ``5 \\text{ (at } x=1)``, ``f(x)=cx \\text{ for any } c``."""
    return _COMMENT.sub("", text).strip() or text


def quantity(text: str) -> tuple[str, str | None]:
    """Number and unit of a tidy text. The unit is None for a text without one, "?" for one in other words."""
    core, unit = text, None
    scaled = _SCALE.fullmatch(core)
    if scaled:
        number = plain_number(tidy(scaled["core"]))
        if number:
            core = f"{number.value * 10 ** _SCALES[scaled['scale']]}{scaled['rest']}"
    money = _CURRENCY.match(core)
    if money:
        core = money[1] + core[money.end() :]
        sign = money[0].strip("-+ ").replace("\\text{", "").strip("} ")
        unit = _CURRENCY_NAMES.get(sign, "?")
    chinese = _CJK.search(core)
    if chinese and not _NO_UNIT.search(re.sub(r"\\text|\^\{?\d\}?", "", chinese[0])):
        name = re.sub(r"\\text|[{}\s]", "", chinese[0])
        return tidy(core[: chinese.start()]), UNITS.get(name, "?")
    degrees = re.sub(r"\^\\circ\s*(?:\\text\{\s*)?([CF]?)\s*\}?$", "", core)
    if degrees != core:
        temperature = re.search(r"([CF])\s*\}?$", core)
        return tidy(degrees), temperature[1] if temperature else "deg"
    end = _unit_start(core)
    if end is not None:
        known = unit_name(core[end:])
        return tidy(core[:end]), unit if known is None or (known == "?" and unit) else known
    return tidy(core), unit


def _unit_start(text: str) -> int | None:
    """Where the unit of a quantity begins: text in a font of its own, or known or plain words after a number."""
    font = re.search(
        r"\s*\\text\{[^{}]*\}(?:\s*/\s*\\text\{[^{}]*\}|\s*\\cdot\s*\\text\{[^{}]*\}|\s*\^\s*\{?-?\d\}?)*$", text
    )
    if font and font.start() > 0:
        name = " ".join(_TEXT.findall(font[0]))
        first = text[: font.start()].rstrip()
        if not _NO_UNIT.search(name) and first and first[-1] not in "+-*/^_=<>({[,":
            return font.start()
        return None
    tail = re.search(
        r"(?<=[\d.}%)])(?P<space>\s*)(?P<unit>[A-Za-z¢][A-Za-z¢ /\-]*(?:\^\{?-?\d\}?)?(?:/[a-z]+(?:\^\{?-?\d\}?)?)?)$",
        text,
    )
    if tail is None or plain_number(tidy(text[: tail.start()])) is None or _NO_UNIT.search(tail["unit"].split("^")[0]):
        return None
    names = _UNIT_WORD.findall(tail["unit"])
    known = all(name in UNITS or name in ("per", "square", "cubic", "sq", "cu") for name in names)
    single = max(map(len, names)) == 1
    if known and (not single or tail["space"]):
        return tail.start()
    return tail.start() if tail["space"] and min(map(len, names)) > 1 and max(map(len, names)) > 2 else None


def unit_name(text: str) -> str | None:
    """One name of a unit however it is spelled: ``square inches`` and ``inches^2`` are ``in^2``; "?" if unknown."""
    text = _TEXT.sub(r" \1 ", text).replace("{", "").replace("}", "").strip(" .")
    if not text:
        return None
    text = re.sub(r"\b(?:sq\.?|square)\s+(\w+)", r"\1^2", text)
    text = re.sub(r"\b(?:cu\.?|cubic)\s+(\w+)", r"\1^3", text)
    text = re.sub(r"\s+per\s+", "/", text)
    text = re.sub(r"\s*([/^])\s*", r"\1", text)
    parts = re.fullmatch(r"([A-Za-z¢元]+)(\^-?\d)?(?:/([A-Za-z]+)(\^-?\d)?)?", text)
    if parts is None or parts[1] not in UNITS or (parts[3] and parts[3] not in UNITS):
        return "?"
    over = UNITS[parts[1]] + (parts[2] or "")
    name = f"{over}/{UNITS[parts[3]]}{parts[4] or ''}" if parts[3] else over
    return {"mi/h": "mph", "unit": "?"}.get(name, name)
