"""`eopd store`: inspection and maintenance of a store. Each verb calls a function of ``eopd.storage``."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eopd.stages.format import escaped, one_line, size
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

    from eopd.storage.artifacts import Artifact
    from eopd.storage.listing import Listed
    from eopd.storage.remote import RemoteArtifact
    from eopd.storage.teacher_cache import TeacherCache
    from eopd.storage.verdict_signal import VerdictSignal

app = typer.Typer(
    help="Inspect and maintain a store: list its content, verify it, collect garbage.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[str, typer.Option("--store", help="Folder of the store.")]
Place = Annotated[
    str, typer.Option("--store", help="Folder of the store, or a URL: s3://team/store, hf://datasets/USER/NAME.")
]
Name = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A key, or kind/key; its beginning is enough.")]


def _say(text: str) -> None:
    """Print lines with control characters escaped, so that file names cannot steer the terminal."""
    sys.stdout.write(escaped(text) + "\n")


@app.command()
def ls(
    store: Place = "store",
    name: Annotated[str, typer.Argument(metavar="[BEGINNING]", help="Only these, such as scores or rollouts/08.")] = "",
) -> None:
    """List every artifact with its parts, size and state."""
    from eopd.storage import listing

    artifacts = [item for item in listing.ls(_opened(store)) if f"{item.kind}/{item.key}".startswith(name)]
    for item in artifacts:
        name = one_line(f"{item.kind}/{item.key}")
        _say(f"{name:<56} {_parts(item):>13} {size(item.bytes):>10}  {one_line(_state(item))}")
    _say(f"{len(artifacts)} artifacts, {size(sum(item.bytes for item in artifacts))}")


def _parts(item: Listed) -> str:
    if item.kind == "progress":  # as many as the training takes, which is not known beforehand
        return ""
    return f"{item.parts} part{'' if item.parts == 1 else 's'}"


def _state(item: Listed) -> str:
    if item.problem:
        return item.problem
    if item.kind == "progress":
        return "states of a training that has not ended"
    state = "complete" if item.complete else f"{item.committed} of {item.parts} parts"
    return f"{state}, {item.pruned} pruned" if item.pruned else state


@app.command()
def show(name: Name, store: Place = "store") -> None:
    """Show identity, inputs and parts of one artifact as JSON."""
    from eopd.storage import listing

    _say(json.dumps(listing.show(listing.find(_opened(store), name)), indent=1))


@app.command()
def stats(
    name: Name,
    store: Place = "store",
    parts: Annotated[int | None, typer.Option(help="Look at the first N parts only.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write the entropy histogram as an image (.svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Summarise scores: bytes by field, entropy, mass kept by k, tokens gated by tau. Helps to choose k and tau.

    If the store holds verdicts on the same rollouts: whether the teacher tells right from wrong responses.
    """
    from eopd.storage import statistics
    from eopd.storage.sources import filled_parts

    cache = _scores(store, name)
    figures = statistics.stats(cache, islice(filled_parts(cache.artifact), parts))
    signal = _signal(cache, store, parts)
    if as_json:
        _say(json.dumps({**figures.to_json(), "signal": None if signal is None else signal.to_json()}, indent=1))
    else:
        _say(figures.text() if signal is None else f"{figures.text()}\n\n{signal.text()}")
    if plot is not None:
        statistics.plot(figures, _writable(plot))


def _signal(cache: TeacherCache, store: str, parts: int | None) -> VerdictSignal | None:
    """Compare the scores with verdicts on their rollouts, if a folder holds them all."""
    from eopd.storage.artifacts import Artifact
    from eopd.storage.sources import filled_parts
    from eopd.storage.teacher_cache import JointCache
    from eopd.storage.verdict_signal import sources_of, verdict_signal

    folder, artifact = _opened(store), cache.artifact
    sources = sources_of(folder, artifact) if isinstance(folder, Path) and isinstance(artifact, Artifact) else None
    if sources is None:
        return None
    return verdict_signal(JointCache([artifact]), *sources, islice(filled_parts(artifact), parts))


def _scores(store: str, name: str) -> TeacherCache:
    """Find scores by ``name``: a key, or scores/key."""
    from eopd.storage.teacher_cache import TeacherCache

    return TeacherCache(_score_artifact(store, name))


def _score_artifact(store: str, name: str) -> Artifact | RemoteArtifact:
    from eopd.storage import listing

    artifact = listing.find(_opened(store), name if "/" in name else f"scores/{name}")
    if artifact.kind != "scores":
        raise InputError(
            f"{artifact} are no scores", artifact=str(artifact), remedy="name one of `eopd store ls scores`"
        )
    return artifact


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to", file=path)
    return path


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[ARTIFACT]...", help="Only these: keys, or kind/key; all by default.")
    ] = None,
    store: Place = "store",
    repair: Annotated[
        bool, typer.Option(help="Set damaged parts aside, so that the next run, or copy to a bucket, makes them again.")
    ] = False,
) -> None:
    """Check every byte against its commit marker; exit code 1 and the names of damaged files."""
    from eopd.storage import listing, verification

    place = _existing(store)
    only = [listing.named(place, name) for name in names] if names else None
    damages = verification.verify(place, only, repair=repair)
    for damage in damages:
        named = damage.problem.startswith(damage.folder)
        _say(one_line(damage.problem if named else f"{damage.folder}: {damage.problem}"))
    left = sum(damage.beyond_repair for damage in damages)
    again = "run the same commands again" if isinstance(place, Path) else "`eopd store copy` puts them there again"
    mended = len(damages) - left
    _say(
        f"{mended} damaged"
        + (f", set aside: {again}" if mended and repair else "")
        + (f"; {left} that no repair can mend" if left else "")
    )
    if left or (damages and not repair):
        raise typer.Exit(1)


def _existing(place: str) -> Path | Bucket:
    """Return an existing store. Raises ValueError if there is none: a missing store would pass as undamaged."""
    from eopd.storage.listing import is_store

    if not is_store(opened := _opened(place)):
        raise InputError(f"there is no store at {place}", setting="--store", file=place)
    return opened


@app.command()
def gc(
    store: Folder = "store",
    runs: Annotated[
        Path | None,
        typer.Option(help="Keep only what the runs in this folder, and others that use the store, refer to."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only show what would be removed.")] = False,
) -> None:
    """Remove leftovers of killed jobs and, with --runs, artifacts to which no run refers. Dry run by default."""
    from eopd.storage import garbage, listing

    folder = _folder(store)
    for _, problem in listing.misplaced(folder):
        _say(f"passed over: {problem}")
    removals = garbage.plan(folder, None if runs is None else _roots(runs, folder))
    for removal in removals:
        _say(f"{size(removal.bytes):>10}  {one_line(str(removal.path))}  ({removal.reason})")
    total = sum(removal.bytes for removal in removals)
    if not yes:
        _say(f"{len(removals)} removals would free {size(total)}; nothing was removed (--yes does it)")
        return
    removed = garbage.remove(removals)
    for stayed in removed.stayed:
        _say(f"stayed: {stayed}")
    _say(f"freed {size(removed.bytes)}")
    if removed.stayed:
        raise typer.Exit(1)


def _folder(place: str) -> Path:
    """Return the folder of a store. Raises ValueError if the store is a bucket or does not exist."""
    opened = _opened(place)
    if not isinstance(opened, Path):
        raise InputError(
            f"gc works on folders, and {place} is a bucket, where eopd deletes nothing",
            setting="--store",
            file=place,
            remedy="`eopd store ls` shows what it holds; what you no longer want is deleted with the bucket's own "
            "tools (such as aws s3 rm --recursive)",
        )
    if not opened.is_dir():
        raise InputError(f"there is no store at {place}", setting="--store", file=place)
    return opened


def _roots(runs: Path, store: Path) -> set[tuple[str, str]]:
    from eopd.pipeline.retention import references

    by_config = references(store, runs)
    for config in by_config:
        if not config.is_relative_to(runs.resolve()):
            _say(f"kept as well: artifacts of {config}, which uses this store")
    return {key for keys in by_config.values() for key in keys}


@app.command()
def copy(
    name: Name,
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="Folder of another store, or a bucket's URL such as s3://bucket/store."),
    ],
    store: Place = "store",
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Also all that it was made from: a run can then go on from the copy.")
    ] = False,
) -> None:
    """Copy an artifact to another store, a folder or a bucket; run the command again to continue."""
    from eopd.storage import garbage, listing
    from eopd.storage.remote import copy as copy_artifact

    source = _opened(store)
    source_artifact = listing.find(source, name)
    wanted = {(source_artifact.kind, source_artifact.key)}
    if inputs:
        wanted = garbage.reachable(source, wanted)
    for kind, key in sorted(wanted):
        artifact = listing.open_in(source, kind, key)
        copied = copy_artifact(artifact, _opened(target))
        pruned = len(artifact.pruned().intersection(copied))
        _say(f"{artifact}: {len(copied)} parts copied to {target}{f', {pruned} pruned' if pruned else ''}")


def _opened(place: str) -> Path | Bucket:
    from eopd.storage.places import open_place

    return open_place(place)


@app.command()
def export(
    name: Name,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet file to write.")],
    store: Place = "store",
    format_: Annotated[
        Literal["eopd", "axolotl"],
        typer.Option(
            "--format",
            help="eopd: a row a response, with entropies, heads, tails and draws. axolotl: whole sequences with labels "
            "and top-k lists, in the columns of its KD plugin, of which TRL's trainers read the ids and masks.",
        ),
    ] = "eopd",
) -> None:
    """Write scores as one Parquet table that other trainers and `datasets` read."""
    from tempfile import TemporaryDirectory

    from eopd.storage.exchange import export_parquet, export_sequences
    from eopd.storage.sources import filled_parts
    from eopd.storage.stacked import open_files
    from eopd.storage.teacher_cache import TeacherCache

    scores = _score_artifact(store, name)
    cache = TeacherCache(scores)
    if format_ == "eopd":
        _say(f"{path}: {export_parquet(cache, _writable(path)):,} tokens")
        return
    key = scores.identity.inputs.get("rollouts")
    if key is None:
        raise InputError(
            f"{scores} were imported, and no rollouts hold their prompts: the capture does", artifact=str(scores)
        )
    with TemporaryDirectory() as fetched:
        rollouts = open_files(_opened(store), "rollouts", key, Path(fetched))
        sequences, tokens = export_sequences(cache, rollouts, _writable(path))
    temperature = cache.header(next(filled_parts(scores), 0)).temperature
    _say(f"{path}: {sequences:,} sequences, {tokens:,} tokens with log-probs at temperature {temperature:g}")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet file of uncompressed top-k lists.")],
    store: Folder = "store",
    teacher: Annotated[str, typer.Option(help="Name of the teacher that made it.")] = ...,  # type: ignore[assignment]
    tokenizer: Annotated[str, typer.Option(help="Name of its tokenizer.")] = ...,  # type: ignore[assignment]
    vocab_size: Annotated[int, typer.Option(help="Rows of the teacher's vocabulary.")] = ...,  # type: ignore[assignment]
    ids: Annotated[str | None, typer.Option(help="Column of the token ids (input_ids).")] = None,
    top_ids: Annotated[
        str | None,
        typer.Option(help="Column of the top-k ids of each position (target_token_ids or top_indices, as there is)."),
    ] = None,
    top_logprobs: Annotated[
        str | None, typer.Option(help="Column of their log-probs (target_logprobs or top_values).")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Column that is 0 for entries that are not there (target_mask, if there is one).")
    ] = None,
    shifted: Annotated[bool, typer.Option(help="Position t of the capture predicts token t + 1.")] = True,
) -> None:
    """Take a capture with axolotl's columns, or DistillKit's, into a store as scores of one part."""
    from eopd.storage.artifacts import Artifact
    from eopd.storage.captures import columns_of, imported_header, read_capture
    from eopd.storage.files import sha256_file
    from eopd.storage.identity import Identity
    from eopd.storage.teacher_cache import write_part

    if not path.is_file():
        raise InputError(f"there is no file {path}", file=path)
    if not isinstance(place := _opened(store), Path):
        raise InputError(
            f"--store {store} is a bucket, and import writes to a folder",
            setting="--store",
            file=store,
            remedy="import there, then `eopd store copy` it here",
        )
    named = {"ids": ids, "top_ids": top_ids, "top_logprobs": top_logprobs, "mask": mask}
    columns = columns_of(path, {name: column for name, column in named.items() if column is not None})
    capture = read_capture(path, columns, shifted=shifted, vocab_size=vocab_size)
    rows = capture.rows
    header = imported_header(rows, teacher=teacher, tokenizer=tokenizer, vocab_size=vocab_size, source=path.name)
    digest = sha256_file(path)
    read = {
        "teacher": teacher,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "shifted": shifted,
        "columns": columns.names,
    }
    artifact = Artifact(place, Identity("scores", 1, 1, {"imported": read}, {"capture": digest}, {"head": "capture"}))
    if not artifact.is_committed(0):
        with artifact.write_part(0, inputs={"capture": digest}) as folder:
            write_part(folder, rows, header)
    _say(f"{artifact}: {rows.tokens:,} tokens in {rows.responses:,} sequences")
    if capture.mass > 1.0:
        _say(f"Its log-probs are {capture.precision}: masses of up to {capture.mass:.4f} were scaled to 1.")
