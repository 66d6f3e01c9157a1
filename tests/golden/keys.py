"""Artifact keys of the committed configs and of the study, over made-up models and prompts."""

from __future__ import annotations

from pathlib import Path

from eopd.pipeline.config import RunSettings, load_config, parse_settings
from eopd.pipeline.plan import make_plan
from eopd.stages.experiment import BenchmarkFacts, Experiment, Facts, ModelFacts
from examples.study.design import Task
from examples.study.experiments import EXPERIMENTS

CONFIGS = ("quickstart", "gsm8k-demo", "gsm8k-pair", "paper/qwen3-0.6b", "paper/qwen3-1.7b", "paper/qwen3-4b")
FOLDER = Path("model")
TUNED_RATE = 1e-4  # stands for rates that the study chooses from its results


def made_up_facts(settings: RunSettings) -> Facts:
    """Facts of inputs that need not exist; both models have two stop ids."""

    def model(role: str, stop_ids: tuple[int, ...]) -> ModelFacts:
        return ModelFacts(FOLDER, FOLDER, f"{role} weights", f"{role} tokenizer", stop_ids)

    benchmarks = settings.evaluate.benchmarks if settings.evaluate else ()
    return Facts(
        student=model("student", (2, 7)),
        teacher=model("teacher", (5, 7)),
        prompt_count=10_000,
        prompts_fingerprint="prompts",
        benchmarks=tuple(BenchmarkFacts(one.name, 500, f"benchmark {one.name}") for one in benchmarks),
    )


def keys_of(settings: RunSettings) -> dict[str, str]:
    """Keys of the first two rounds and of the last, by job."""
    plan = make_plan(Experiment(settings, made_up_facts(settings)))
    rounds = {0, 1, settings.rounds - 1, settings.rounds}
    return {job.name: job.output.key for job in plan.jobs if job.round in rounds}


def golden_keys() -> dict[str, dict[str, str]]:
    keys = {name: keys_of(load_config(name)) for name in CONFIGS}
    for experiment in EXPERIMENTS.values():
        for setting in experiment.settings:
            if ":" in setting.objective["name"]:
                continue  # an objective in a file of its own is keyed by the file's path and content
            rate = setting.lr if isinstance(setting.lr, float) else TUNED_RATE
            task = Task(experiment, setting, seed=0, lr=rate)
            keys[f"study/{experiment.name}/{setting.name}"] = keys_of(parse_settings(task.config(FOLDER), task.name))
    return keys
