"""Questions of a few kinds in plain English, and facts with short answers, made from lists."""

from __future__ import annotations

import random

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

WORDS = "apple|bread|candle|door|engine|forest|garden|house|island|jacket|kitten|lemon|mirror|night|orange|pencil"


def sums() -> dict[str, str]:
    """Held out: sums of two numbers of one digit -> the sum."""
    return {
        f"What is {a} plus {b}? Answer with the number only.": str(a + b) for a in range(2, 10) for b in (3, 5, 7, 9)
    }


def pairs() -> dict[str, str]:
    """Held out: two words to repeat in the other order -> those."""
    words = _listed(WORDS)
    chosen = [(words[n], words[(3 * n + 5) % len(words)]) for n in range(len(words))]
    chosen += [(second, first) for first, second in chosen]
    return {f'Write these two words in reverse order: "{a} {b}".': f"{b} {a}|{b}, {a}" for a, b in chosen if a != b}


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
