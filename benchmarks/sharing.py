"""What sharing saves: N experiments over one scoring, in one store, against N that each do everything themselves.

    python -m benchmarks.sharing                               # five objectives over the Countdown study, vLLM
    python -m benchmarks.sharing --engine transformers --prompts 64 --n 3     # a try

Both sides run `eopd run` of `examples/countdown`: shared is one sweep in one store; separate is the same runs one after
the other, each in a store of its own. The work of a stage is what its jobs noted in jobs.jsonl; start-ups of the
commands are part of the totals, so each side is started as often: the shared side runs its runs one by one, too.
`shared_over_expected`: the shared total over the separate total less N - 1 scorings. `shared_over_all_common` takes off
N - 1 rollouts and first evaluations too, which are shared as well; it may exceed 1 by the imports that a common job
paid for and that a later job of its process then pays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import describe
from eopd.pipeline.config import load_sweep

STUDY = Path(__file__).resolve().parent.parent / "examples" / "countdown"
COMMON = ("rollout 0", "score 0", "evaluate 0")


def run(config: Path) -> float:
    """Wall seconds of `eopd run`."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "eopd.pipeline.cli", "run", str(config)],
        check=True,
        stderr=subprocess.DEVNULL,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    return time.perf_counter() - began


def stages(folder: Path) -> dict[str, float]:
    """Seconds of every job of a run, by stage and round."""
    result: dict[str, float] = defaultdict(float)
    for line in (folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        result[f"{job['stage']} {job['round']}"] += job["seconds"]
    return dict(result)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    changes = [f"{stage}.engine={given.engine}" for stage in ("rollout", "score", "evaluate")]
    changes.append(f"rollout.prompts_per_round={given.prompts}")
    experiments = load_sweep(str(STUDY / "study.yaml"), str(STUDY / "objectives.yaml"), changes)[: given.n]
    sides: dict[str, dict[str, Any]] = {}
    for side in ("shared", "separate"):
        walls, parts = {}, {}
        for settings in experiments:
            raw = settings.model_dump(mode="json")
            raw["runs"] = str(folder / side / "runs")
            raw["store"] = str(folder / side / ("store" if side == "shared" else f"store-{settings.name}"))
            raw["evaluate"]["benchmarks"][0]["limit"] = given.problems
            path = folder / f"{side}-{settings.name}.yaml"
            path.write_text(yaml.safe_dump(raw), encoding="utf-8")
            walls[settings.name] = run(path)
            parts[settings.name] = stages(folder / side / "runs" / settings.name)
        sides[side] = {"seconds": sum(walls.values()), "runs": walls, "stages": parts}
    return sides


def figures(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    separate = sides["separate"]
    names = list(separate["stages"])
    saved = {
        name: sum(result[name] for result in separate["stages"].values()) * (len(names) - 1) / len(names)
        for name in COMMON
    }
    again = [job for result in list(sides["shared"]["stages"].values())[1:] for job in result if job in COMMON]
    assert not again, f"made twice in one store: {again}"
    shared = sides["shared"]["seconds"]
    return {
        "n": len(names),
        "shared_seconds": shared,
        "separate_seconds": separate["seconds"],
        "common_seconds": saved,
        "shared_over_expected": shared / (separate["seconds"] - saved["score 0"]),
        "shared_over_all_common": shared / (separate["seconds"] - sum(saved.values())),
        "shared_over_separate": shared / separate["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5, help="experiments, at most five")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--problems", type=int, default=250, help="problems of the evaluation")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sides = measure(Path(name), given)
    settings = {"prompts": given.prompts, "problems": given.problems, "engine": given.engine}
    print(json.dumps({"benchmark": "sharing", **figures(sides), "sides": sides, "settings": settings, **describe()}))


if __name__ == "__main__":
    main()
