"""`eopd push`: an artifact of a store as a dataset of the Hub, a trained student as a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from eopd.pipeline.cli.options import RunName, RunsFolder, Set, StudentNumber, config_of, open_runs
from eopd.stages.format import size
from eopd.storage.errors import InputError


class PushGroup(TyperGroup):
    """Takes `eopd push scores/KEY USER/NAME` for `eopd push artifact scores/KEY USER/NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, ["artifact", *args] if "/" in args[0] else args)


app = typer.Typer(
    cls=PushGroup,
    help="Upload a teacher cache as a dataset of the Hugging Face Hub, or a student as a model, with a card.\n\n"
    "`eopd push scores/KEY USER/NAME` is short for `eopd push artifact scores/KEY USER/NAME`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Repository = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; made if there is none.")]
Licence = Annotated[
    str, typer.Option("--license", help="Licence in the card, by its name on the Hub, such as apache-2.0.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private if there is none yet.")]
To = Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="Write the folder there, and upload nothing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the card and the files, and upload nothing.")]
UNKNOWN = "unknown"


@app.command()
def artifact(
    name: Annotated[str, typer.Argument(metavar="ARTIFACT", help="kind/KEY; its beginning is enough.")],
    repository: Repository,
    store: Annotated[str, typer.Option("--store", help="Folder of the store.")] = "store",
    license_: Licence = UNKNOWN,
    private: Private = False,
    rollouts: Annotated[
        bool, typer.Option(help="Also push the rollouts that it belongs to: prompts and responses.")
    ] = True,
    to: To = None,
    dry_run: DryRun = False,
) -> None:
    """Push scores, rollouts, verdicts, evaluations or student_topk: a dataset that is a store, read by hf:// URLs."""
    from eopd.pipeline.push import artifacts_of, refuse_other_content, write_dataset
    from eopd.storage.places import open_place

    place = open_place(store)
    if not isinstance(place, Path):
        raise InputError(f"--store {store} is no folder", setting="--store", remedy="`eopd store copy` it to one first")
    artifacts = artifacts_of(place, name, rollouts=rollouts)

    def write(folder: Path) -> None:
        if to is not None:
            write_dataset(place, artifacts, folder, repository, license_)
            return
        if not dry_run:
            refuse_other_content(repository, artifacts)
        write_dataset(place, artifacts, folder, repository, license_, place=lambda file, link: os.symlink(file, link))

    _push(write, repository, "dataset", license_, private, to, dry_run)


@app.command()
def student(
    run: RunName,
    repository: Repository,
    set_: Set = None,
    runs: RunsFolder = Path("runs"),
    round_: StudentNumber = None,
    license_: Licence = UNKNOWN,
    private: Private = False,
    to: To = None,
    dry_run: DryRun = False,
) -> None:
    """Push a trained student with its settings, lineage and measured results (`eopd student` copies it out)."""
    from eopd.pipeline.export import find_student, newest
    from eopd.pipeline.push import write_student

    (opened,) = open_runs(config_of(run, runs), set_, None)
    model = find_student(opened, newest(opened) if round_ is None else round_)
    sys.stderr.write(f"{model}\n")
    _push(
        lambda folder: write_student(opened, model, folder, repository, license_),
        repository, "model", license_, private, to, dry_run,
    )  # fmt: skip


def _push(
    write: Callable[[Path], None],
    repository: str,
    kind: Literal["dataset", "model"],
    licence: str,
    private: bool,
    to: Path | None,
    dry_run: bool,
) -> None:
    """Write the folder, then show it or upload it."""
    from eopd.pipeline.push import CARD, check_licence
    from eopd.storage.hub import check_name, require_token, upload

    check_name(repository)
    check_licence(licence)
    if to is None and not dry_run:
        require_token(repository)
    if licence == UNKNOWN:
        sys.stderr.write("the card says `license: unknown`; --license names one\n")
    if to is not None:
        write(to)
        sys.stdout.write(f"{to}\n")
        return
    with TemporaryDirectory(prefix="eopd-push-") as temporary:
        folder = Path(temporary) / "folder"
        write(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        total = size(sum(path.stat().st_size for path in files))
        if dry_run:
            sys.stdout.write((folder / CARD).read_text(encoding="utf-8"))
            sys.stdout.writelines(f"{path.relative_to(folder)}\n" for path in files)
            sys.stdout.write(f"{len(files)} files, {total}; nothing was uploaded\n")
            return
        sys.stderr.write(f"{len(files)} files, {total}\n")
        message = "Push with eopd"
        sys.stdout.write(f"{upload(folder, repository, kind, private=private, message=message)}\n")
