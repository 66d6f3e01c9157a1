"""`eopd push` to a local server that speaks the Hub's API: what is sent, what the cards say, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from typer.testing import CliRunner

from eopd.pipeline.cards import student_card
from eopd.pipeline.cli.push import app
from eopd.pipeline.cli.store import app as store_app
from eopd.pipeline.errors import RunError
from eopd.pipeline.export import Student, find_student
from eopd.pipeline.push import artifacts_of, write_student
from eopd.pipeline.retention import note
from eopd.pipeline.run import Run
from eopd.stages.models.model_config import stop_ids_in
from eopd.storage import listing
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, StoreError, StoreUnwritable
from eopd.storage.hub import upload
from eopd.storage.identity import Identity
from eopd.storage.notes import Note, write_note
from eopd.storage.paths import WEIGHTS
from eopd.storage.places import open_place
from eopd.storage.records import RESULTS
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.verification import verify
from tests import hub as stand_in
from tests.pipeline.plan_case import commit, make_run, make_settings, run_of
from tests.pipeline.test_several_teachers import TEACHERS, facts_of
from tests.raises import raises
from tests.storage.making import capture, other, scores
from tests.storage.test_teacher_cache import assert_identical
from tests.test_train_from_cache import make_store

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[stand_in.Hub]:
    with stand_in.server() as hub:
        yield hub


@pytest.fixture
def hub(server: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> stand_in.Hub:
    server.repositories.clear()
    stand_in.use(server, monkeypatch)
    return server


def push(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent_to(hub: stand_in.Hub, repository: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.files(repository).items() if path != ".gitattributes"}


def test_a_cache_that_is_pushed_is_read_by_its_card(
    tmp_path: Path, hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    artifact = make_store(store)
    assert push(f"scores/{artifact.key[:6]}", "user/cache", "--store", store).strip().endswith("/datasets/user/cache")
    sent = sent_to(hub, "datasets/user/cache")
    push(f"scores/{artifact.key}", "user/cache", "--store", store, "--to", tmp_path / "folder")
    assert contents(tmp_path / "folder") == sent
    here = contents(store)
    assert {path: here[path] for path in sent if path in here} == {p: c for p, c in sent.items() if p != "README.md"}
    assert verify(tmp_path / "folder") == []

    there = open_place("hf://datasets/user/cache")
    cache, local = TeacherCache(listing.find(there, "scores/")), TeacherCache(artifact)
    assert all(assert_identical(cache.read_part(part), local.read_part(part)) is None for part in range(2))

    monkeypatch.chdir(tmp_path)
    recipe, tables = SNIPPET.findall(sent["README.md"].decode())
    read: dict[str, Any] = {}
    exec(recipe, read)
    assert_identical(read["rows"], local.read([(0, 2)]))
    assert read["table"]["prompt_token_ids"][2].as_py() == [2, 1]
    assert 'load_dataset("user/cache", "rollouts")' in tables

    push(f"scores/{artifact.key}", "user/cache", "--store", store, "--license", "mit")
    again = sent_to(hub, "datasets/user/cache")
    assert {path for path in again if sent.get(path) != again[path]} == {"README.md"}


def test_what_the_card_of_a_dataset_says(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact = make_store(tmp_path / "store")
    config = tmp_path / "runs" / "mine" / "config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump({"teacher": {"path": "/models/large"}, "prompts": {"path": "p/math.jsonl"}}))
    write_note(tmp_path / "store", Note(config, tmp_path / "store", (), {("scores", artifact.key)}, set()))
    push(f"scores/{artifact.key}", "user/cache", "--store", tmp_path / "store", "--to", tmp_path / "folder")
    text = (tmp_path / "folder" / "README.md").read_text()
    card = DatasetCard(text)
    assert card.data.license == "unknown"
    assert card.data.configs == [
        {
            "config_name": "rollouts",
            "data_files": f"rollouts/{artifact.identity.inputs['rollouts']}/part-*/rollouts.parquet",
        }
    ]
    table = load_dataset(str(tmp_path / "folder"), "rollouts", split="train", cache_dir=str(tmp_path / "cached"))
    assert table["prompt_token_ids"] == [[2, 1]] * 8
    assert stand_in.card_errors(text) == []
    for words in (
        "`large`",
        "math.jsonl",
        "k_max: 8",
        "8 responses (48 tokens)",
        "| temperature | 1 |",
        "tokens with entropy > 0.8",
    ):
        assert words in text
    assert str(tmp_path) not in text


def test_a_dry_run_shows_the_card_and_sends_nothing(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact = make_store(tmp_path)
    shown = push(f"scores/{artifact.key}", "user/cache", "--store", tmp_path, "--no-rollouts", "--dry-run")
    assert hub.repositories == {}
    assert shown.startswith("---\nlicense: unknown\n")
    assert "viewer: false" in shown
    assert "read_rollouts" not in shown
    assert f"\nscores/{artifact.key}/identity.json\n" in shown
    assert "\nrollouts/" not in shown


def test_rollouts_alone_and_a_private_dataset(tmp_path: Path, hub: stand_in.Hub) -> None:
    key = make_store(tmp_path).identity.inputs["rollouts"]
    push(f"rollouts/{key}", "user/responses", "--store", tmp_path, "--private")
    assert hub.repositories["datasets/user/responses"].private
    assert [kind for kind, _ in listing.keys(open_place("hf://datasets/user/responses"))] == ["rollouts"]
    assert "8 rows" in hub.files("datasets/user/responses")["README.md"].decode()


def test_a_dataset_is_exported_for_other_trainers(tmp_path: Path, hub: stand_in.Hub) -> None:
    push(f"scores/{make_store(tmp_path).key}", "user/cache", "--store", tmp_path)
    files = [tmp_path / "here.parquet", tmp_path / "there.parquet"]
    for file, store in zip(files, (tmp_path, "hf://datasets/user/cache"), strict=True):
        arguments = ["export", "scores/", str(file), "--format", "axolotl", "--store", str(store)]
        assert CliRunner().invoke(store_app, arguments, catch_exceptions=False).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_not_pushed(tmp_path: Path, hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    artifact = make_store(store)
    with raises(RunError, "checkpoints/.*push student"):
        artifacts_of(store, f"checkpoints/{other(store, 'checkpoints', {}).key}")
    begun = Artifact(store, Identity("verdicts", 1, 2))
    with begun.write_part(0) as folder:
        (folder / "x").touch()
    with pytest.raises(RunError, match="1 of its 2 parts"):
        artifacts_of(store, f"verdicts/{begun.key}")
    lonely = other(store, "student_topk", {"rollouts": "0" * 20})
    with raises(RunError, remedy="--no-rollouts"):
        artifacts_of(store, f"student_topk/{lonely.key}")
    with pytest.raises(StoreError, match="names no artifact"):
        push("scores/ffff", "user/cache", "--store", store)
    with pytest.raises(StoreError, match="is no name of a repository"):
        push(f"scores/{artifact.key}", "cache", "--store", store)
    with raises(RunError, setting="--license"):
        push(f"scores/{artifact.key}", "user/cache", "--store", store, "--license", "my own")
    with pytest.raises(StoreUnwritable, match=r"refuses user/other: .*license is not valid"):
        push(f"scores/{artifact.key}", "user/other", "--store", store, "--license", "apache-9")
    with raises(RunError, setting="--to"):
        push(f"scores/{artifact.key}", "user/cache", "--store", store, "--to", store)
    push(f"scores/{artifact.key}", "user/cache", "--store", store)
    with pytest.raises(RunError, match=r"user/cache holds scores/.*another dataset"):
        push(f"rollouts/{artifact.identity.inputs['rollouts']}", "user/cache", "--store", store)
    shard = artifact.part_folder(1) / "tokens" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with raises(DamagedPart, file="tokens/c/0/0"):
        push(f"scores/{artifact.key}", "user/cache", "--store", store)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreUnwritable, match=r"needs a token.*hf auth login"):
        push(f"scores/{artifact.key}", "user/cache", "--store", store)


def test_the_commands_by_environment(tmp_path: Path, hub: stand_in.Hub) -> None:
    """What a person types, with the server named by HF_ENDPOINT, and without one."""
    key = make_store(tmp_path).key

    def eopd(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, **stand_in.environment(hub), **changes}
        command = [sys.executable, "-m", "eopd.pipeline.cli", *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    pushed = eopd("push", f"scores/{key}", "user/cache", "--store", str(tmp_path))
    assert pushed.stdout == f"{hub.endpoint}/datasets/user/cache\n", pushed.stderr
    listed = eopd("store", "ls", "--store", "hf://datasets/user/cache")
    assert listed.stdout.count("complete") == 2, listed.stderr
    lost = eopd("store", "verify", "--store", "hf://datasets/user/cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert lost.returncode == 1
    assert re.fullmatch(r"eopd: http://127.0.0.1:9 does not answer for [^\n]+\n", lost.stderr)


def test_scores_of_a_capture(tmp_path: Path, hub: stand_in.Hub) -> None:
    capture(tmp_path / "c.parquet", shifted=True)
    command = ["import", str(tmp_path / "c.parquet"), "--store", str(tmp_path / "store"), "--vocab-size", "60"]
    taken = CliRunner().invoke(
        store_app, [*command, "--teacher", "Large", "--tokenizer", "Its"], catch_exceptions=False
    )
    assert taken.exit_code == 0
    shown = push("scores/", "user/cache", "--store", tmp_path / "store", "--dry-run")
    for words in (
        "| teacher | `Large` |",
        "| estimated, as the capture lacks them | entropies,",
        "| scored by | import of c.parquet",
    ):
        assert words in shown


def test_the_recipe_reads_a_response_that_has_tokens(tmp_path: Path, hub: stand_in.Hub) -> None:
    scores(tmp_path, lengths=[0, 5])
    assert "read([(0, 1)])" in push("scores/", "user/cache", "--store", tmp_path, "--dry-run")


def test_parts_that_were_set_aside(tmp_path: Path, hub: stand_in.Hub) -> None:
    artifact = make_store(tmp_path)
    empty = Artifact(tmp_path, Identity("verdicts", 1, 1))
    empty.set_aside(0, "x")
    with pytest.raises(RunError, match=r"every part .* was set aside"):
        artifacts_of(tmp_path, f"verdicts/{empty.key}")
    short = Artifact(tmp_path, Identity("scores", 1, 2, {}, artifact.identity.inputs, {"head": "other"}))
    with short.write_part(0) as folder:
        shutil.copytree(artifact.part_folder(0), folder, dirs_exist_ok=True)
    short.set_aside(1, "NaN logits")
    push(f"scores/{short.key}", "user/cache", "--store", tmp_path)
    there = listing.find(open_place("hf://datasets/user/cache"), "scores/")
    assert there.reasons_aside() == {1: "NaN logits"}
    assert TeacherCache(there).token_counts(0).sum() == 24
    (damage,) = verify(open_place("hf://datasets/user/cache"))
    assert "part 1 was set aside" in damage.problem


# -- students ----------------------------------------------------------------------------------------------------------


def evaluated(run: Run, round_: int, value: float) -> None:
    job = run.plan.job("evaluation_summary", round_)
    interval = [value - 0.1, value + 0.1]
    result = {
        "avg_at_k": value, "avg_interval": interval, "samples": 8, "problems": 11,
        "pass_at_k": {"1": value, "8": value + 0.2}, "pass_interval": {"1": interval, "8": interval},
    }  # fmt: skip
    with run.artifact(job.output).write_part(0) as folder:
        (folder / RESULTS).write_text(json.dumps({"benchmarks": {"b": result}}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "m").mkdir()
    run = make_run(tmp_path, rounds=2, prompts={"path": "/secret/place/p.jsonl", "suffix": "\nThink/answer."})
    artifact = commit(run, run.plan.job("train", 0))
    artifact.drop_part(WEIGHTS)
    with artifact.write_part(WEIGHTS) as folder:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("{}")
    note(run)
    return run


def test_a_student_is_pushed_with_what_was_measured(tmp_path: Path, run: Run, hub: stand_in.Hub) -> None:
    evaluated(run, 0, 0.25)
    evaluated(run, 1, 0.5)
    write_student(run, find_student(run, 1), tmp_path / "folder", "user/model", "apache-2.0")
    upload(tmp_path / "folder", "user/model", "model", private=False, message="x")
    sent = sent_to(hub, "models/user/model")
    assert sent == contents(tmp_path / "folder")
    assert set(sent) == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert stop_ids_in(tmp_path / "folder") == [2, 5]
    text = sent["README.md"].decode()
    card = ModelCard(text)
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures == {"Avg@8": 0.5, "Pass@8": 0.7}
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("apache-2.0", "transformers", None)
    for words in (
        "0.500 [0.400, 0.600] | 0.250",
        "1 of 2",
        f"round 0  scores/{run.plan.job('score', 0).output.key}",
        "| p.jsonl, 25 rows |",
    ):
        assert words in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert settings["prompts"] == {**run.settings.prompts.model_dump(mode="json"), "path": "p.jsonl"}
    assert "store" not in settings
    assert str(tmp_path) not in text
    assert "/secret" not in text


def test_the_teachers_of_a_student_are_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    several = run_of(
        make_settings(**{**TEACHERS, "store": str(tmp_path / "store"), "runs": str(tmp_path)}),
        facts_of(folder=tmp_path),
    )
    itself = make_run(tmp_path, teacher={"path": None, "student": "initial"})
    for one, words in ((several, "| teacher code | c, `t-code` |"), (itself, "| teacher | the student itself")):
        assert words in student_card(one, Student(0, 3, tmp_path, ()), "user/model", "unknown")


def test_a_student_without_evaluations(tmp_path: Path, run: Run) -> None:
    write_student(run, find_student(run, 1), tmp_path / "folder", "user/model", "unknown")
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "not evaluated" in text
    assert stand_in.card_errors(text) == []
    with raises(RunError, setting="--to"):
        write_student(run, find_student(run, 1), tmp_path / "folder", "user/model", "unknown")
