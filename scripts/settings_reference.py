"""docs/settings.md from the settings' own descriptions: every key, its type, its default, what it does.

python scripts/settings_reference.py            # write it
python scripts/settings_reference.py --check    # say whether it is what would be written
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from eopd.pipeline.config import RunSettings
from eopd.stages.settings import Settings
from eopd.stages.train.objectives.settings import FAMILY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

HEAD = """\
# Settings

Every key of a config, written by `python scripts/settings_reference.py` from the code. `a.b` is `b` below `a` in YAML,
and `--set a.b=value` on the command line. A config may name another as its base (`extends: ./base.yaml`). A path that
starts with `./` or `../` is relative to the file that states it (with `--set`: to the current folder), one that starts
with `~/` lies in the home folder, any other relative path is relative to the current folder. Unknown keys are refused.

**Keyed** settings decide what an artifact contains: change one, and what depends on it is made anew, beside what is
there. The others (no dot in the column) say how fast or where, and may be changed at any time, also of a run under
way; `rollout.student_topk` is the exception: it makes scores and training anew. Models, prompts and benchmarks are
keyed by their content, not by their path.
"""


def page() -> str:
    return "\n".join([HEAD, *_sections(RunSettings, "", {})]).rstrip() + "\n"


def _sections(kind: type[Settings], prefix: str, told: dict[type[Settings], str]) -> Iterator[str]:
    """The table of ``kind``, then those of the groups in it; a group that stands in several places is told once."""
    yield f"## {prefix or 'The run'}\n"
    if kind in told:
        yield f"As `{told[kind]}`.\n"
        return
    told[kind] = prefix
    own = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    if own:
        yield f"{own.splitlines()[0].replace('``', '`')}\n"
    yield "| key | type | default | keyed | |\n|---|---|---|---|---|"
    groups = []
    for name, field in kind.model_fields.items():
        inner = _group(field.annotation)
        if inner is not None:
            groups.append((f"{prefix}.{name}".lstrip("."), inner))
        yield _row(name, field, inner)
    yield ""
    if kind.__name__ == "ObjectiveSettings":
        yield from _objectives()
    for where, inner in groups:
        yield from _sections(inner, where, told)


def _row(name: str, field: FieldInfo, inner: type[Settings] | None) -> str:
    extra = field.json_schema_extra
    keyed = not (isinstance(extra, dict) and extra.get("keyed") is False)
    cells = [
        f"`{name}`",
        _type(field.annotation),
        _default(field, inner),
        "·" if keyed else "",
        _plainly(field.description or ""),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _objectives() -> Iterator[str]:
    yield "Each objective uses some of them, with defaults of its own; the others are refused:\n"
    yield "| objective | its settings |\n|---|---|"
    for name, used in FAMILY.items():
        yield f"| `{name}` | {', '.join(f'`{key}: {_plain(value)}`' for key, value in used.items()) or 'none'} |"
    yield ""


def _group(annotation: Any) -> type[Settings] | None:
    """The settings class in ``X``, ``X | None``, ``list[X]``, ``tuple[X, ...]`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((result for inner in typing.get_args(annotation) if (result := _group(inner)) is not None), None)


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:  # with its bounds
        return _type(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin in (list, tuple):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "group"
    return {str: "text", bool: "true, false", int: "whole number", float: "number", Any: "anything"}[annotation]


def _default(field: FieldInfo, inner: type[Settings] | None) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    return "see below" if inner is not None and isinstance(value, Settings) else f"`{_plain(value)}`"


def _plainly(description: str) -> str:
    """In YAML's words."""
    return re.sub(r"\b(None|Null)\b", "null", description)


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or not value else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
    sys.stdout.write("" if fresh else f"{PAGE} is not what the settings say: python scripts/settings_reference.py\n")
    return 0 if fresh else 1


if __name__ == "__main__":
    sys.exit(main())
