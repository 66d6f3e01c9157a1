"""Numbers with units, scales and remarks: separating the number from the rest of a text."""

from __future__ import annotations

import re

from eopd.stages.verifiers.notation import TEXT, plain_number, tidy

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
    "deg": "degree degrees deg 度",
    "rad": "rad rads radian radians 弧度",
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
_ABBREVIATED = """
    Wh kWh MWh mW MW GW mV kV mA kN kPa MPa hPa atm mmHg psi kHz MHz GHz rpm bpm fps cal kcal btu BTU dm dL dl
    cL cl kt ly AU au pc kpc Mpc am pm AM PM byte kB KB MB GB TB px pt pts pp dB Bq Gy Sv lm lx cd Wb knot
    tonne ton angstrom sr kcd MeV keV GeV kmol mmol cc fl pint quart cup fathom furlong inHg lbf Nm dyn dyne gauss tesla
    farad henry coulomb candela lumen lux becquerel sievert weber siemens RMB
"""
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())
_BESIDE_UNITS = frozenset(("per", "square", "cubic", "sq", "cu", "squared", "cubed", "a", "an", "in", "each", "total"))
_UNMARKED = """
    total altogether each more way overall left remaining people person children men women feet teeth mice geese fish
    sheep deer cattle dice pence hertz data bacteria criteria radii formulae oxen kg rupees peso yen won baht
"""
_UNMARKED_NOUNS = frozenset(_UNMARKED.split())
"""Words that name what is counted though they end in no "s"."""
_AMBIGUOUS = frozenset(("K", "ppm", "ppb"))
"""Units that a number alone may not lack: K also stands for thousands, and the others scale."""
_TENS = "twent|thirt|fort|fift|sixt|sevent|eight|ninet"
_CHANGES = re.compile(
    # scales
    rf"\b(?:hundreds?|thousands?|[mbtrquadintsexpocl]+illi(?:on|ard)s?|mill?(?:ones|ionen|ard|iarden)?|mln|mio|mn|bn|tn|"
    r"dozens?|gross|scores?|tens|ones|lakhs?|lacs?|crores?|myriads?|googols?|tausend|cientos|docenas|mille|permille|permil|"
    r"basis|bps|kilo|mega|giga|tera|milli|micro|nano|fold|\w+fold|"
    # numbers in words
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    rf"(?:{_TENS})y|half|halves|halve[sd]?|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|"
    rf"elevenths?|twelfths?|\w+teenths?|(?:{_TENS})ieths?|hundredths?|\w+illionths?|thousandths?|"
    # signs and operations
    r"negatives?|negated|negation|opposite|inverse|reciprocals?|minus|plus|times|squares?\s+of|cubes?\s+of|roots?|sqrt|"
    r"factorials?|doubled?|twice|thrice|tripled?|powers?|exponents?|repeating|recurring|repeated|periodic|imaginary|"
    r"complex|conjugates?|mod|modulo|modulus|base|choose|over|by|log|ln|exp|sin|cos|tan|pi|tau|lim|infinity|divided|"
    r"multiplied|add|added|subtract(?:ed)?|increased|decreased|remainder|below|under|beneath|less|fewer|lower|smaller|"
    r"greater|larger|bigger|higher|above|beyond|short|debt|deficit|loss|owed|approx\w*|about|nearly|almost|"
    # clauses, and what takes a statement back
    r"not|no|non|nor|nothing|none|never|neither|cannot|can|could|would|should|may|might|must|will|is|are|was|were|be|been|"
    r"isn|aren|wasn|don|doesn|didn|won|couldn|shouldn|does|do|did|has|have|had|if|when|for|where|than|least|most|or|and|"
    r"to|between|of|except|only|but|without|unless|instead|actually|rather|maybe|perhaps|possibly|probably|likely|"
    r"unlikely|wrong\w*|incorrect\w*|invalid\w*|false\w*|untrue|errors?|mistake\w*|impossible|rejected|extraneous|"
    r"discarded|excluded|eliminated|ruled|contradict\w*|wait|oops|too|so|etc|exceeds?|fails?|needs?|seems?|looks|equals|"
    r"becomes|remains|means|exists|works|lies|goes|gets|gives|makes|varies|differs|violates|holds|guess\w*|disregard|"
    r"ignore)\b",
    re.IGNORECASE,
)
"""Words with which a number is another one, or is not said to be the answer. None of them is, or stands in, a unit."""
_DENIES = re.compile(
    r"\b(?:hundreds?|thousands?|[mbtr]+illions?|dozens?|lakhs?|crores?|tens|negatives?|minus|plus|times|squared|cubed|"
    r"repeating|recurring|repeated|imaginary|mod|modulo|modulus|base|not|non|no|nor|never|neither|none|cannot|isn|doesn|can't|isn't|"
    r"doesn't|won't|wrong\w*|incorrect\w*|invalid\w*|false|untrue|errors?|mistake\w*|impossible|rejected?|extraneous|"
    r"discard\w*|exclude\w*|eliminated?|ruled|contradict\w*|fails?|unless|except|instead|actually|rather|maybe|perhaps|"
    r"possibly|too|also|and|or|but|otherwise|else|should|disregard|ignore|wait|oops|guess\w*|halved?|doubled?|twice)\b"
    r"|\\(?:[bp]?mod|ne|notin)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words with which a remark is more than one: the number before it is not the answer, or not all of it."""
_CHANGES_CHINESE = re.compile(r"[百千万億亿兆十零负負不非否没沒无無错錯误誤是倍半成打折余餘多几幾以]|分之")
_UNIT_TEXT = re.compile(r"[A-Za-zÀ-ɏ¢.'’/ \-]*[A-Za-zÀ-ɏ¢][A-Za-zÀ-ɏ¢.'’/ \-]*")
_UNIT_WORD = re.compile(r"[A-Za-zÀ-ɏ¢]+")
_PLURAL = re.compile(r"[a-zà-ɏ]{2,}(?<![sui])s")
_POWER = re.compile(r"\^\s*\{?-?\d\}?")
_REMARK = re.compile(r"(?:\\text\{\s*|(?<=\s))\((?!\s*base)")
_DOMAIN = re.compile(r"[,;]\s*(?:\\text\{[^{}]*\}\s*)?\(?[A-Za-z]\s*\\in\s*\\mathbb\s*\{?[A-Z]\}?[^,;=]*$")
_FOR_ALL = re.compile(r"(?:\\text\{)?,?\s*\bfor\s+(?:any|all|every|some|each|arbitrary)\b")
_MARK = re.compile(r"\d+(?:\.\d+)?|\\mathbb\s*\{?[A-Z]")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
_SCALE = re.compile(
    rf"(?P<core>.*\d)\s*(?:\\text\{{)?\s*(?P<scale>{'|'.join(_SCALES)})(?![a-z])\s*\}}?(?P<rest>.*)", re.DOTALL
)
_CJK = re.compile(r"(?<=[\d}%])\s*(?:\\text\{)?\s*[\u4e00-\u9fff]+(?:\^\{?\d\}?)?\s*\}?$")


def uncommented(text: str) -> str:
    """A tidy text without a remark in words after it: ``5 \\text{ (at } x=1)``, ``f(x)=cx \\text{ for any } c``."""
    start = _remark_start(text)
    return (text if start is None else text[:start].rstrip()) or text


def same_remarks(one: str, other: str) -> bool:
    """True if two remarks may follow the same answer: numbers and domains in both are the same."""
    marks = [{re.sub(r"[\s{]", "", mark) for mark in _MARK.findall(remark)} for remark in (one, other)]
    return not all(marks) or marks[0] == marks[1]


def _remark_start(text: str) -> int | None:
    domain = _DOMAIN.search(text)
    if domain:
        return domain.start()
    for_all = _FOR_ALL.search(text)
    if for_all:
        rest = text[for_all.end() :]
        further = re.search(r";|,\s*[-+\\]?\d|\b(?:for|if|when)\b", rest)
        return None if further or _DENIES.search(rest) else for_all.start()
    for opening in _REMARK.finditer(text):
        depth = 0
        for bracket in re.finditer(r"[()]", text[opening.end() - 1 :]):
            depth += 1 if bracket[0] == "(" else -1
            if depth == 0:
                break
        else:
            return None
        end = opening.end() - 1 + bracket.end()
        remark = text[opening.end() : end - 1]
        spoken = re.match(r"[^{}]*[A-Za-z]{3}", remark) if opening[0][0] == "\\" else re.search("[A-Za-z]{3}", remark)
        if spoken and not text[end:].strip(" }."):
            return None if _DENIES.search(remark) else opening.start()
    return None


def unit_words(text: str) -> frozenset[str]:
    """Return the words of a text, and the units that they name."""
    names = _UNIT_WORD.findall(text)
    return frozenset([*names, *(UNITS[name] for name in names if name in UNITS)])


def quantity(text: str, words: frozenset[str] | None = frozenset()) -> tuple[str, str | None]:
    """Return number and unit of a tidy text. The unit is None for a text without one, "?" for one in other words.

    Args:
        words: beside known units and plurals, what a unit is called; None for anything that does not change a number.
    """
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
    if chinese and not _CHANGES_CHINESE.search(chinese[0]):
        name = re.sub(r"\\text|[{}\s]", "", chinese[0])
        return tidy(core[: chinese.start()]), UNITS.get(name, "?")
    degrees = re.sub(r"\^\\circ\s*(?:\\text\{\s*)?([CF]?)\s*\}?$", "", core)
    if degrees != core:
        temperature = re.search(r"([CF])\s*\}?$", core)
        return tidy(degrees), temperature[1] if temperature else "deg"
    end = _unit_start(core, words)
    if end is not None:
        known = unit_name(core[end:])
        return tidy(core[:end]), unit if known is None or (known == "?" and unit) else known
    return tidy(core), unit


def _unit_start(text: str, words: frozenset[str] | None) -> int | None:
    """Return where the unit of a quantity begins: text in a font of its own, or known or plain words after a number."""
    font = re.search(
        r"\s*\\text\{[^{}]*\}(?:\s*/\s*\\text\{[^{}]*\}|\s*\\cdot\s*\\text\{[^{}]*\}|\s*\^\s*\{?-?\d\}?)*$", text
    )
    if font and font.start() > 0:
        name = " ".join(TEXT.findall(font[0]))
        first = text[: font.start()].rstrip()
        if first and _is_unit(name, first, words) and first[-1] not in "+-*/^_=<>({[,":
            return font.start()
        return None
    tail = re.search(
        r"(?<=[\d.}%)])(?P<space>\s*)(?P<unit>[A-Za-z¢][A-Za-z¢ /\-]*(?:\^\{?-?\d\}?)?(?:/[a-z]+(?:\^\{?-?\d\}?)?)?)$",
        text,
    )
    if tail is None or plain_number(tidy(text[: tail.start()])) is None:
        return None
    if not _is_unit(_POWER.sub("", tail["unit"]), text[: tail.start()], words):
        return None
    names = _UNIT_WORD.findall(tail["unit"])
    known = all(name in UNITS or name in _ABBREVIATIONS or name in _BESIDE_UNITS for name in names)
    single = max(map(len, names)) == 1
    if known and (not single or tail["space"]):
        return tail.start()
    return tail.start() if tail["space"] and min(map(len, names)) > 1 and max(map(len, names)) > 2 else None


def _is_unit(name: str, number: str, words: frozenset[str] | None) -> bool:
    """True if a text after a number says what is counted, and neither how much more of it nor that it is not so."""
    name = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", _POWER.sub("", name), flags=re.IGNORECASE)
    names = _UNIT_WORD.findall(name)
    if not _UNIT_TEXT.fullmatch(name) or _CHANGES.search(name) or not names:
        return False
    if names[0] in ("squared", "cubed") or any(
        (len(one) == 1 and one not in UNITS and one != "a") or (words is not None and one in _AMBIGUOUS - words)
        for one in names
    ):
        return False
    known = [one in UNITS or one in _ABBREVIATIONS for one in names]
    if words is None or (
        any(known) and all(is_known or one in _BESIDE_UNITS for is_known, one in zip(known, names, strict=True))
    ):
        return True
    if any(one in words or one.lower() in _UNMARKED_NOUNS or _PLURAL.fullmatch(one.lower()) for one in names):
        return True
    value = plain_number(tidy(number))  # one apple, half a cup
    return value is not None and 0 < value.value <= 1 and all(len(one) > 2 or one == "a" for one in names)


def unit_name(text: str) -> str | None:
    """Return one name of a unit however it is spelled: ``square inches`` and ``inches^2`` are ``in^2``; "?" if
    unknown."""
    text = TEXT.sub(r" \1 ", text).replace("{", "").replace("}", "").strip(" .")
    if not text:
        return None
    text = re.sub(r"\b(?:sq\.?|square)\s+(\w+)", r"\1^2", text)
    text = re.sub(r"\b(?:cu\.?|cubic)\s+(\w+)", r"\1^3", text)
    text = re.sub(r"\b(\w+)\s+squared\b", r"\1^2", re.sub(r"\b(\w+)\s+cubed\b", r"\1^3", text))
    text = re.sub(r"\s+per\s+", "/", text)
    text = re.sub(r"\s*([/^])\s*", r"\1", text)
    parts = re.fullmatch(r"([A-Za-z¢元]+)(\^-?\d)?(?:/([A-Za-z]+)(\^-?\d)?)?", text)
    if parts is None or parts[1] not in UNITS or (parts[3] and parts[3] not in UNITS):
        return "?"
    over = UNITS[parts[1]] + (parts[2] or "")
    name = f"{over}/{UNITS[parts[3]]}{parts[4] or ''}" if parts[3] else over
    return {"mi/h": "mph", "unit": "?"}.get(name, name)
