"""The routing example at small size, through a worker's entry."""

from __future__ import annotations

import json
from pathlib import Path

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from eopd.pipeline.worker import execute
from eopd.storage import records as analyses

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routing" / "countdown.yaml"


def test_the_example_routes_a_few_problems(tmp_path: Path) -> None:
    settings = load_config(str(EXAMPLE), [f"store={tmp_path / 'store'}", f"runs={tmp_path / 'runs'}"])
    assert settings.evaluate is not None
    assert settings.evaluate.route is not None
    small = settings.evaluate.model_copy(
        update={
            "benchmarks": tuple(one.model_copy(update={"limit": 12}) for one in settings.evaluate.benchmarks),
            "route": settings.evaluate.route.model_copy(update={"calibration": 5}),
        }
    )
    run = open_run(settings.model_copy(update={"evaluate": small}))
    for command in ("evaluate", "route"):
        for job in run.plan.of_command(command, 0):
            assert execute(run, job)
    output = run.artifact(run.plan.job("route", 0).output)
    results = json.loads((output.part_folder(0) / analyses.ROUTING_RESULTS).read_text())
    assert (results["problems"], results["calibration"]) == (7, 5)
    assert results["policies"].keys() == {"standard", "again", "comma", "random", "oracle", "router"}
    assert {job.output.kind for job in run.plan.of_command("route", 0)} == {"entropies", "routings"}
