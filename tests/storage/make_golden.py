"""Writes the golden part of the current cache format and what it must decode to.

    python -m tests.storage.make_golden

Only for a new format version: a golden part that is committed is never written again, so that every version stays
readable.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eopd.storage.artifacts import Artifact
from eopd.storage.codec import FORMAT_VERSION
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows

from .making import dense, header, rows_of

FOLDER = Path(__file__).parent / "golden"
HEAD = HeadRule(k_max=8, min_prob=0.03, full_head_above=0.4, draws="beyond_head")
VOCABULARY = 400


def artifact(version: int) -> Artifact:
    return Artifact(FOLDER / f"version{version}", Identity("scores", 1, 1, {"golden": version}, {}, {"k_max": 8}))


def main() -> None:
    made = artifact(FORMAT_VERSION)
    if made.is_complete():
        raise SystemExit(f"{made.folder} is there already: a golden part never changes")
    rows = rows_of(dense(1, [12, 0, 30], VOCABULARY), HEAD, extra_k=2)
    with made.write_part(0, inputs={"rollouts": "golden"}) as folder:
        write_part(folder, rows, header(HEAD, VOCABULARY, extra_k=2))
    result = TeacherCache(made).read_part(0)
    fields = {name: getattr(result, name) for name in TeacherRows.__dataclass_fields__}
    np.savez_compressed(FOLDER / f"version{FORMAT_VERSION}.npz", **fields)


if __name__ == "__main__":
    main()
