"""Records that are Parquet files. The metadata of a record's schema name it and its version; each has a module here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eopd.storage.errors import NewerSchema, WrongArtifact

_RECORD, _VERSION = b"eopd.record", b"eopd.version"


def named(record: str, version: int = 1) -> dict[bytes, bytes]:
    """Metadata of the schema of a record."""
    return {_RECORD: record.encode(), _VERSION: str(version).encode()}


def write_rows(path: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (possibly none) of the record that ``schema`` is."""
    write_record(path, pa.Table.from_pylist([dict(row) for row in rows], schema=schema))


def write_record(path: Path, table: pa.Table) -> None:
    assert _RECORD in table.schema.metadata, path
    pq.write_table(table, path, compression="zstd")


def read_record(path: Path, metadata: Mapping[bytes, bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file of the record that ``metadata`` name, or ``columns`` of it.

    Raises:
        WrongArtifact: the file holds another record.
        NewerSchema: a newer eopd wrote it.
    """
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.metadata or {}
        _check(path, found, metadata)
        # a part is small: dividing it over threads takes longer than reading it
        return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def _check(path: Path, found: Mapping[bytes, bytes], expected: Mapping[bytes, bytes]) -> None:
    if found.get(_RECORD) != expected[_RECORD]:
        there = found.get(_RECORD, b"no record of eopd").decode()
        raise WrongArtifact(f"{path} holds {there}, not {expected[_RECORD].decode()}")
    version, reads = int(found.get(_VERSION, b"0")), int(expected[_VERSION])
    if version > reads:
        raise NewerSchema(f"{path} has version {version}; this eopd reads up to {reads}. Upgrade eopd to use it.")
    if version < reads:
        raise WrongArtifact(f"{path} has version {version}, and this eopd reads {reads}")
