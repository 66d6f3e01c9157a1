"""All paths of the store's and the run folder's layout.

A kind of artifact is a folder of the store whose name is a lower-case word (``is_kind``): storage lists none.

<store>/<kind>/<key>/identity.json          what the key is the hash of
<store>/<kind>/<key>/manifest.json          written when the last part is complete
<store>/<kind>/<key>/part-00003.json        the commit marker of a part
<store>/<kind>/<key>/part-00003.<nonce>/    its data
<store>/<kind>/<key>/part-00003.pruned      in the marker's place once its data were given up
<store>/<kind>/<key>/part-00003.set_aside   a hint that it was committed empty; its marker says whether and why
<store>/<kind>/<key>/part-00003.claim       locked by who is at work on it; left where it is
<store>/<kind>/<key>/*.damaged              set aside by a repair
<store>/.runs/                              which runs use the store
<store>/.models/<fingerprint>/              GGUF files as model folders; may be deleted, and is then made again
<store>/.digests.json                       of files outside the store that were hashed before; may be deleted
<store>/scores/<identity>/<coverage>/       scores: a coverage beside its identity
<store>/.fetched/<kind>/<key>/              parts of a bucket's artifacts that are read as files: a store of its own

<runs>/<name>/config.yaml       resolved settings
<runs>/<name>/references.json   artifacts that the run refers to, for gc and pruning
<runs>/<name>/jobs.jsonl        one line a task: what it cost, or how it failed
<runs>/<name>/summary.json      one row of figures per round
<runs>/<name>/metrics.jsonl     one line per optimiser step
<runs>/<name>/logs/             engine logs, one file a job
<runs>/<name>/slurm/            scripts of job arrays; submitted.json: ids of those in the queue
<runs>/<name>/tensorboard/      the same figures as events
<runs>/<name>/failures/         what a step that was not finite was made of
<runs>/<name>/trackers.json     ids of the run in W&B or Trackio
<runs>/<name>/report/index.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

IDENTITY = "identity.json"
MANIFEST = "manifest.json"
DIGESTS = ".digests.json"
FETCHED = ".fetched"
MODELS = ".models"
RUNS = ".runs"
REFERENCES = "references.json"
PART = "part-"
CLAIM = ".claim"

_KIND = re.compile(r"(?=.{1,64}\Z)[a-z]+(_[a-z]+)*")
_KEY = re.compile(r"[0-9a-f]{20}(/[0-9a-f]{20})?")
_MARKER = re.compile(r"^part-(\d{5,})\.json$")
_TOMBSTONE = re.compile(r"^part-(\d{5,})\.pruned$")
_DATA = re.compile(r"^part-(\d{5,})\.([0-9a-f]{16})$")


def is_kind(name: str) -> bool:
    """True if ``name`` may be a kind of artifact: a lower-case word, or several joined by underscores."""
    return _KIND.fullmatch(name) is not None


def is_key(text: str) -> bool:
    """True if ``text`` is an artifact's key: an identity, or a coverage below its identity."""
    return _KEY.fullmatch(text) is not None


def part_name(part: int) -> str:
    return f"{PART}{part:05d}"


def marker_name(part: int) -> str:
    return f"{part_name(part)}.json"


def tombstone_name(part: int) -> str:
    return f"{part_name(part)}.pruned"


def claim_name(part: int) -> str:
    return f"{part_name(part)}{CLAIM}"


def set_aside_name(part: int) -> str:
    return f"{part_name(part)}.set_aside"


def data_name(part: int, nonce: str) -> str:
    return f"{part_name(part)}.{nonce}"


def damaged_name(part: int, nonce: str) -> str:
    return f"{part_name(part)}.{nonce}.damaged"


def tombstone_part(name: str) -> int | None:
    """Return the part number if ``name`` is the tombstone of a pruned part, else None."""
    match = _TOMBSTONE.fullmatch(name)
    return int(match.group(1)) if match else None


def is_of_a_commit(name: str) -> bool:
    """True if ``name`` is a commit marker or the tombstone of a pruned part."""
    return _MARKER.fullmatch(name) is not None or _TOMBSTONE.fullmatch(name) is not None


def parts_named(listing: str, suffix: str) -> set[int]:
    """Return part numbers of all ``part-<number><suffix>`` in a listing with one name per line."""
    if suffix not in listing:
        return set()
    return set(map(int, re.findall(rf"^part-(\d{{5,}}){re.escape(suffix)}$", listing, re.MULTILINE)))


def data_part(name: str) -> tuple[int, str] | None:
    """Return (part, nonce) if ``name`` is a data folder, else None."""
    match = _DATA.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else None


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run's files for people. Nothing here is needed to resume; the store is."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def references(self) -> Path:
        return self.folder / REFERENCES

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def slurm(self) -> Path:
        return self.folder / "slurm"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def report(self) -> Path:
        return self.folder / "report"


# -- checkpoints ------------------------------------------------------------------------------------------------------

# A checkpoint: two parts, the student's weights and the optimiser's state, and the names of their files.
#
# Producer: ``stages.train``. Readers: every stage that runs the student, ``stages.report`` and
# ``pipeline.retention``.


CHECKPOINTS = "checkpoints"
"""The kind of these artifacts."""

WEIGHTS, OPTIMIZER = 0, 1
"""Parts of a checkpoint."""

METRICS_FILE = "metrics.jsonl"
TRAINING_FILE = "training.json"
OPTIMIZER_FILE = "optimizer.safetensors"
ROUND_START_FILE = "round_start.safetensors"
ADAPTER_FOLDER = "adapter"
