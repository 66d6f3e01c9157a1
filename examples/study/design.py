"""What the study compares: experiments, their settings, and the one place where a setting becomes a run's config.

Terms: an *iteration* is 128 responses (two to a prompt), taken in four optimiser steps of 32; a *round* is what is
sampled and scored before training goes on (``refresh`` iterations; 0: everything at once, the whole run offline). Every
run samples, scores and trains on the same number of responses, once each. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eopd.pipeline.config import merge
from eopd.storage.files import canonical_json, sha256_text
from examples.study.stated import BENCHMARK, RUN, objective
from examples.study.worlds import COUNTDOWN, World

HERE = Path(__file__).parent

ITERATION_RESPONSES = 128
PROMPT_RESPONSES = 2
STEP_RESPONSES = 32
SAMPLES = 8
FULL_HEAD = {"k_max": 16, "min_prob": 0.03, "full_head_above": -1.0}
"""The main comparison's cache: the sixteen most probable of every token, so that every objective reads the same one."""


@dataclass(frozen=True)
class Scale:
    """How much every run does. Part of a result's key."""

    iterations: int
    train_problems: int
    problems: int  # evaluated
    tuning_problems: int

    def __post_init__(self) -> None:
        # a round draws each problem at most once, and the settings that sample once have one round
        assert self.train_problems * PROMPT_RESPONSES >= self.responses, self

    @property
    def responses(self) -> int:
        return self.iterations * ITERATION_RESPONSES


FULL = Scale(iterations=256, train_problems=20_000, problems=2_500, tuning_problems=500)
TUNING = Scale(iterations=64, train_problems=20_000, problems=2_500, tuning_problems=500)
TEXT = Scale(iterations=16, train_problems=4_096, problems=300, tuning_problems=0)
"""Of the language models: a sixteenth of the responses, each about eight times as long."""
SMOKE = Scale(iterations=8, train_problems=600, problems=60, tuning_problems=20)
SMOKE_TEXT = Scale(iterations=2, train_problems=128, problems=20, tuning_problems=0)


@dataclass(frozen=True)
class Setting:
    """One way of training the student."""

    name: str
    objective: Mapping[str, Any]
    lr: float | str  # a rate, or the tuned objective whose rate this takes
    refresh: int = 4  # iterations a round; 0: one round
    head: Mapping[str, Any] = field(default_factory=lambda: dict(FULL_HEAD))
    says: str = ""  # for tables

    def rounds(self, scale: Scale) -> int:
        assert not self.refresh or scale.iterations % self.refresh == 0, (self.name, scale)
        return scale.iterations // self.refresh if self.refresh else 1


@dataclass(frozen=True)
class Experiment:
    """A question and the settings that answer it. ``reference`` is what the others are compared with in pairs."""

    name: str
    question: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    reference: str
    scale: Scale = FULL
    world: World = COUNTDOWN
    evaluates: str = "evaluate"  # which problems: evaluate | tuning
    pairs: tuple[tuple[str, str], ...] = ()  # of settings, whose differences are named
    primary: bool = False  # the pairs were named before any result was known
    borrows: tuple[str, ...] = ()  # "experiment/setting" whose results belong into this comparison too

    def setting(self, name: str) -> Setting:
        for setting in self.settings:
            if setting.name == name:
                return setting
        raise KeyError(f"experiment {self.name} has no setting {name!r}: {[s.name for s in self.settings]}")


@dataclass(frozen=True)
class Task:
    """One result to be made."""

    experiment: Experiment
    setting: Setting
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.setting.name}-seed{self.seed}"

    @property
    def scale(self) -> Scale:
        return self.experiment.scale

    @property
    def key(self) -> str:
        """Of everything this file says about the run. A result that carries another key is of other settings."""
        stated: dict[str, Any] = {"scale": asdict(self.scale), "evaluates": self.experiment.evaluates}
        if self.experiment.world != COUNTDOWN:
            stated["world"] = self.experiment.world.name
        return sha256_text(canonical_json({**stated, "config": self.stated()}))[:20]

    def stated(self) -> dict[str, Any]:
        """The run's config without the paths of this machine."""
        setting, world = self.setting, self.experiment.world
        return {
            "seed": self.seed,
            "rounds": setting.rounds(self.scale),
            "rollout": {
                "prompts_per_round": self.scale.responses // setting.rounds(self.scale) // PROMPT_RESPONSES,
                "samples_per_prompt": PROMPT_RESPONSES,
                "max_new_tokens": world.new_tokens,
            },
            "score": {"head": dict(setting.head)},
            "train": {
                "objective": dict(setting.objective),
                "batch_responses": STEP_RESPONSES,
                "optimizer": {
                    "lr": self.lr,
                    "schedule": "cosine",
                    "warmup_steps": 16,
                    "betas": [0.9, 0.98],
                },
            },
            "evaluate": {"samples": world.samples, "temperature": 1.0, "max_new_tokens": world.new_tokens},
        }

    def config(self, work: Path) -> dict[str, Any]:
        """The whole config of a run below ``work``: every keyed setting, where things are, and what makes it fast."""
        said, world = self.stated(), self.experiment.world
        problems, models = world.problems(work, self.scale), world.models(work)
        # tiny models: one thread, wide batches, everything of a round in one part
        options = {"cpu_threads": 1, "max_batch": world.max_batch}
        engine = {"engine": "transformers", "engine_options": options}
        benchmark = {
            **BENCHMARK,
            "name": world.name,
            "path": str(problems / f"{self.experiment.evaluates}.jsonl"),
            "verifier": world.verifier,
        }
        here = {
            "name": self.name.replace("/", "."),
            "store": str(work / f"store-seed{self.seed}"),
            "runs": str(work / "runs"),
            "student": {"path": str(models["student"])},
            "teacher": {"path": str(models["teacher"])},
            "prompts": {
                "path": str(problems / "train.jsonl"),
                "suffix": world.suffix,
                "verifier": world.verifier,
            },
            "rollout": {**engine, "rows_per_part": 4096},
            "score": {**engine, "row_tokens": world.row_tokens, "first_batch_check": False},
            "train": {
                "objective": _with_own_file(objective(said["train"]["objective"])),
                "row_tokens": world.row_tokens,
                "cpu_threads": 1,
                "checkpoint_every_steps": 1_000_000,
            },
            "evaluate": {**engine, "rows_per_part": 4096, "benchmarks": [benchmark], "suffix": world.suffix},
            "launcher": {"kind": "inline"},
        }
        return merge(merge(dict(RUN), said), here)


def _with_own_file(whole: Mapping[str, Any]) -> dict[str, Any]:
    """An objective of the study's own is stated as ``gates.py:name``, whatever the current folder is."""
    name = str(whole["name"])
    return {**whole, "name": str(HERE / name) if ":" in name else name}
