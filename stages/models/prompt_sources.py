"""Reading prompt files: JSONL, Parquet, and folders saved with ``datasets``' ``save_to_disk``.

The last are read as what they are, Arrow stream files listed in ``state.json``: no code of a data set is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Stamp = tuple[tuple[str, int, int], ...]

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Row:
    """The asked-for columns of one row, and where it stands, for messages."""

    values: dict[str, Any]
    where: str


def read(path: Path, split: str | None, columns: Sequence[str], limit: int | None) -> Iterator[Row]:
    """Rows of a source in order, at most ``limit``.

    Raises:
        ValueError: as ``prompts.load_prompts``.
    """
    kind = _kind(path)
    if kind == "jsonl":
        yield from _read_lines(path, columns, limit)
        return
    first = 0
    for name, batch in _parquet_batches(path, columns) if kind == "parquet" else _arrow_batches(path, split, columns):
        for number, values in enumerate(batch.to_pylist()):
            if first + number == limit:
                return
            yield Row(values, f"{name} row {first + number}")
        first += batch.num_rows


def count(path: Path, split: str | None) -> int:
    """Rows of a source; of JSONL, its lines that are not blank."""
    kind = _kind(path)
    if kind == "jsonl":
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    if kind == "parquet":
        return int(_parquet_file(path).metadata.num_rows)
    return sum(batch.num_rows for file in _arrow_files(_split(path, split)) for batch in _open_arrow(file))


def files(path: Path, split: str | None) -> list[Path]:
    """The files that hold a source."""
    if _kind(path) != "folder":
        return [path]
    folder = _split(path, split)
    return [folder / "state.json", *_arrow_files(folder)]


def stamp(path: Path, split: str | None) -> Stamp:
    """What changes when a source does: time of the last change (ns) and bytes of its files."""
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files(path, split))


def _kind(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise ValueError(f"prompt source {path} does not exist: check its path")
    if path.stat().st_size == 0:
        raise ValueError(f"prompt source {path} is empty")
    if path.suffix.lower() in JSON_LINES:
        return "jsonl"
    if path.suffix.lower() in PARQUET:
        return "parquet"
    raise ValueError(
        f"prompt source {path}: cannot tell its format from {path.suffix!r}; use "
        f"{', '.join(JSON_LINES + PARQUET)} or a folder saved with save_to_disk"
    )


def _read_lines(path: Path, columns: Sequence[str], limit: int | None) -> Iterator[Row]:
    found = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if found == limit:
                return
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{where} is not a JSON object but {type(values).__name__}")
            _require(columns, values.keys(), where)
            yield Row(values, where)
            found += 1


def _require(columns: Sequence[str], there: Any, where: str) -> None:
    for name in columns:
        if name not in there:
            raise ValueError(
                f"{where} has no column {name!r}; it has {', '.join(sorted(there)) or 'none'}. Map them with columns."
            )


def _parquet_file(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    file = _parquet_file(path)
    _require(columns, file.schema_arrow.names, str(path))
    for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
        yield str(path), batch


def _arrow_batches(path: Path, split: str | None, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    folder = _split(path, split)
    for file in _arrow_files(folder):
        for batch in _open_arrow(file):
            _require(columns, batch.schema.names, str(file))
            yield str(folder), batch.select(list(dict.fromkeys(columns)))


def _split(path: Path, split: str | None) -> Path:
    """Folder of the data set itself: ``path``, or the split of it."""
    listing = path / "dataset_dict.json"
    if not listing.exists():
        if split is not None:
            raise ValueError(f"split is {split!r}, but {path} holds one data set without splits; remove it")
        return path
    splits = _json(listing).get("splits", [])
    if split not in splits:
        raise ValueError(f"split is {split!r}, but {path} has the splits {', '.join(splits)}; choose one")
    return path / str(split)


def _arrow_files(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if not state.exists():
        raise ValueError(f"{folder} is no folder saved with datasets' save_to_disk: it has no state.json")
    try:
        names = [str(entry["filename"]) for entry in _json(state)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{state} does not list the data files of a data set") from error
    found = [folder / name for name in names]
    for file in found:
        if file.parent != folder or not file.is_file():
            raise ValueError(f"{state} names {file.name}, which is not there: the folder was not copied whole")
    return found


def _open_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Arrow stream file: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
