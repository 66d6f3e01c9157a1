"""How fast a plan is made and a part is committed.

    python -m benchmarks.plan                          # 200 rounds x 1,000 parts on disk, half of them done
    python -m benchmarks.plan --rounds 20 --parts 100

``plan_seconds``: from settings in memory to the printed table, facts and imports aside: keys, prompt drawing, listing
of every folder, a sample of markers, forecast, rendering. ``command_seconds`` is `eopd plan` as a person starts it.
Markers, data folders and claims on disk are real ones, as a run leaves them. ``jobs_per_second``: one worker claims
and commits parts that hold one empty file, synced to disk as any part is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import describe
from eopd.pipeline.config import RunSettings, load_config
from eopd.pipeline.forecast import forecast
from eopd.pipeline.inputs import gather_facts
from eopd.pipeline.run import Run, open_run
from eopd.pipeline.status import make_console, plan_table
from eopd.stages.experiment import Facts
from eopd.stages.stage import Job
from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.identity import Identity
from eopd.storage.markers import Marker, file_text, marker_text

REPEATS = 5
COUNTDOWN = Path(__file__).resolve().parent.parent / "examples" / "countdown"


def write_config(folder: Path, rounds: int, parts: int, rows: int) -> Path:
    """A run of the Countdown pair over prompts enough for an epoch of ten rounds."""
    prompts = folder / "prompts.jsonl"
    count = 10 * parts * rows
    with prompts.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f'{{"id": "{number}", "prompt": "1,2,3=6:", "answer": "6"}}\n')
    config: dict[str, Any] = {
        "name": "planned",
        "store": str(folder / "store"),
        "runs": str(folder / "runs"),
        "rounds": rounds,
        "student": {"path": str(COUNTDOWN / "student")},
        "teacher": {"path": str(COUNTDOWN / "teacher")},
        "prompts": {"path": str(prompts)},
        "rollout": {"prompts_per_round": parts * rows, "rows_per_part": rows, "max_new_tokens": 64},
        "evaluate": {"benchmarks": [{"name": "b", "path": str(COUNTDOWN / "evaluate.jsonl")}]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def fill(run: Run, jobs: list[Job]) -> int:
    """Leave in the store what finished jobs leave, but for the data in the parts' folders. Returns its markers."""
    made = 0
    run.paths.folder.mkdir(parents=True, exist_ok=True)
    with run.paths.jobs.open("w", encoding="utf-8") as lines:
        for job in jobs:
            artifact = run.artifact(job.output)
            artifact.folder.mkdir(parents=True)
            (artifact.folder / paths.IDENTITY).write_text(file_text(artifact.identity.to_json()))
            for part in range(artifact.parts):
                _leave_part(artifact, part)
            (artifact.folder / paths.MANIFEST).write_text(
                file_text({**artifact.identity.to_json(), "key": artifact.key})
            )
            made += artifact.parts
            line = {
                "stage": job.stage.name,
                "round": job.round,
                "key": artifact.key,
                "seconds": 9.5,
                "made": artifact.parts,
            }
            lines.write(json.dumps(line) + "\n")
    return made


def _leave_part(artifact: Artifact, part: int) -> None:
    nonce = f"{part:016x}"
    (artifact.folder / paths.data_name(part, nonce)).mkdir()
    (artifact.folder / paths.claim_name(part)).touch()
    files = {"data": {"size": 4096, "sha256": "0" * 64}}
    marker = Marker(part, nonce, files, {}, {"responses": 8, "tokens": 400})
    (artifact.folder / paths.marker_name(part)).write_text(marker_text(marker, artifact.kind, artifact.key))


def plan_once(settings: RunSettings, facts: Facts | None = None) -> str:
    """What `eopd plan` does between reading the settings and printing; with ``facts`` given, none are gathered."""
    run = open_run(settings, facts)
    console = make_console(120)
    with console.capture() as captured:
        console.print(plan_table(forecast([run])))
    return captured.get()


def measure_plan(folder: Path, rounds: int, parts: int, rows: int) -> dict[str, Any]:
    config = write_config(folder, rounds, parts, rows)
    settings = load_config(str(config))
    facts = gather_facts(settings)
    run = open_run(settings, facts)
    half = [job for job in run.plan.jobs if job.round < rounds // 2]
    markers = fill(run, half)
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        text = plan_once(settings, facts)
        took.append(time.perf_counter() - began)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "eopd.pipeline.cli", "plan", str(config)], check=True, stdout=subprocess.DEVNULL
    )
    command = time.perf_counter() - began
    tracemalloc.start()
    plan_once(settings, facts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "plan_seconds": min(took),
        "plan_seconds_median": sorted(took)[REPEATS // 2],
        "command_seconds": command,
        "plan_peak_mib": peak / 2**20,
        "plan_lines": text.count("\n"),
        "rounds": rounds,
        "parts": parts,
        "prompts_per_part": rows,
        "jobs": len(run.plan.jobs),
        "markers_on_disk": markers,
    }


def measure_commits(folder: Path, count: int) -> dict[str, Any]:
    artifact = Artifact(folder / "store", Identity("rollouts", 1, count, {"benchmark": "plan"}))
    began = time.perf_counter()
    for part in claimed_parts(artifact, range(count)):
        with artifact.write_part(part, info={"responses": 0, "tokens": 0}) as data:
            (data / "empty").touch()
    seconds = time.perf_counter() - began
    assert artifact.is_complete()
    probe = folder / "probe"
    began = time.perf_counter()
    for _ in range(100):
        with probe.open("w") as file:
            file.write("x")
            os.fsync(file.fileno())
    return {
        "jobs_per_second": count / seconds,
        "commits": count,
        "fsyncs_per_second_of_the_disk": 100 / (time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="prompts a part")
    parser.add_argument("--commits", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        figures = measure_plan(folder, arguments.rounds, arguments.parts, arguments.rows)
        figures |= measure_commits(folder, arguments.commits)
    print(json.dumps({"benchmark": "plan", **figures, **describe("rich", "pydantic")}))


if __name__ == "__main__":
    main()
