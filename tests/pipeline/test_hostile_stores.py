"""Every command that reads a store, on stores that others had a hand in: it ends well, or names what is wrong."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from eopd.pipeline.cli.store import app
from eopd.pipeline.forecast import forecast
from eopd.pipeline.retention import note, notes_of_others, references
from eopd.pipeline.run import Run
from eopd.pipeline.status import plan_table, status_view, take_status
from eopd.stages.report.gather import RoundArtifacts, RunArtifacts, gather
from eopd.storage import garbage, listing, paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.claims import claim, holder
from eopd.storage.errors import DamagedPart, MissingArtifact, StoreError, UserError
from eopd.storage.garbage import prune
from eopd.storage.remote import copy
from eopd.storage.student_topk import read_student_topk
from eopd.storage.verification import verify
from tests.pipeline.plan_case import commit, make_run, note_job
from tests.storage import hostile
from tests.storage.hostile import DEEP, HOSTILE, IN_ITS_PLACE, files_of, make_store, places, put
from tests.storage.making import other, scores

SECONDS = 20


@contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ends_well_or_names_it(work: Callable[[], object]) -> None:
    """Nothing but the errors that `eopd` prints as one line."""
    with no_hang():
        try:
            work()
        except UserError:
            return
        except ValueError as error:
            if type(error) is not ValueError:
                raise


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def artifacts_of(store: Path, kind: str) -> list[Artifact]:
    collected = []
    for its_kind, key in listing.keys(store):
        with suppress(StoreError):
            if its_kind == kind:
                collected.append(open_artifact(store, kind, key))
    return collected


def report(store: Path) -> None:
    kinds = ("evaluation_summaries", "rollouts", "scores", "checkpoints", "alignment_summaries")
    evaluated, rollouts, scores, checkpoint, aligned = (next(iter(artifacts_of(store, kind)), None) for kind in kinds)
    artifacts = RoundArtifacts(0, evaluated, rollouts, (scores,) if scores else (), checkpoint, aligned)
    settings = {"train": {"objective": {"name": "opd", "support": "sampled", "k": 16}}}
    none = store / "none"
    gather(RunArtifacts("run", settings, [artifacts], "", None, metrics=none, jobs=none))


def every_command(store: Path, elsewhere: Path) -> Iterator[Callable[[], object]]:
    yield lambda: run("ls", "--store", store)
    for kind, key in listing.keys(store):
        yield lambda kind=kind, key=key: run("show", f"{kind}/{key}", "--store", store)
        if kind == "scores":
            yield lambda key=key: run("stats", f"scores/{key}", "--store", store)
            yield lambda key=key: run("export", f"scores/{key}", elsewhere / "x.parquet", "--store", store)
            yield lambda key=key: run("copy", f"scores/{key}", elsewhere / "copy", "--inputs", "--store", store)
    for artifact in artifacts_of(store, "student_topk"):
        yield lambda artifact=artifact: read_student_topk(artifact.part_folder(0))
    yield lambda: report(store)
    yield lambda: garbage.plan(store, None, grace=-1.0)
    yield lambda: garbage.plan(store, {("checkpoints", "0" * 20)}, grace=-1.0)
    for _ in range(2):
        yield lambda: verify(store)
        yield lambda: verify(store, repair=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("hostile") / "store")


def copy_of(pristine: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(pristine, folder / "store", symlinks=True))


def test_a_sound_store_passes(pristine: Path, tmp_path: Path) -> None:
    store = copy_of(pristine, tmp_path)
    report(store)
    assert verify(store) == []
    for command in every_command(store, tmp_path):
        command()


@pytest.mark.parametrize("by", IN_ITS_PLACE)
@pytest.mark.parametrize("name", ["identity.json", "part-00000.json", "manifest.json", "part-00000.claim"])
def test_what_is_in_a_files_place_is_named_and_set_aside(tmp_path: Path, name: str, by: str) -> None:
    """`verify` goes on to the next artifact, and what it set aside is missing, so that it is made again."""
    artifact, other_one = other(tmp_path, "rollouts", {}), other(tmp_path, "rollouts", {}, name="y")
    victim = other_one.part_folder(0) / "data"
    victim.write_text("z")
    with claim(artifact, 0):
        pass
    hostile.replace(artifact.folder / name, by)
    with no_hang():
        damages = {damage.key: damage for damage in verify(tmp_path)}
        assert other_one.key in damages
        if name.endswith(".claim") and stat.S_ISREG((artifact.folder / name).lstat().st_mode if by != "nothing" else 0):
            assert artifact.key not in damages
        elif by != "nothing":
            assert name in damages[artifact.key].problem
        verify(tmp_path, repair=True)
        assert all(damage.beyond_repair for damage in verify(tmp_path))
        with claim(artifact, 0) as ours:
            assert ours


@pytest.mark.parametrize("by", IN_ITS_PLACE)
def test_a_note_that_is_none_is_named_and_set_aside(tmp_path: Path, by: str) -> None:
    store = make_store(tmp_path / "store")
    (note,) = (store / paths.RUNS).iterdir()
    hostile.replace(note, by)
    with no_hang():
        assert [(damage.kind, damage.name) for damage in verify(store, repair=True)] == (
            [] if by == "nothing" else [(paths.RUNS, note.name)]
        )
        assert verify(store) == []


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_a_sealed_marker_of_any_content_is_taken_or_named(tmp_path: Path, value: Any) -> None:
    artifact = other(tmp_path, "rollouts", {"policy": "0" * 20})
    path = artifact.folder / "part-00000.json"
    text = path.read_text()
    content = json.loads(text)
    content["info"] = {"responses": 1, "tokens": 1, "set_aside": "", "pruned": {"bytes": 1, "checksum": ""}}
    for place in places(content)[1:]:
        hostile.reseal(path, put(content, place, value))
        ends_well_or_names_it(lambda: run("ls", "--store", tmp_path))
        ends_well_or_names_it(lambda: run("show", artifact.key, "--store", tmp_path))
        with no_hang():
            assert {damage.key for damage in verify(tmp_path)} <= {artifact.key}
    if not isinstance(value, dict):
        hostile.reseal(path, {**json.loads(text), "info": value})
        (damage,) = verify(tmp_path)
        assert (damage.part, path.name in damage.problem) == (0, True)


# -- what leads out of a store -------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is nobody's business, with what a store may have in it."""
    folder = tmp_path / "outside"
    artifact = other(folder, "rollouts", {})
    (artifact.part_folder(0) / "data").write_text("changed since")
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o600)
    return folder


def state(folder: Path) -> dict[str, Any]:
    result = {}
    for path in sorted(folder.rglob("*")):
        its = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(its.st_mode) else None
        result[str(path.relative_to(folder))] = (its.st_mode, content)
    return result


def links(store: Path, outside: Path) -> dict[str, Callable[[], Artifact]]:
    """Stores in which some folder on the way to an artifact leads to ``outside``."""
    (key,) = (path.name for path in (outside / "rollouts").iterdir())
    there = outside / "rollouts" / key

    def of_artifact() -> Artifact:
        (store / "rollouts").mkdir(parents=True)
        (store / "rollouts" / key).symlink_to(there)
        return Artifact(store, open_artifact(outside, "rollouts", key).identity)

    def of_kind() -> Artifact:
        store.mkdir()
        (store / "rollouts").symlink_to(outside / "rollouts")
        return Artifact(store, open_artifact(outside, "rollouts", key).identity)

    def of_data() -> Artifact:
        mine = other(store, "rollouts", {})
        data = mine.part_folder(0)
        shutil.rmtree(data)
        data.symlink_to(next(path for path in there.iterdir() if path.is_dir()))
        return mine

    return {"artifact": of_artifact, "kind": of_kind, "data": of_data}


@pytest.mark.parametrize("which", ["artifact", "kind", "data"])
def test_no_command_changes_what_a_link_leads_to(tmp_path: Path, outside: Path, which: str) -> None:
    store = tmp_path / "store"
    artifact = links(store, outside)[which]()
    before = state(outside)
    claimed = suppress(DamagedPart) if which == "data" else pytest.raises(DamagedPart, match="is a link")
    with claimed, claim(artifact, 0):
        pass
    assert holder(artifact, 0) is None
    refused: list[Callable[[], object]] = [
        lambda: artifact.part_folder(0),
        lambda: copy(artifact, tmp_path / "copy"),
    ]
    for work in refused:
        with pytest.raises(DamagedPart, match="is a link"):
            work()
    with suppress(DamagedPart):
        prune(artifact, 0, lambda name: True)
    for repair in (False, True):
        damages = verify(store, repair=repair)
    assert any("is a link" in damage.problem for damage in damages) or which == "data"
    for grace in (None, {("scores", "0" * 20)}):
        garbage.remove(garbage.plan(store, grace, grace=-1.0))
    for verb in ("ls", "gc"):
        told = run(verb, "--store", store)
        assert which != "kind" or "is a link" in told
    assert state(outside) == before


def test_the_store_itself_may_be_a_link(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path / "real")
    (tmp_path / "store").symlink_to(tmp_path / "real")
    assert verify(tmp_path / "store") == []
    assert open_artifact(tmp_path / "store", "scores", artifact.key).part_folder(0).is_dir()
    with claim(open_artifact(tmp_path / "store", "scores", artifact.key), 0) as ours:
        assert ours


@pytest.mark.parametrize("how", ["link", "hard link"])
def test_a_claim_that_is_another_file_is_left_alone(tmp_path: Path, outside: Path, how: str) -> None:
    artifact = other(tmp_path / "store", "rollouts", {})
    path, secret = artifact.folder / paths.claim_name(0), outside / "secret"
    os.link(secret, path) if how == "hard link" else path.symlink_to(secret)
    if how == "link":
        with pytest.raises(DamagedPart, match="is a link"), claim(artifact, 0):
            pass
    else:  # a copy made of hard links (cp -al) is still to be worked on
        with claim(artifact, 0) as ours:
            assert ours
    assert (secret.read_text(), stat.S_IMODE(secret.stat().st_mode)) == ("secret", 0o600)


def test_an_identity_names_no_input_outside_the_store(tmp_path: Path) -> None:
    """Keys that are read from identities are keys, and nothing else."""
    other(tmp_path, "checkpoints", {"rollouts": "../../etc"})
    for key in ("../outside", "..", "/etc", "0" * 20 + "/../x", ""):
        with pytest.raises(MissingArtifact):
            open_artifact(tmp_path, "rollouts", key)


@pytest.mark.parametrize("name", [".runs", ".fetched", "rollouts"])
def test_gc_removes_nothing_behind_a_folder_that_is_a_link(tmp_path: Path, outside: Path, name: str) -> None:
    store = tmp_path / "store"
    other(store, "scores", {})
    (store / name).symlink_to(outside)
    before = state(outside)
    garbage.remove(garbage.plan(store, {("scores", "0" * 20)}, grace=-1.0))
    assert state(outside) == before
    assert [damage.kind for damage in verify(store) if damage.beyond_repair] == [name]


# -- plan and status ----------------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path) -> Run:
    save_file({"weight": torch.zeros(10)}, tmp_path / "model.safetensors")
    result = make_run(tmp_path)
    commit(result, result.plan.job("rollout", 0), responses=8, tokens=80)
    note_job(result, result.plan.job("rollout", 0), 2.0)
    result.paths.metrics.write_text("{}\n")
    with claim(result.artifact(result.plan.job("score", 0).output), 0):
        pass
    return result


def show(planned: Run) -> None:
    Console(file=io.StringIO()).print(plan_table(forecast([planned])))


def show_status(planned: Run) -> None:
    Console(file=io.StringIO()).print(status_view(take_status([planned])))


@pytest.mark.parametrize("by", IN_ITS_PLACE)
@pytest.mark.parametrize("name", ["*.json", "*.claim", "jobs.jsonl", "metrics.jsonl", "part-abc.claim", "rollouts"])
def test_plan_and_status_end_well_or_name_it(planned: Run, tmp_path: Path, name: str, by: str) -> None:
    result = [tmp_path / "store" / name] if name == "rollouts" else sorted(tmp_path.rglob(name))
    if name == "part-abc.claim":
        result = [planned.artifact(planned.plan.job("rollout", 0).output).folder / name]
    for path in result:
        hostile.replace(path, by)
    ends_well_or_names_it(lambda: show(planned))
    ends_well_or_names_it(lambda: show_status(planned))


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", ["seconds", "made", "outcome", "message", "parts", "time", "key", "stage", "round"])
def test_plan_takes_any_line_of_a_log(planned: Run, name: str, value: Any) -> None:
    cost = {"stage": "rollout", "round": 0, "key": "0" * 20, "time": 1.0, "seconds": 1.0, "made": 1}
    failure = {**cost, "outcome": "failed", "message": "x", "parts": [0]}
    del failure["made"]
    lines = [json.dumps({**line, name: value}) for line in (cost, failure)]
    planned.paths.jobs.write_text("\n".join([*lines, DEEP.decode()]) + "\n")
    ends_well_or_names_it(lambda: show(planned))
    ends_well_or_names_it(lambda: show_status(planned))


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", ["round", "step", "tokens", "tokens_per_s", "loss"])
def test_status_takes_any_line_of_metrics(planned: Run, name: str, value: Any) -> None:
    step = {"round": 0, "step": 0, "tokens": 4.0, "tokens_per_s": 2.0, "loss": 0.5, name: value}
    planned.paths.metrics.write_text(json.dumps(step) + "\n")
    with claim(planned.artifact(planned.plan.job("train", 0).output), 0):
        ends_well_or_names_it(lambda: show_status(planned))


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_a_note_of_any_content_is_taken_or_named(planned: Run, value: Any) -> None:
    """Pruning and `eopd store gc` read the notes of other runs: in the store, and beside the runs."""
    note(planned)
    (path,) = (planned.store / paths.RUNS).iterdir()
    content = json.loads(path.read_text())
    for place in places({**content, "artifacts": content["artifacts"][:1], "wanted": content["wanted"][:1]}):
        for target in (path, planned.paths.references):
            target.write_text(json.dumps(put(content, place, value)))
            ends_well_or_names_it(lambda: list(notes_of_others(planned.store)))
            ends_well_or_names_it(lambda: references(planned.store, planned.paths.folder.parent))
            ends_well_or_names_it(lambda: verify(planned.store))
            target.write_text(json.dumps(content))


# -- anything else -------------------------------------------------------------------------------------------------


def mutate(store: Path, data: st.DataObject) -> None:
    """One change by somebody who knows the format."""
    path = data.draw(st.sampled_from(files_of(store)), label="file")
    how = data.draw(st.sampled_from(["replace", "bytes", "values", "bytes, sealed", "values, sealed"]), label="how")
    data_folder = next((above for above in path.parents if paths.data_part(above.name)), None)
    if how == "replace":
        hostile.replace(path, data.draw(st.sampled_from(sorted(IN_ITS_PLACE))))
        return
    content = path.read_bytes()
    if how.startswith("bytes"):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        new = data.draw(st.binary(max_size=12))
        content = content[:at] + new + content[at + data.draw(st.integers(0, 12)) :]
    else:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return
        value = put(value, data.draw(st.sampled_from(places(value))), data.draw(st.sampled_from(HOSTILE)))
        content = json.dumps(value).encode()
        if how.endswith("sealed") and isinstance(value, dict) and paths.is_of_a_commit(path.name):
            hostile.reseal(path, value)
            return
        if how.endswith("sealed") and isinstance(value, dict) and path.name == paths.IDENTITY:
            hostile.rekey(path.parent, value)
            return
    if how.endswith("sealed") and data_folder is not None:
        hostile.reseal_file(path, content)
    else:
        path.write_bytes(content)


@settings(
    max_examples=int(os.environ.get("EOPD_FUZZ_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_change_of_a_store_is_taken_or_named(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    store = copy_of(pristine, tmp_path)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(store, data)
    for command in every_command(store, tmp_path):
        ends_well_or_names_it(command)
