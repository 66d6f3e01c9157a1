"""What warm workers save: the quickstart's models, small rounds, in a process a task and in workers that stay up.

    python -m benchmarks.warm                       # 6 rounds of 256 rollouts, one optimiser step each
    python -m benchmarks.warm --rounds 2 --rollouts 64 --modes processes,warm

Artifacts of all modes are compared. CPU seconds (user and system, children included) mean something on a busy machine;
wall seconds only on an idle one. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

MODES = {
    "processes": ["launcher.kind=local", "launcher.warm=false"],
    "warm": ["launcher.kind=local", "launcher.workers=1"],
    "warm-2": ["launcher.kind=local", "launcher.workers=2"],
    "inline-cold": ["launcher.kind=inline", "launcher.warm=false"],
    "inline": ["launcher.kind=inline"],
}


def run(mode: str, folder: Path, changes: list[str]) -> dict[str, float]:
    """Seconds of one run, wall and CPU."""
    settings = [*changes, *MODES[mode], f"store={folder}/store", f"runs={folder}/runs"]
    command = [sys.executable, "-m", "eopd.pipeline.cli", "run", "quickstart"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *(f"--set={one}" for one in settings)], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.perf_counter() - began, 1), "cpu_s": round(cpu, 1)}


def checksums(store: Path) -> dict[str, str]:
    markers = [path for path in store.rglob("part-*.json") if "progress" not in path.parts]
    return {str(path.relative_to(store)): json.loads(path.read_text())["checksum"] for path in markers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rollouts", type=int, default=256, help="responses a round, trained on in one step")
    parser.add_argument("--modes", default="processes,warm,warm-2", help=f"of {', '.join(MODES)}")
    given = parser.parse_args()
    changes = [
        f"rounds={given.rounds}",
        f"rollout.prompts_per_round={given.rollouts}",
        "rollout.samples_per_prompt=1",
        "train.epochs=1",
        f"train.batch_responses={given.rollouts}",
        "train.optimizer={lr: 2.0e-4}",
        "evaluate.samples=2",
    ]
    modes = given.modes.split(",")
    result: dict[str, Any] = {}
    stores = []
    with tempfile.TemporaryDirectory() as folder:
        for number, mode in enumerate(modes):
            result[mode] = run(mode, Path(folder) / str(number), changes)
            stores.append(checksums(Path(folder) / str(number) / "store"))
            print(mode, result[mode], flush=True)
    same = all(store == stores[0] for store in stores)
    document = {"benchmark": "warm", "rounds": given.rounds, "rollouts": given.rollouts, "modes": result}
    print(json.dumps({**document, "parts": len(stores[0]), "artifacts_identical": same, "machine": machine()}))


if __name__ == "__main__":
    main()
