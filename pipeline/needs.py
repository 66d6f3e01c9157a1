"""Whether what a run plans to sample and store is what its objective reads: said before anything is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.pipeline.config import ConfigError
from eopd.storage.coverage import Coverage

if TYPE_CHECKING:
    from eopd.pipeline.runner import Runner


def refuse_unmet_needs(runner: Runner, round_: int) -> None:
    """Compare the objective's needs with the planned coverage of a round's scores.

    Raises:
        ConfigError: something is not covered, with the objective, what is missing and the command that adds it; or the
            objective reads q_old, and the rollouts cut the distribution that they are drawn from.
    """
    from eopd.stages.train.objectives.registry import make_objective
    from eopd.stages.train.responses import refuse_truncated_sampling

    settings = runner.settings
    objective = make_objective(settings.train.objective)
    try:
        refuse_truncated_sampling(objective, settings.rollout.parameters(()).truncates)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    coverage = _planned(runner, round_)
    missing = [text for need in objective.needs_with(runner.facts.stop_ids) if (text := coverage.lacks(need))]
    if not missing:
        return
    changes = [piece for text in missing for piece in text.partition("Add: ")[2].split()]
    command = " ".join(f"--set {change}" for change in dict.fromkeys(changes))
    raise ConfigError(
        f"train.objective.name={settings.train.objective.name} reads what the scores would not hold: they lack "
        f"{'; '.join(missing)}. `eopd run CONFIG {command}` adds it beside what is there."
    )


def _planned(runner: Runner, round_: int) -> Coverage:
    job = runner.plan.job("score", round_)
    found: dict[str, Any] = dict(job.output.coverage or {})
    return Coverage.from_mapping(
        {
            "head": found["head"],
            "stop_ids": runner.facts.stop_ids,
            "extra_k": runner.settings.rollout.student_topk if found.get("extra") else 0,
            "vocab_size": vocabulary_size(runner.facts.teacher.folder),
        }
    )


def vocabulary_size(model: Path) -> int:
    """Ids of a model by its config; 0 if that does not say."""
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
