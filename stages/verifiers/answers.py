"""Extraction of final answers. Text only, no algebra, and time linear in the length of the text."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections import deque
from decimal import Decimal

MAX_ANSWER = 4000
"""Characters of the longest answer. A box, tag or line that holds more is no answer."""
MAX_BOXES = 8
"""Boxes that are read, from the last: a response that was cut at its length limit may end within one."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\\[A-Za-z]+|[^\s{}$\\]")
_THOUGHTS = "think|thinking|thought|thoughts|reasoning|scratchpad|seed:think"
_THINK_TAG = re.compile(
    rf"<\s?(?P<close>/)?\s?(?:{_THOUGHTS})(?:\s[^<>]{{0,80}})?>|\[(?P<bracket>/)?THINK\]|<\|(?P<token>begin|end)_of_thought\|>|"
    r"(?P<kimi>◁/?think▷)|<\|channel\|>(?P<channel>[a-z]+)<\|message\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<answer\s?>(?P<content>.*?)(?:</answer\s?>|\Z)", re.IGNORECASE | re.DOTALL)
_GSM8K = re.compile(r"^[ \t]*####[ \t]*(?P<content>\S[^\n]*)", re.MULTILINE)
_ANCHOR = re.compile(
    r"(?:\banswer\b(?:\s+(?:to|for|of)\b[^.:\n]{0,80}?)?[*_\s]*(?:\b(?:is|are|equals|would\s+be|must\s+be)\b[*_\s]*:?|[:=：])"
    r"|答案\s*(?:应该)?\s*(?:是|为|[:：])+|最终结果\s*(?:是|为|[:：])+)[*_\s]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<![A-Z])[.!?](?=\s|$|\*)|。|\n|I hope\b")
_QUESTION = re.compile(r"[^.!?。]*\?(?=\s|$)")
_REASON = re.compile(r"[,;]?\s+(?:because|since|as|which|so|where|when|from|by)\s")
_TAKEN_BACK = re.compile(
    r"\b(?:not|n't|never|neither|nor|cannot|wrong|incorrect|false|mistaken|unless|if|suppose|supposing|assume|assuming|"
    r"perhaps|maybe|might|may|could|doubt\w*|guess\w*|claims?|claimed)\b|n['’]t\b",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(
    r"[\s*_]*(?:no|wait|but|hmm+|actually|oops|sorry|incorrect|wrong|however|(?:this|that|it|which)(?:\s+(?:is|was|can)|['’]s|isn)"
    r"\s*(?:not|n['’]?t|wrong|incorrect|false|impossible|too)|(?:this|that|it)\s+(?:isn|can|doesn|fail)\w*)\b",
    re.IGNORECASE,
)
_SUBJECT = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the|this|our|my|its|their|his|her|there|he|she|it|they|we)\b[^.=\\$\d]{0,80}?"
    r"\b(?:is|are|equals|was|were|has|have|had)\s+(?=[-+$\\(]?\d|[-+]?\$|[-+]?\\)",
    re.IGNORECASE,
)
_SAYS = re.compile(r"=|\b(?:is|are|was|equals|get|gives?|yields)\b[:\s*_]*")
_NUMBER = re.compile(r"[-−]?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_LABEL = re.compile(r"\b(?:step|part|case|problem|example|question|equation|lemma|line)\s+\d", re.IGNORECASE)
_FILLER = re.compile(
    r"(?:(?:simply|therefore|thus|just|exactly|equal\s+to|given\s+by|option|choice)\b|[:：])\s*", re.IGNORECASE
)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.&]|\\[()\[\],;!]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\(?\b[a-z]\)|[A-Za-z]\s*=)*",
)
_E_NUMBER = re.compile(r"(?<![\w.\\])(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d{1,3}(?!\w|\.\d)")
_DOLLAR = re.compile(r"(?<!\\)\$")
_CODE = ((re.compile(r"(?<=\d)\.(?=/)"), ""), (re.compile(r"\bnp\.(?=[a-z]+\()"), r"\\"))
_MISSING = frozenset({"", "nan", "null", "<na>", "nat", "[]", "\\boxed{}", "\\fbox{}"})
_STRUCT_KEYS = ("ground_truth", "final_answer", "answer", "target")


def final_answer(response: str) -> str | None:
    """Return the final answer of a response; None if it states none.

    Thoughts are not answers. The last of these counts: a box, an ``<answer>`` tag, a line after ``####``; without one,
    the text after the last "answer is" or "Answer:"; without that, the last mathematics of the last line that has any.
    """
    text = without_thoughts(response)
    places = [boxes] if (boxes := _boxes(text)) else []
    for match in filter(None, (_last(_ANSWER_TAG, text), _last(_GSM8K, text))):
        places.append((match.end(), match["content"].strip()))
    if not places:
        return _stated(text)
    _, content = max(places)
    inner = _boxes(content)
    if inner:
        content = inner[1]
    elif "\\text" not in content:
        content = _said(content)
    return content if content and len(content) <= MAX_ANSWER else None


def last_box(response: str) -> str | None:
    """Return the content of the last complete box of a response, thoughts excluded; None without one."""
    boxes = _boxes(without_thoughts(response))
    return boxes[1] if boxes else None


def reference_answer(answer: str) -> str:
    """Return the final answer of a reference: alone, in a solution (a box, or ``####``), in a list, or in a JSON
    record.

    Returns:
        An empty string for a reference that holds none, such as "nan".
    """
    answer = answer.strip()
    if answer.startswith(("{", "[")) and len(answer) <= MAX_ANSWER:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            answer = _from_json(_record(answer), answer)
    marked = _last(_GSM8K, answer)
    tagged = _last(_ANSWER_TAG, answer)
    if boxes := _boxes(answer):
        answer = boxes[1]
    elif marked:
        answer = marked["content"]
    elif tagged and tagged["content"].strip():
        answer = _said(tagged["content"].strip())
    elif "\\text" not in answer and (anchor := _last(_ANCHOR, answer)):
        answer = _after(answer, anchor) or answer
    answer = as_written(answer.strip())
    holds_none = _DOLLAR.sub("", answer).strip().lower() in _MISSING or answer == "None"
    return "" if holds_none else answer


def without_thoughts(response: str) -> str:
    """Remove text between tags of thinking; a tag that is never closed extends to the end."""
    kept: list[str] = []
    start, depth = 0, 0
    for tag in _THINK_TAG.finditer(response):
        if tag["channel"]:
            closes = tag["channel"].lower() == "final"
        else:
            closes = bool(tag["close"] or tag["bracket"] or tag["kimi"] == "◁/think▷")
            closes = closes or (tag["token"] or "").lower() == "end"
        if closes:
            # A template may have opened the tag: without one of its own, all before is thought.
            kept = kept if depth else []
            depth, start = 0, tag.end()
        elif not depth:
            kept.append(response[start : tag.start()])
            depth = 1
    if not depth:
        kept.append(response[start:])
    return "".join(kept)


def as_written(text: str) -> str:
    """Rewrite a program's output as people write it: ``1e-5`` as ``0.00001``, ``-1./3`` as ``-1/3``, ``np.sin(x)`` as a
    sine.

    Minerva's reference answers are such; read as LaTeX, ``1e-5`` would be Euler's number less five.
    """
    text = _E_NUMBER.sub(lambda number: format(Decimal(number[0]), "f"), text)
    for pattern, latex in _CODE:
        text = pattern.sub(latex, text)
    return text


def _boxes(text: str) -> tuple[int, str] | None:
    """Return end and content of the last complete box; boxes with only a comma or "and" between them are one answer."""
    boxes: list[tuple[int, int, str]] = []
    for opening in reversed(list(_BOX.finditer(text))[-MAX_BOXES:]):
        box = _box_at(text, opening)
        if box is not None:
            boxes.insert(0, (opening.start(), *box))
    if not boxes:
        return None
    group = [boxes.pop()]
    while boxes and _BETWEEN_BOXES.fullmatch(text, boxes[-1][1], group[0][0]):
        group.insert(0, boxes.pop())
    contents = list(dict.fromkeys(content for _, _, content in group))
    return group[-1][1], ", ".join(contents)


def _box_at(text: str, opening: re.Match[str]) -> tuple[int, str] | None:
    """End and content of one box: ``\\boxed{...}``, or the one token after ``\\boxed``."""
    start = opening.end()
    if not text.startswith("{", start):
        token = _TOKEN.match(text, start)
        return (token.end(), token[0]) if token else None
    depth = 0
    for brace in _BRACE.finditer(text, start, start + MAX_ANSWER):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            content = text[start + 1 : brace.start()].strip()
            return (brace.end(), content) if content else None
    return None


def _stated(text: str) -> str | None:
    """Return the last statement of a text without a complete box."""
    text = _BOX.split(text, maxsplit=1)[0]
    anchor = _last(_ANCHOR, text)
    if anchor and (rest := _after(text, anchor)):
        return rest
    lines = [_QUESTION.sub(" ", line) for line in text[-MAX_ANSWER:].splitlines()[-8:]]
    return next((_last_statement(line) for line in reversed(lines) if _NUMBER.search(line) or "$" in line), None)


def _after(text: str, anchor: re.Match[str]) -> str | None:
    """Return the statement that begins at an anchor; None if it asks, denies, supposes, or is taken back at once."""
    rest = text[anchor.end() : anchor.end() + MAX_ANSWER].lstrip()
    rest = _FILLER.sub("", rest, count=1) if _FILLER.match(rest) else rest
    end = _SENTENCE_END.search(rest)
    after = rest[end.end() :] if end else ""
    sentence = rest[: end.start()] if end else rest
    before = text[max(anchor.start() - 200, 0) : anchor.start()]
    start = deque(_SENTENCE_END.finditer(before), maxlen=1)
    before = before[start[0].end() :] if start else before
    if (end and end[0] == "?") or _TAKEN_BACK.search(before + sentence) or _SECOND_THOUGHT.match(after):
        return None
    return _REASON.split(sentence, maxsplit=1)[0].strip(" \t*_\"'“”") or None


def _said(content: str) -> str:
    """Return the answer in a tag or a line of its own, which may be a sentence."""
    if _ANCHOR.search(content):
        return _stated(content) or content
    subject = _SUBJECT.match(content)
    return content[subject.end() :] if subject and not _TAKEN_BACK.search(content) else content


def _last_statement(line: str) -> str | None:
    """Return the right-hand side of a line's last equality, or its only number."""
    *_, rest = _SAYS.split(line)
    if rest != line:
        end = _SENTENCE_END.search(rest)
        return (rest[: end.start()] if end else rest).strip(" \t*_,;:") or None
    numbers = _NUMBER.findall(line)
    return numbers[0] if len(numbers) == 1 and not _LABEL.search(line) else None


def _record(text: str) -> object:
    """Parse a JSON text, or one that Python printed (single quotes)."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _from_json(value: object, text: str) -> str:
    """Return the answer in a record (by its usual names) or a list of texts; other JSON, such as ``[1, 2]``, is
    ``text``."""
    if isinstance(value, dict):
        return next((_from_json(value[key], str(value[key])) for key in _STRUCT_KEYS if key in value), "")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "" if value is None else text


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return deque(pattern.finditer(text), maxlen=1).pop() if pattern.search(text) else None
