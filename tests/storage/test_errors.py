"""Errors with fields: one line made of them, and the fields kept on every way."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from eopd.storage.errors import DamagedPart, InputError, StoreFull, UserError


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"problem": "it is odd"}, "it is odd"),
        ({"problem": "it is odd", "setting": "a.b"}, "a.b: it is odd"),
        ({"problem": "a.b is odd", "setting": "a.b"}, "a.b is odd"),
        ({"problem": "it is odd", "setting": "a.b", "remedy": "set a.b to 2"}, "it is odd: set a.b to 2"),
        ({"problem": "it is odd", "file": "x.jsonl", "line": 3}, "x.jsonl line 3: it is odd"),
        ({"problem": "it is odd", "file": "x.parquet", "row": 0}, "x.parquet row 0: it is odd"),
        ({"problem": "it is odd", "file": "x", "prompt": "p"}, "prompt 'p' of x: it is odd"),
        ({"problem": "x is odd", "file": "x", "prompt": "p"}, "prompt 'p': x is odd"),
        ({"problem": "it is odd", "file": "x", "prompt": "p", "setting": "a"}, "a: prompt 'p' of x: it is odd"),
        ({"problem": "it is odd.", "remedy": "Make it even."}, "it is odd. Make it even."),
        ({"problem": "it is odd", "remedy": "`eopd run` makes it"}, "it is odd. `eopd run` makes it"),
    ],
)
def test_what_the_message_does_not_name_precedes_it(fields: dict[str, Any], text: str) -> None:
    error = InputError(**fields)
    assert str(error) == text
    assert error.fields() == fields
    for copy in (pickle.loads(pickle.dumps(error)), InputError(**json.loads(json.dumps(error.fields())))):
        assert (str(copy), copy.fields()) == (text, fields)


def test_another_type_keeps_the_fields_and_adds_to_them() -> None:
    inner = DamagedPart("it is gone", artifact="scores/k", part=2, file="f", remedy="copy it")
    outer = InputError.of(inner, "while reading", setting="teacher.path", remedy="another")
    assert str(outer) == "teacher.path: while reading: f: it is gone: copy it"
    assert (outer.artifact, outer.part, outer.file, outer.setting) == ("scores/k", 2, "f", "teacher.path")
    assert outer.text(setting=False, remedy=False) == "while reading: f: it is gone"
    other = StoreFull.of(OSError(28, "No space left on device", "/a/b"), remedy="free space")
    assert (other.file, other.remedy) == ("/a/b", "free space")
    assert isinstance(other, UserError)
