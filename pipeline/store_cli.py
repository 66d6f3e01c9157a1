"""`eopd store`: looking after a store. Every verb is a function of ``eopd.storage``; this is their command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eopd.pipeline.words import size

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

app = typer.Typer(
    help="Look after a store: what it holds, whether it is sound, what nothing needs any more.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Option("--store", help="Folder of the store.")]
Place = Annotated[str, typer.Option("--store", help="Folder of the store, or URL of a bucket such as s3://team/store.")]
Name = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A key, or kind/key; its beginning is enough.")]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


@app.command()
def ls(store: Place = "store") -> None:
    """Every artifact: parts, size, state."""
    from eopd.storage import listing

    found = listing.ls(_opened(store))
    for item in found:
        state = item.problem or ("complete" if item.complete else f"{item.committed} of {item.parts} parts")
        state += f", {item.pruned} pruned" if item.pruned else ""
        _say(f"{item.kind + '/' + item.key:<56} {item.parts:>6} parts {size(item.bytes):>10}  {state}")
    _say(f"{len(found)} artifacts, {size(sum(item.bytes for item in found))}")


@app.command()
def show(name: Name, store: Place = "store") -> None:
    """Identity, inputs and parts of one artifact, as JSON."""
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
    """What scores hold: bytes by field, entropy, mass kept by k, tokens gated by tau. Choose k and tau from this."""
    from eopd.storage import listing, statistics
    from eopd.storage.teacher_cache import TeacherCache

    artifact = listing.find(_opened(store), name if "/" in name else f"scores/{name}")
    chosen = sorted(artifact.committed())[:parts]
    found = statistics.stats(TeacherCache(artifact), chosen)
    _say(json.dumps(found.to_json(), indent=1) if as_json else found.text())
    if plot is not None:
        statistics.plot(found, plot)


@app.command()
def verify(
    store: Store = Path("store"),
    repair: Annotated[
        bool, typer.Option(help="Set damaged parts aside, so that the next run makes them again.")
    ] = False,
) -> None:
    """Check every byte against what was committed; exit code 1 and the names of what is damaged."""
    from eopd.storage import listing, verification

    if not store.is_dir():
        listing.ls(store)  # says that there is none
    damages = verification.verify(store, repair=repair)
    for damage in damages:
        _say(f"{damage.kind}/{damage.key} {'' if damage.part is None else f'part {damage.part} '}- {damage.problem}")
    _say(f"{len(damages)} damaged" + (", set aside: run the same commands again" if damages and repair else ""))
    if damages and not repair:
        raise typer.Exit(1)


@app.command()
def gc(
    store: Store = Path("store"),
    runs: Annotated[Path | None, typer.Option(help="Keep only what the runs in this folder refer to.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only show what would go.")] = False,
) -> None:
    """Remove left-overs of killed jobs and, with --runs, artifacts that none of its runs refers to. Dry run first."""
    from eopd.storage import garbage

    removals = garbage.plan(store, None if runs is None else _roots(runs, store))
    for removal in removals:
        _say(f"{size(removal.bytes):>10}  {removal.path}  ({removal.reason})")
    total = sum(removal.bytes for removal in removals)
    if not yes:
        _say(f"{len(removals)} removals would free {size(total)}; nothing was removed (--yes does it)")
        return
    _say(f"freed {size(garbage.remove(removals))}")


def _roots(runs: Path, store: Path) -> set[tuple[str, str]]:
    """(kind, key) of everything in the plans of the runs below ``runs`` that use ``store``."""
    from eopd.pipeline.config import load_config
    from eopd.pipeline.planning import plan_run

    roots: set[tuple[str, str]] = set()
    for config in sorted(runs.glob("*/config.yaml")):
        settings = load_config(str(config))
        if store.resolve() in [Path(place).resolve() for place in settings.read_only_stores]:
            raise ValueError(
                f"{store} is only read by {config}: what others made in it is not this run's to remove. Collect it "
                "where its own runs are, or leave out --runs to remove left-overs of killed jobs only"
            )
        if Path(settings.store).resolve() != store.resolve():
            continue
        for job in plan_run(settings)[1].jobs:
            roots |= {(identity.kind, identity.key) for identity in (job.output, job.side) if identity is not None}
    return roots


@app.command()
def copy(
    name: Name,
    target: Annotated[
        str, typer.Argument(help="Folder of another store, or a bucket's URL such as s3://bucket/store.")
    ],
    store: Place = "store",
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Also what it was made from: a run can then train from the copy.")
    ] = False,
) -> None:
    """Copy an artifact to another store; run again to continue. Reads and writes folders and buckets."""
    from eopd.storage import garbage, listing
    from eopd.storage.transfer import copy as copy_artifact

    source = _opened(store)
    found = listing.find(source, name)
    wanted = {(found.kind, found.key)}
    if inputs:
        wanted = garbage.reachable(source, wanted)
    for kind, key in sorted(wanted):
        artifact = listing.open_in(source, kind, key)
        _say(f"{artifact}: {len(copy_artifact(artifact, _opened(target)))} parts copied to {target}")


def _opened(place: str) -> Path | Bucket:
    from eopd.storage.places import open_place

    return open_place(place)


@app.command()
def export(
    name: Name,
    path: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    store: Place = "store",
) -> None:
    """Write scores as one Parquet table (ids, log-probs, entropy per token) that other trainers and `datasets` read."""
    from eopd.storage import listing
    from eopd.storage.exchange import export_parquet
    from eopd.storage.teacher_cache import TeacherCache

    tokens = export_parquet(TeacherCache(listing.find(_opened(store), name if "/" in name else f"scores/{name}")), path)
    _say(f"{path}: {tokens:,} tokens")


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="Parquet file of uncompressed top-k lists.")],
    store: Store = Path("store"),
    teacher: Annotated[str, typer.Option(help="Name of the teacher that made it.")] = ...,  # type: ignore[assignment]
    tokenizer: Annotated[str, typer.Option(help="Name of its tokenizer.")] = ...,  # type: ignore[assignment]
    vocab_size: Annotated[int, typer.Option(help="Rows of the teacher's vocabulary.")] = ...,  # type: ignore[assignment]
    ids: Annotated[str, typer.Option(help="Column of the token ids.")] = "input_ids",
    top_ids: Annotated[str, typer.Option(help="Column of the top-k ids of each position.")] = "top_indices",
    top_logprobs: Annotated[str, typer.Option(help="Column of their log-probs.")] = "top_values",
    shifted: Annotated[bool, typer.Option(help="Position t of the capture predicts token t + 1.")] = True,
) -> None:
    """Take a DistillKit-style capture into a store as scores of one part."""
    from eopd.storage.artifacts import Artifact, Identity
    from eopd.storage.exchange import import_topk, imported_header
    from eopd.storage.files import sha256_file
    from eopd.storage.teacher_cache import write_part

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    rows = import_topk(path, ids=ids, top_ids=top_ids, top_logprobs=top_logprobs, shifted=shifted)
    header = imported_header(rows, teacher=teacher, tokenizer=tokenizer, vocab_size=vocab_size, source=path.name)
    digest = sha256_file(path)
    artifact = Artifact(
        store, Identity("scores", 1, 1, {"imported": {"shifted": shifted}}, {"capture": digest}, {"head": "capture"})
    )
    if not artifact.is_committed(0):
        with artifact.write_part(0, inputs={"capture": digest}) as folder:
            write_part(folder, rows, header)
    _say(f"{artifact}: {rows.tokens:,} tokens in {rows.responses:,} sequences")
