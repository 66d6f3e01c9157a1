"""A whole small run on models of one's own: random tiny Qwen3 and Llama over a tokenizer trained here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def eopd(*arguments: object, check: bool = True, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command as a person would, in its own process."""
    result = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(threads), check=False)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "eopd.pipeline.cli", *map(str, arguments)]


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def checksums(store: Path) -> dict[str, str]:
    """Content of every committed part of a store: "kind/key/part" -> checksum of its file listing."""
    found = {}
    for marker in sorted(store.rglob("part-*.json")):
        if "progress" not in marker.parts:
            found[str(marker.relative_to(store))] = json.loads(marker.read_text())["checksum"]
    return found


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
