"""A config whose objective reads what its scores would not hold is refused before anything is sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eopd.pipeline.config import ConfigError
from eopd.pipeline.needs import refuse_unmet_needs
from eopd.pipeline.runner import Runner
from tests.pipeline.plan_case import make_runner


def runner_with(folder: Path, objective: dict[str, Any], vocab: int = 1000, **changes: Any) -> Runner:
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab}))
    return make_runner(folder, train={"objective": objective}, **changes)


def test_the_message_names_the_objective_and_the_command(tmp_path: Path) -> None:
    runner = runner_with(tmp_path, {"name": "tropd"})
    with pytest.raises(ConfigError, match=r"name=tropd .*heads of 64 entries; it keeps 16") as refused:
        refuse_unmet_needs(runner, 0)
    assert "eopd run CONFIG --set score.head.k_max=64" in str(refused.value)
    with pytest.raises(ConfigError, match="heads of 64"):
        runner.run(runner.plan.job("rollout", 0))
    assert not runner.store.exists()
    head = {"k_max": 64, "full_head_above": -1.0}
    refuse_unmet_needs(runner_with(tmp_path, {"name": "tropd"}, score={"head": head}), 0)


def test_what_is_covered_passes(tmp_path: Path) -> None:
    for name in ("eopd", "opd", "fkl", "sft", "jsd"):
        refuse_unmet_needs(runner_with(tmp_path, {"name": name}), 2)
    whole = {"k_max": 32, "full_head_above": -1.0}
    refuse_unmet_needs(runner_with(tmp_path, {"name": "tropd"}, vocab=32, score={"head": whole}), 0)


def test_rollouts_that_cut_their_distribution_are_refused_before_they_are_sampled(tmp_path: Path) -> None:
    sampled = {"top_p": 0.95, "prompts_per_round": 10, "samples_per_prompt": 2, "rows_per_part": 4}
    runner = runner_with(tmp_path, {"name": "eopd"}, rollout=sampled)
    with pytest.raises(ConfigError, match=r"Sample with rollout\.top_p=1"):
        runner.run(runner.plan.job("rollout", 0))
    assert not runner.store.exists()
    refuse_unmet_needs(runner_with(tmp_path, {"name": "fkl"}, rollout=sampled), 0)


def test_the_students_own_ids_must_be_stored(tmp_path: Path) -> None:
    objective = {"name": "rkl_topk", "student_topk": 8}
    with pytest.raises(ConfigError, match=r"--set rollout\.student_topk=8"):
        refuse_unmet_needs(runner_with(tmp_path, objective), 0)
    sampled = {"student_topk": 8, "prompts_per_round": 10, "samples_per_prompt": 2, "rows_per_part": 4}
    refuse_unmet_needs(runner_with(tmp_path, objective, rollout=sampled), 0)
