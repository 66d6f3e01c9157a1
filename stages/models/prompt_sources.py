"""Reading of prompt files: JSONL, a JSON array, Parquet, and folders saved with ``datasets``' ``save_to_disk``.

The last are read as what they are, Arrow stream files listed in ``state.json``: no code of a data set is run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.storage.errors import FilePlace, InputError, place_of

if TYPE_CHECKING:
    import pyarrow as pa

Stamp = tuple[tuple[str, int, int], ...]

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")


class NoColumn(InputError):
    """A source lacks a column that is asked for."""


@dataclass(frozen=True)
class Row:
    """The requested columns of one row, and its place for errors."""

    values: dict[str, Any]
    place: FilePlace

    @property
    def where(self) -> str:
        return place_of(self.place)

    def refusal(self, column: str, problem: str, remedy: str = "") -> InputError:
        """Return an error about the value of a column."""
        return InputError(f"column {column!r} {problem}", remedy=remedy, **self.place)

    @contextmanager
    def refusing(self, column: str, prefix: str = "") -> Iterator[None]:
        """Turn an error about the value of a column into one that names the column and its place."""
        try:
            yield
        except InputError as error:
            raise self.refusal(column, f"{prefix}{error.problem}", error.remedy) from error


def read(path: Path, split: str | None, columns: Sequence[str], limit: int | None) -> Iterator[Row]:
    """Yield rows of a source in order, at most ``limit``.

    Raises:
        ValueError: as ``prompts.load_prompts``.
    """
    kind = _kind(path)
    if kind in ("jsonl", "array"):
        objects = _read_lines(path, limit) if kind == "jsonl" else _read_array(path, limit)
        for values, place in objects:
            yield _row(values, columns, place)
        return
    first = 0
    for name, batch in _parquet_batches(path, columns) if kind == "parquet" else _arrow_batches(path, split, columns):
        for number, values in enumerate(batch.to_pylist(maps_as_pydicts="strict")):
            if first + number == limit:
                return
            yield _row(values, columns, {"file": name, "row": first + number})
        first += batch.num_rows


def count(path: Path, split: str | None) -> int:
    """Count the rows of a source; for JSONL, its non-blank lines."""
    kind = _kind(path)
    if kind == "array":
        return len(_array(path))
    if kind == "jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    if kind == "parquet":
        return int(_parquet_file(path).metadata.num_rows)
    return sum(batch.num_rows for file in _arrow_files(_split(path, split)) for batch in _open_arrow(file))


def files(path: Path, split: str | None) -> list[Path]:
    """List the files that hold a source."""
    if _kind(path) != "folder":
        return [path]
    folder = _split(path, split)
    return [folder / "state.json", *_arrow_files(folder)]


def stamp(path: Path, split: str | None) -> Stamp:
    """Return a value that changes with the source: time of the last change (ns) and bytes of its files."""
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files(path, split))


def holds_conversations(path: Path, split: str | None, column: str) -> bool:
    """True if the prompts of a source are lists of messages, judging by its first row."""
    row = next(read(path, split, [column], 1), None)
    value = None if row is None else row.values[column]
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise InputError(f"prompt source {path} does not exist", file=path, remedy="check its path")
    if not path.is_file():
        problem = f"prompt source {path} is no file that can be read twice"
        raise InputError(problem, file=path, remedy="name a plain file")
    if path.stat().st_size == 0:
        raise InputError(f"prompt source {path} is empty", file=path)
    if path.suffix.lower() in JSON_LINES:
        return "array" if _begins_an_array(path) else "jsonl"
    if path.suffix.lower() in PARQUET:
        return "parquet"
    raise InputError(
        f"prompt source {path}: cannot tell its format from {path.suffix!r}",
        file=path,
        remedy=f"use {', '.join(JSON_LINES + PARQUET)} or a folder saved with save_to_disk",
    )


def _begins_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                return text.startswith(b"[")
    return False


def _read_lines(path: Path, limit: int | None) -> Iterator[tuple[dict[str, Any], FilePlace]]:
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if count == limit:
                return
            if not line.strip():
                continue
            place: FilePlace = {"file": path, "line": number}
            yield _object(_parse(line, place), place), place
            count += 1


def _read_array(path: Path, limit: int | None) -> Iterator[tuple[dict[str, Any], FilePlace]]:
    for number, item in enumerate(_array(path)[:limit]):
        place: FilePlace = {"file": path, "row": number}
        yield _object(item, place), place


@lru_cache(maxsize=1)
def _parsed_array(path: Path, _: tuple[int, int]) -> list[Any]:
    value = _parse(path.read_bytes(), {"file": path}, "it begins as a JSON array and ")
    assert isinstance(value, list)
    return value


def _array(path: Path) -> list[Any]:
    """Return the items of a file that is one JSON array; cached as long as the file does not change."""
    status = path.stat()
    return _parsed_array(path, (status.st_mtime_ns, status.st_size))


def _parse(text: bytes, place: FilePlace, what: str = "it ") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except RecursionError:
        raise InputError(f"{what}is nested too deeply to be read", **place) from None
    except ValueError as error:  # of JSON, of UTF-8, of a key that comes twice, of a number with thousands of digits
        raise InputError(f"{what}is not JSON: {error}", **place) from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values


def _object(value: Any, place: FilePlace) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"it is not a JSON object but {type(value).__name__}", **place)
    return value


def _row(values: dict[str, Any], columns: Sequence[str], place: FilePlace) -> Row:
    return Row({name: _value(values, name, place) for name in columns}, place)


def _value(values: dict[str, Any], name: str, place: FilePlace) -> Any:
    """Return the column ``name``, or the value that its dots lead to in a column of structs and lists."""
    top = _column(values, name, place)
    if top == name:
        return values[name]
    value, path = values[top], top
    for step in name.removeprefix(f"{top}.").split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step == "0" and len(value) == 1:
            value = value[0]
        elif isinstance(value, dict):
            there = ", ".join(sorted(value)) or "none"
            raise InputError(f"{path!r} has no field {step!r}; it has {there}", **place)
        elif isinstance(value, list):
            remedy = f"`{path}.0` reads the item of a list of one"
            raise InputError(f"{path!r} holds {len(value)} items", remedy=remedy, **place)
        else:
            raise InputError(f"{path!r} holds {type(value).__name__}, which has no field {step!r}", **place)
        path = f"{path}.{step}"
    return value


def _column(there: Iterable[str], name: str, place: FilePlace) -> str:
    """Return the column that contains ``name``: itself, or its longest prefix before a dot that is a column.

    Raises:
        NoColumn: there is none.
    """
    names = list(there)
    pieces = name.split(".")
    for count in range(len(pieces), 0, -1):
        if ".".join(pieces[:count]) in names:
            return ".".join(pieces[:count])
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise NoColumn(f"there is no column {name!r}; it has {', '.join(sorted(names)) or 'none'}{hint}", **place)


def _parquet_file(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no Parquet file: {error}", file=path) from error


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    file = _parquet_file(path)
    tops = [_column(file.schema_arrow.names, name, {"file": path}) for name in columns]
    for batch in file.iter_batches(columns=list(dict.fromkeys(tops))):
        yield str(path), batch


def _arrow_batches(path: Path, split: str | None, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    folder = _split(path, split)
    for file in _arrow_files(folder):
        for batch in _open_arrow(file):
            tops = [_column(batch.schema.names, name, {"file": folder}) for name in columns]
            yield str(folder), batch.select(list(dict.fromkeys(tops)))


def _split(path: Path, split: str | None) -> Path:
    """Return the folder of the data set itself: ``path``, or the split of it."""
    listing = path / "dataset_dict.json"
    if not listing.exists():
        if split is not None:
            problem = f"split is {split!r}, but {path} holds one data set without splits"
            raise InputError(problem, setting="split", file=path, remedy="remove it")
        return path
    splits = _json(listing).get("splits", [])
    if split not in splits:
        problem = f"split is {split!r}, but {path} has the splits {', '.join(splits)}"
        raise InputError(problem, setting="split", file=path, remedy="choose one")
    return path / str(split)


def _arrow_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if not state.exists():
        raise InputError(f"{folder} is no folder saved with datasets' save_to_disk: it has no state.json", file=folder)
    try:
        names = [str(entry["filename"]) for entry in _json(state)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{state} does not list the data files of a data set", file=state) from error
    paths = [folder / name for name in names]
    for file in paths:
        if file.parent != folder or not file.is_file():
            problem = f"{state} names {file.name}, which is not there: the folder was not copied whole"
            raise InputError(problem, file=state)
    return paths


def _open_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no Arrow stream file: {error}", file=path) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}", file=path) from error
