"""Training on selected responses, from config to checkpoint: rejection fine-tuning of the Countdown student."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eopd.pipeline.config import load_config
from eopd.stages.verifiers.countdown import verify
from eopd.storage.artifacts import open_artifact
from eopd.storage.paths import TRAINING_FILE, WEIGHTS
from eopd.storage.records import read_rollouts
from eopd.storage.verdict_signal import VERDICTS
from tests.end_to_end.world import eopd, start

COUNTDOWN = Path(__file__).parents[2] / "examples" / "countdown"


def config(folder: Path, name: str, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "name": name,
        "store": str(folder / "store"),
        "runs": str(folder / "runs"),
        "student": {"path": str(COUNTDOWN / "student")},
        "teacher": {"path": str(COUNTDOWN / "teacher")},
        "prompts": {
            "path": str(COUNTDOWN / "train.jsonl"),
            "columns": {"id": "id", "prompt": "problem", "answer": "answer"},
            "verifier": "countdown",
            "template": "plain",
        },
        "rollout": {"prompts_per_round": 24, "samples_per_prompt": 4, "max_new_tokens": 32, "rows_per_part": 2},
        "train": {"objective": {"name": "sft"}, "batch_responses": 8, "device": "cpu", "cpu_threads": 1},
        "launcher": {"kind": "inline"},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value}
    for stage in ("rollout", "score"):
        settings[stage] = {"engine": "transformers", **settings.get(stage, {})}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def artifact_of(folder: Path, run: str, kind: str) -> Any:
    artifacts = json.loads((folder / "runs" / run / "references.json").read_text())["artifacts"]
    (key,) = (key for result, key in artifacts if result == kind)
    return open_artifact(folder / "store", kind, key)


def training(folder: Path, run: str) -> dict[str, Any]:
    text = (artifact_of(folder, run, "checkpoints").part_folder(WEIGHTS) / TRAINING_FILE).read_text()
    summary: dict[str, Any] = json.loads(text)
    return summary


def test_the_documented_command_is_a_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```sh\neopd run (.*?)```", page, re.DOTALL)
    name, *options = shlex.split(text.replace("\\\n", ""))
    settings = load_config(name, [option for option in options if option != "--set"])
    assert settings.train.objective.name == "sft"
    assert settings.reads_verdicts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that trains on right responses."""
    folder = tmp_path_factory.mktemp("finished")
    eopd("run", config(folder, "right", train={"select": {"verdict": "right"}}))
    return folder


def test_rejection_fine_tuning(finished: Path) -> None:
    rollouts, verdicts = (artifact_of(finished, "right", kind) for kind in ("rollouts", "verdicts"))
    right = total = 0
    for part in range(rollouts.parts):
        rows = read_rollouts(rollouts.part_folder(part)).to_pylist()
        correct = VERDICTS.read(verdicts.part_folder(part)).to_pydict()["correct"]
        expected = [
            row["finish_reason"] == "stop" and verify(row["response_text"], row["answer"]).correct for row in rows
        ]
        assert correct == expected
        right, total = right + sum(expected), total + len(rows)
    assert 8 < right < total == 96
    summary = training(finished, "right")
    assert (summary["responses"], summary["steps"]) == (right, -(-right // 8))

    wrong = config(finished, "wrong", train={"select": {"verdict": "wrong"}})
    planned = {job["stage"]: job["state"] for job in json.loads(eopd("plan", wrong, "--json").stdout)["jobs"]}
    assert planned == {"rollout": "shared", "judge": "shared", "score": "shared", "train": "missing"}
    eopd("run", wrong)
    assert training(finished, "wrong")["responses"] == total - right
    assert eopd("store", "verify", "--store", finished / "store").stdout == "0 damaged\n"


def test_a_killed_judge_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    """The other time limit is another key, and the same verdicts of a verifier that has no limit."""
    before = {path.parent for path in (finished / "store").glob("verdicts/*/identity.json")}
    again = config(finished, "killed", train={"select": {"verdict": "right"}}, judge={"seconds_per_answer": 3})
    process = start(tmp_path, "judge", again)
    markers: list[Path] = []
    while process.is_alive() and not markers:
        time.sleep(0.002)
        markers = [
            marker for marker in (finished / "store").glob("verdicts/*/part-*.json") if marker.parent not in before
        ]
    process.kill()
    process.join()
    assert markers
    committed = {marker: marker.stat().st_mtime_ns for marker in markers}
    eopd("judge", again)
    assert {marker: marker.stat().st_mtime_ns for marker in markers} == committed
    theirs, ours = artifact_of(finished, "right", "verdicts"), artifact_of(finished, "killed", "verdicts")
    assert ours.key != theirs.key
    assert ours.is_complete()
    assert [ours.marker(part).checksum for part in range(12)] == [theirs.marker(part).checksum for part in range(12)]
    assert "complete already" in eopd("judge", again).stderr


def test_what_cannot_be_judged_or_selected_is_refused_before_work(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "problem": "2,3,4=9:", "answer": "2,3,4=9" if i else "", "topic": "sums"} for i in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for select, named in (
        ({"verdict": "right"}, "prompt 'p0'"),
        ({"where": {"topik": ["sums"]}}, "the nearest is topic"),
        ({"where": {"topic": ["sum"]}}, 'the nearest value is "sums"'),
    ):
        refused = config(tmp_path, "refused", prompts={"path": str(prompts)}, train={"select": select})
        result = eopd("run", refused, check=False)
        assert result.returncode != 0
        assert named in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "store" / "rollouts").exists()
