"""Documents of three subjects and questions about two of them, for a language model.

python -m examples.attribution.smollm2 FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

CAPITALS = """
    Peru Lima|Chile Santiago|Kenya Nairobi|Cuba Havana|Norway Oslo|Poland Warsaw|Austria Vienna|
    Hungary Budapest|Ireland Dublin|Finland Helsinki|Turkey Ankara|Iraq Baghdad|Iran Tehran|Thailand Bangkok|
    Vietnam Hanoi|Nepal Kathmandu|Sweden Stockholm|Denmark Copenhagen|Belgium Brussels|Ukraine Kyiv|
    Romania Bucharest|Bulgaria Sofia|Serbia Belgrade|Croatia Zagreb|Ghana Accra|Senegal Dakar|
    Ethiopia Addis_Ababa|Morocco Rabat|Lebanon Beirut|Jordan Amman|Qatar Doha|Mongolia Ulaanbaatar|
    Ecuador Quito|Bolivia Sucre|Colombia Bogota|Jamaica Kingston|Iceland Reykjavik|Latvia Riga|
    Estonia Tallinn|Albania Tirana
"""
ASKED = (
    "France Paris|Japan Tokyo|Italy Rome|Spain Madrid|Germany Berlin|Egypt"
    " Cairo|Russia Moscow|China Beijing|Greece Athens"
)
OPPOSITES = """
    hot cold|big small|day night|up down|left right|open closed|early late|fast slow|happy sad|rich poor|
    full empty|old new|loud quiet|hard soft|dry wet|near far|light dark|strong weak|deep shallow|wide narrow|
    clean dirty|sweet sour|thick thin|high low|safe dangerous|true false|first last|inside outside|
    above below|begin end|win lose|buy sell|give take|push pull|laugh cry|love hate|remember forget|
    arrive leave|rise fall|accept refuse
"""


def _pairs(text: str) -> list[tuple[str, str]]:
    words = [one.replace("_", " ") for pair in text.replace("\n", " ").split("|") for one in pair.split()]
    return list(zip(words[::2], words[1::2], strict=True))


def documents(seed: int = 0) -> list[dict[str, str]]:
    """Forty documents of each subject. No sum and no capital in them is asked for."""
    drawn = random.Random(seed)
    sums = drawn.sample([(a, b) for a in range(20, 60) for b in range(20, 60)], 40)
    texts = {
        "sums": [f"If you add {b} to {a}, the result is {a + b}." for a, b in sums],
        "capitals": [f"{city} is the capital city of {country}." for country, city in _pairs(CAPITALS)],
        "opposites": [f"The word that means the opposite of {a} is {b}." for a, b in _pairs(OPPOSITES)],
    }
    rows = [{"subject": subject, "text": text} for subject, group in texts.items() for text in group]
    return [{"id": f"d{number}", **row} for number, row in enumerate(rows)]


def questions() -> dict[str, list[dict[str, str]]]:
    """Questions by query set."""
    sums = [(a, b) for a in range(2, 10) for b in range(2, 10) if a <= b]
    return {
        "sums": [{"id": f"{a}+{b}", "problem": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in sums],
        "capitals": [
            {
                "id": country,
                "problem": f"What is the capital of {country}?",
                "answer": f"The capital of {country} is {city}.",
            }
            for country, city in _pairs(ASKED)
        ],
    }


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "documents.jsonl", documents())
    for name, rows in questions().items():
        write(folder / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
