"""A whole small run on models of one's own: random tiny Qwen3 and Llama over a tokenizer trained here."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from examples.gsm8k.make import save_pair, train_tokenizer

PROBLEMS = 24


@dataclass(frozen=True)
class World:
    """Models, prompts and a config in one folder; ``store`` and ``runs`` are named by each test."""

    folder: Path

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        settings = {
            "name": name,
            "rounds": 2,
            "store": str(self.folder / name / "store"),
            "runs": str(self.folder / name / "runs"),
            "student": {"path": str(self.folder / "student")},
            "teacher": {"path": str(self.folder / "teacher")},
            "prompts": {
                "path": str(self.folder / "problems.jsonl"),
                "columns": {"id": "id", "prompt": "problem", "answer": "answer"},
                "template": "plain",
                "suffix": "\n",
            },
            "rollout": {
                "prompts_per_round": 12,
                "samples_per_prompt": 2,
                "max_new_tokens": 12,
                "rows_per_part": 4,
                "engine": "transformers",
            },
            "score": {
                "teacher_prompt": {"kind": "template", "arguments": {"enable_thinking": False}},
                "engine": "transformers",
            },
            "train": {
                "batch_responses": 6,
                "epochs": 2,
                "optimizer": {"lr": 1e-3, "warmup_steps": 2},
                "checkpoint_every_steps": 2,
                "device": "cpu",
            },
            "evaluate": {
                "benchmarks": [
                    {"name": "own", "path": str(self.folder / "problems.jsonl"), "limit": 6, "verifier": "exact"}
                ],
                "samples": 2,
                "max_new_tokens": 8,
                "rows_per_part": 3,
                "template": "plain",
                "engine": "transformers",
                "resamples": 100,
            },
            "launcher": {"kind": "inline"},
        }
        for key, value in changes.items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value  # type: ignore[dict-item]
        return settings

    def config(self, name: str, **changes: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings(name, **changes)))
        return path

    def store(self, name: str) -> Path:
        return self.folder / name / "store"

    def runs(self, name: str) -> Path:
        return self.folder / name / "runs" / name


PRELOADED = [
    "accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "torch.utils.tensorboard",
    "eopd.pipeline.cli.main",
    "eopd.pipeline.worker",
    "eopd.stages.evaluate.run",
    "eopd.stages.report.run",
    "eopd.stages.rollout.run",
    "eopd.stages.score.run",
    "eopd.stages.train.run",
]
"""What takes a command its first four seconds."""


def eopd(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(Path(folder), *arguments)
        process.join()
        assert process.exitcode is not None
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    result = subprocess.CompletedProcess(command(*arguments), process.exitcode, stdout, stderr)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def start(folder: Path, *arguments: object) -> ForkServerProcess:
    """Start the command in a process that is forked from one that has imported what commands import.

    ``folder`` gets what it prints, as files ``stdout`` and ``stderr``.
    """
    files = folder / "stdout", folder / "stderr"
    for file in files:
        file.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=([*map(str, arguments)], environment(), files, os.getcwd()))
    with mock.patch.dict(os.environ, environment()):  # for the server, when this is its first process
        process.start()
    return process


def _run(arguments: list[str], variables: dict[str, str], files: tuple[Path, Path], folder: str) -> None:
    """The command itself: ``arguments`` in ``folder``, its output to ``files``."""
    for descriptor, path in enumerate(files, 1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["eopd", *arguments]
    from eopd.pipeline.cli.main import main

    main()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "eopd.pipeline.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def checksums(store: Path) -> dict[str, str]:
    """Content of every committed part of a store: "kind/key/part" -> checksum of its file listing."""
    result = {}
    for marker in sorted(store.rglob("part-*.json")):
        if "progress" not in marker.parts:
            result[str(marker.relative_to(store))] = json.loads(marker.read_text())["checksum"]
    return result


def commit_times(store: Path) -> dict[str, int]:
    return {str(marker.relative_to(store)): marker.stat().st_mtime_ns for marker in store.rglob("part-*.json")}


def make_world(folder: Path) -> World:
    """Models and problems in ``folder``."""
    texts = [
        f"Ann has {i} apples and buys {j}. How many has she? She has {i} + {j} = {i + j}."
        for i in range(40)
        for j in range(40)
    ]
    save_pair(train_tokenizer(texts, 400), folder, seed=0)
    rows = [
        {"id": f"p{i}", "problem": f"Ann has {i} apples and buys {i + 1}. How many has she?", "answer": str(2 * i + 1)}
        for i in range(PROBLEMS)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(folder)
