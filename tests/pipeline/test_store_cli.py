"""`eopd store` as a person meets it: what it prints, and that its errors say what to do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from eopd.pipeline.cli.inspect import doctor
from eopd.pipeline.cli.store import app
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError, UserError
from eopd.storage.identity import Identity
from eopd.storage.listing import find, keys
from eopd.storage.teacher_cache import TeacherCache
from tests import s3
from tests.raises import raises
from tests.storage.making import capture, scores

doctor_app = typer.Typer()
doctor_app.command()(doctor)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_ls_and_show(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path, parts=3)
    training = Artifact(tmp_path, Identity("progress", 1, 10**9))
    with training.write_part(7) as folder:
        (folder / "state").write_text("x")
    lines = run("ls", "--store", tmp_path).splitlines()
    assert "000000" not in lines[0]
    assert "a training that has not ended" in lines[0]
    assert "3 parts" in lines[1]
    assert lines[1].endswith("complete")
    assert lines[2].startswith("2 artifacts")
    assert run("ls", "scores", "--store", tmp_path).count("\n") == 2
    assert json.loads(run("show", artifact.key[:8], "--store", tmp_path))["parts"] == 3


def test_stats_and_export(tmp_path: Path) -> None:
    artifact, result = scores(tmp_path)
    text = run("stats", artifact.key, "--store", tmp_path, "--plot", tmp_path / "h.svg")
    for words in ("bytes a token by field", "teacher entropy, nats", "mass kept", "tokens gated"):
        assert words in text
    assert "<svg" in (tmp_path / "h.svg").read_text()
    run("export", artifact.key, tmp_path / "table.parquet", "--store", tmp_path)
    assert pq.read_table(tmp_path / "table.parquet").num_rows == 2 * result[0].responses
    assert not list(tmp_path.glob(".table*"))


def test_what_is_imported_with_a_corrected_option_is_another_artifact(tmp_path: Path) -> None:
    capture(path := tmp_path / "capture.parquet", shifted=True)
    store = tmp_path / "store"
    first, again, corrected = (
        run("import", path, "--store", store, "--teacher", teacher, "--tokenizer", "k", "--vocab-size", 60)
        for teacher in ("Qwen3-4B", "Qwen3-4B", "Qwen3-8B")
    )
    assert first == again
    headers = {cache_of(store, said).header(0).teacher for said in (first, corrected)}
    assert headers == {"Qwen3-4B", "Qwen3-8B"}


def cache_of(store: Path, said: str) -> TeacherCache:
    """The scores that an import's line names."""
    artifact = find(store, said.split(":")[0])
    assert isinstance(artifact, Artifact)
    return TeacherCache(artifact)


def test_stats_pass_over_parts_that_were_set_aside(tmp_path: Path) -> None:
    artifact, result = scores(tmp_path, parts=3)
    artifact.drop_part(0)
    artifact.set_aside(0, "no memory")
    assert "responses of 2 parts" in run("stats", artifact.key, "--store", tmp_path)
    one = run("stats", artifact.key, "--store", tmp_path, "--parts", 1)
    assert f"{result[1].responses} responses of 1 parts" in one


def test_verify_and_repair(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    assert run("verify", "--store", tmp_path) == "0 damaged\n"
    shard = artifact.part_folder(1) / "entries" / "c" / "0" / "0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    manifest = artifact.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])
    damaged = run("verify", "--store", tmp_path, code=1)
    assert damaged.startswith(f"scores/{artifact.key} part 1: the bytes of entries/c/0/0 changed")
    run("verify", "--store", tmp_path, "--repair")
    assert artifact.missing() == [1]
    assert run("verify", "--store", tmp_path) == "0 damaged\n"
    manifest.write_text("{")
    assert "manifest.json is not JSON" in run("verify", "--store", tmp_path, code=1)


def test_verify_of_some(tmp_path: Path) -> None:
    artifact, _ = scores(tmp_path)
    with Artifact(tmp_path, Identity("rollouts", 1, 1)).write_part(0) as folder:
        (folder / "data").write_text("x")
    next(artifact.part_folder(1).glob("*.json")).write_bytes(b"")
    assert run("verify", "rollouts", "--store", tmp_path) == "0 damaged\n"
    assert "1 damaged" in run("verify", "rollouts", artifact.key[:9], "--store", tmp_path, code=1)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("obstore", "boto3", "moto")),
    reason="obstore, boto3 or moto[server] is not installed",
)
def test_verify_and_repair_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, _ = scores(tmp_path)
    place, prefix = "s3://team/store", f"store/scores/{artifact.key}/part-00001"
    with s3.server() as endpoint:
        for name, value in s3.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        client = s3.client(endpoint)
        client.create_bucket(Bucket="team")
        with raises(InputError, setting="--store", file="s3://team/store"):
            run("verify", "--store", place)
        run("copy", artifact.key, place, "--store", tmp_path)
        assert run("verify", "--store", place) == "0 damaged\n"
        data = [entry["Key"] for entry in client.list_objects_v2(Bucket="team", Prefix=f"{prefix}.")["Contents"]]
        client.put_object(Bucket="team", Key=next(key for key in data if key.endswith("entries/c/0/0")), Body=b"x")
        damaged = run("verify", "--store", place, code=1)
        assert damaged.startswith(f"scores/{artifact.key} of S3Store")
        assert damaged.endswith("1 damaged\n")
        assert "part 1: entries/c/0/0 has 1 bytes, not" in damaged
        assert "1 damaged, set aside: `eopd store copy` puts them" in run("verify", "--repair", "--store", place)
        assert "1 of 2 parts" in run("ls", "--store", place)
        assert ": 1 parts copied" in run("copy", artifact.key, place, "--store", tmp_path)
        assert run("verify", artifact.key, "--store", place) == "0 damaged\n"


def test_copy_with_all_that_it_was_made_from(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"

    def made(kind: str, inputs: dict[str, str], coverage: dict[str, str] | None = None) -> Artifact:
        artifact = Artifact(here, Identity(kind, 1, 1, {}, inputs, coverage))
        with artifact.write_part(0) as folder:
            (folder / "data").write_text(kind)
        return artifact

    policy = made("checkpoints", {"student": "external"})
    rollouts = made("rollouts", {"policy": policy.key})
    side = made("student_topk", {"rollouts": rollouts.key})
    scored = made("scores", {"rollouts": rollouts.key}, {"extra": side.key})
    made("rollouts", {"policy": "another"})
    run("copy", scored.key, there, "--store", here)
    assert list(keys(there)) == [("scores", scored.key)]
    run("copy", scored.key, there, "--store", here, "--inputs")
    assert {kind for kind, _ in keys(there)} == {"checkpoints", "rollouts", "student_topk", "scores"}
    assert len(list(keys(there))) == 4


IMPORTED = ("--teacher", "t", "--tokenizer", "k", "--vocab-size", "10")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ls", "--store", "{}/nowhere"), "no store"),
        (("gc", "--store", "{}/nowhere"), "no store"),
        (("verify", "--store", "{}/nowhere"), "no store"),
        (("show", "zzz", "--store", "{}"), "no artifact"),
        (("stats", "rollouts/", "--store", "{}"), "no scores"),
        (("export", "scores/", "{}/nowhere/x.parquet", "--store", "{}"), "no folder"),
        (("stats", "scores/", "--plot", "{}/h.png", "--store", "{}"), r"must end in \.svg"),
        (("gc", "--store", "s3://team/store"), "bucket"),
        (("verify", "zzz", "--store", "{}"), "no artifact"),
        (("import", "{}/x", *IMPORTED, "--store", "s3://team/store"), "bucket"),
        (("ls", "--store", "file://team/store"), "team: .* file:///team/store"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    scores(tmp_path)
    (tmp_path / "x").touch()
    with Artifact(tmp_path, Identity("rollouts", 1, 1)).write_part(0) as folder:
        (folder / "data").write_text("x")
    with raises(UserError, words):
        run(*(argument.format(tmp_path) for argument in arguments))


def test_a_folder_by_its_url(tmp_path: Path) -> None:
    scores(tmp_path)
    for place in (f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        assert "1 artifacts" in run("ls", "--store", place)


def test_the_doctor_refuses_a_bucket() -> None:
    result = CliRunner().invoke(doctor_app, ["--store", "s3://team/store"])
    assert isinstance(result.exception, ValueError)
    assert "s3://team/store is a bucket" in str(result.exception)
