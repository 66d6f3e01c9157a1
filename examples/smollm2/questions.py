"""Questions of a few kinds in plain English, and facts with short answers, made from lists; solutions from a file."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of China?": "Beijing",
    "What is the capital of Greece?": "Athens",
    "What is the capital of England?": "London",
    "What is the capital of Canada?": "Ottawa",
    "What is the capital of Portugal?": "Lisbon",
    "Which planet is closest to the Sun?": "Mercury",
    "Which planet is the largest in the solar system?": "Jupiter",
    "Which planet do we live on?": "Earth",
    "What gas do plants take in from the air?": "carbon dioxide",
    "What gas do people need to breathe?": "oxygen",
    "What is frozen water called?": "ice",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "Who developed the theory of relativity?": "Einstein",
    "What is the largest ocean on Earth?": "Pacific",
    "What is the tallest mountain on Earth?": "Everest",
    "Which animal is known as the king of the jungle?": "lion",
    "Which animal says meow?": "cat",
    "How many days are there in a week?": "seven|7",
    "How many months are there in a year?": "twelve|12",
    "How many legs does a spider have?": "eight|8",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small|little",
    "What is the opposite of day?": "night",
    "What is the chemical symbol of water?": "H2O|H₂O",
}
"""Held out: question -> answers that may stand in a response, divided by bars."""

CHOICES = {
    "What is the capital of {}?": """
        France Paris|Japan Tokyo|Italy Rome|Spain Madrid|Germany Berlin|Egypt Cairo|Russia Moscow|China Beijing|
        Greece Athens|England London|Canada Ottawa|Portugal Lisbon|Austria Vienna|Ireland Dublin|Poland Warsaw|
        Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Hungary Budapest|Cuba Havana|Peru Lima|
        Kenya Nairobi|Iraq Baghdad|Iran Tehran
    """,
    "What is the opposite of {}?": """
        hot cold|big small|day night|up down|left right|old young|good bad|rich poor|fast slow|hard soft|light dark|
        wet dry|high low|open closed|early late|near far|long short|strong weak|happy sad|full empty|true false|
        war peace|love hate
    """,
    "What is the past tense of {}?": """
        go went|see saw|take took|give gave|come came|know knew|think thought|find found|tell told|write wrote|
        run ran|eat ate|speak spoke|buy bought|bring brought|teach taught|catch caught|drive drove|sing sang|
        swim swam|fall fell|feel felt|keep kept|sleep slept
    """,
}
"""Held out: forms of questions -> what is asked for, and the answer."""


def choices() -> dict[str, tuple[str, ...]]:
    """Held out: question -> four short answers, the right one first, the others right for other questions."""
    result: dict[str, tuple[str, ...]] = {}
    for form, rows in CHOICES.items():
        known = [row.split() for row in _listed(rows)]
        for number, (asked, _) in enumerate(known):
            result[form.format(asked)] = tuple(known[(number + step) % len(known)][1] for step in (0, 5, 9, 14))
    return result


TOPICS = """
    the Moon|rain|bread|bicycles|honey bees|volcanoes|the human heart|electricity|rivers|music|chess|libraries|trees|
    the ocean|sleep|coffee|gravity|bridges|dogs|winter|photosynthesis|the Internet|friendship|money|maps|clocks|salt|
    football|gardens|trains|languages|vitamins|painting|deserts|wind|elephants|kindness|recycling|soap|mathematics|
    the stars|rice|swimming|castles|snow|books|robots|cheese|mirrors|mountains
"""
FORMS = """
    What is the most important thing to know about {}?|Explain {} to a child of eight.|Write two sentences about {}.|
    Give me three facts about {}.|Why do people care about {}?|Tell me a very short story about {}.|
    What would a day without {} be like?|Describe {} in your own words.|What is a common mistake about {}?|
    Write a question about {} and answer it.|How would you begin a lesson about {}?|
    What did people long ago think of {}?|Name one good and one bad thing about {}.|
    Write a short message to a friend about {}.|How is {} part of daily life?|What is surprising about {}?|
    Give one piece of advice about {}.|How could somebody learn more about {}?|Compare {} with something else.|
    Write a title and one line for an article about {}.
"""


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.replace("\n", " ").split("|")]


def questions(count: int, held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Questions to train on and others to measure with; no form and topic stand together in both."""
    every = [form.format(topic) for topic in _listed(TOPICS) for form in _listed(FORMS)]
    random.Random(seed).shuffle(every)
    if count + held_out > len(every):
        raise ValueError(f"there are {len(every)} questions, and {count} + {held_out} are asked for")
    return every[held_out : held_out + count], every[:held_out]


def read_solutions(path: Path) -> list[dict[str, str]]:
    """Problems as prompts and their solutions as responses, without GSM8K's calculator notes and final `#### 72`."""
    rows = []
    for line in path.read_text(encoding="utf-8").strip().split("\n"):  # texts may hold other line separators
        row = json.loads(line)
        problem, solution = row.get("problem", row.get("question")), row.get("solution", row.get("answer"))
        if not problem or not solution:
            raise SystemExit(f"{path}: a row without a problem or a solution: {line[:80]}")
        rows.append({"prompt": problem, "response": re.sub(r"<<.*?>>|\n####.*", "", solution).strip()})
    return rows
