"""What every job of a run took: time from the logs of the runs that did it, tokens and bytes from the artifacts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from eopd.stages.report.data import CostRow
from eopd.storage.artifacts import Artifact
from eopd.storage.jsonl import read_lines

Job = tuple[str, int, Artifact, int | None]
"""Stage, round, artifact, tokens (None: what its parts say)."""


def seconds_by_key(*logs: Path) -> dict[str, float]:
    """Seconds that runs spent on each artifact, by key, from their ``jobs.jsonl``."""
    found: dict[str, float] = {}
    for log in logs:
        for row in read_lines(log):
            found[row["key"]] = found.get(row["key"], 0.0) + row["seconds"]
    return found


def costs(
    jobs: Sequence[Job], own: Mapping[str, float], elsewhere: Mapping[str, float], also_read: Collection[str]
) -> list[CostRow]:
    """One row a job, with the time of all runs on the page that did parts of it. A job that this run found complete is
    shared, and so is one that others on the page read too.

    Args:
        own: seconds by artifact key, of this run.
        elsewhere: the same of the other runs on the page.
        also_read: keys of artifacts that more than one run on the page reads.
    """
    rows = []
    for stage, round_, artifact, tokens in jobs:
        took = [found[artifact.key] for found in (own, elsewhere) if artifact.key in found]
        markers = [artifact.remains(part) for part in range(artifact.parts)]
        counted = [int(marker.info["tokens"]) for marker in markers if "tokens" in marker.info]
        rows.append(
            CostRow(
                stage,
                round_,
                sum(took) if took else None,
                tokens=tokens if tokens is not None else sum(counted) if counted else None,
                bytes=sum(marker.committed_bytes for marker in markers),
                shared=artifact.key not in own or artifact.key in also_read,
                key=artifact.key,
            )
        )
    return rows
