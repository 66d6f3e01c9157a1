"""Multiple-choice letters: which one a text chooses, and the text of the option after it."""

from __future__ import annotations

import re

from eopd.stages.verifiers.notation import TEXT, tidy

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
