"""Teacher and student must share their tokens: said before hours of sampling, and not when the teacher is loaded.

The score stage compares the loaded tokenizers; this looks at their `tokenizer.json` alone, and is silent where a model
has none.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.pipeline.plan import Facts

FILE = "tokenizer.json"


def refuse_other_vocabulary(facts: Facts) -> None:
    """Raises ConfigError where an id means other bytes to the teacher than to the student."""
    if facts.teacher.tokenizer_fingerprint != facts.student.tokenizer_fingerprint:
        compare_vocabularies(facts.teacher.tokenizer_folder, facts.student.tokenizer_folder)


@lru_cache
def compare_vocabularies(teacher: Path, student: Path) -> None:
    """The same, of two folders of tokenizers. Once in a process: reading large ones takes seconds, and the runs of a
    sweep have the same."""
    files = (teacher / FILE, student / FILE)
    if not all(file.exists() for file in files):
        return
    from tokenizers import Tokenizer

    from eopd.stages.models.vocabulary import check_same, id_to_bytes

    try:
        ours, theirs = (Tokenizer.from_file(str(file)) for file in files)
    except Exception:  # what the library raises; the stage that loads the tokenizer says what is wrong with it
        return
    try:
        check_same(id_to_bytes(ours), id_to_bytes(theirs))
    except ValueError as error:
        raise ConfigError(str(error)) from error
