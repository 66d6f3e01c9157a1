"""SIGKILL at random moments, of random workers and of the runner itself: is anything lost, or done twice?

    python -m benchmarks.faults --kills 200

Small whole runs (``tests.end_to_end.world``) are killed again and again; after a kill of the runner the same command
is given again, after a kill of a worker nothing is done at all. Each run that ends is compared with one that nothing
disturbed. Most runs use the transformers engine and processes that are forked from one that has imported everything
(a restart then costs tenths of a second, and kills fall into the work, not into imports); ``--vllm`` kills are made in
runs of the ``eopd`` command with vLLM engines.

    lost_committed          parts whose marker was there at a kill and is not, or has changed, afterwards
    redone_committed        parts whose data were made again although their marker was there (benchmarks.audit)
    runs_that_needed_a_hand runs that did not end well when the same command was given again

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.audit import LOG_VARIABLE, auditing, begun, install
from benchmarks.machine import machine
from benchmarks.preloaded import Forked, fork_eopd, preload
from eopd.storage.paths import DIGESTS
from tests.end_to_end.world import World, command, environment

PATIENCE_SECONDS = 300.0
"""A run that takes longer than this without a kill is stuck."""
ROLLOUT: dict[str, Any] = {"rows_per_part": 2, "max_new_tokens": 24}
FAULTS = {"backoff_seconds": 0.1, "losses": 50}


@dataclass
class Count:
    kills: int = 0
    kills_of_runner: int = 0
    by_stage: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    restarts: int = 0
    lost: int = 0
    different: int = 0
    needed_a_hand: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "kills_of_runner": self.kills_of_runner,
            "kills_of_workers_by_stage": dict(sorted(self.by_stage.items())),
            "runs": self.runs,
            "restarts_of_runner": self.restarts,
            "lost_committed": self.lost,
            "runs_with_other_artifacts": self.different,
            "runs_that_needed_a_hand": self.needed_a_hand,
        }


@dataclass(frozen=True)
class Trial:
    """How the runs of one kind are made."""

    world: World
    engine: str
    preloaded: bool
    kills_per_run: int
    changes: Mapping[str, Any]
    audit: Mapping[str, str]

    def config(self, name: str) -> Path:
        stages = {stage: {"engine": self.engine} for stage in ("rollout", "score")}
        stages["rollout"] |= ROLLOUT
        # forked workers are as good as warm ones, and a process a task is what is killed oftener
        launcher = {"kind": "local", "gpus": [], "warm": not self.preloaded, "faults": FAULTS}
        return self.world.config(name, **{**stages, "launcher": launcher, **self.changes})

    def start(self, config: Path) -> Forked | subprocess.Popen[bytes]:
        log = config.with_suffix(".log")
        variables = {**environment(), **self.audit}
        if self.preloaded:
            return fork_eopd(["run", str(config)], variables, log)
        with log.open("ab") as output:
            return subprocess.Popen(
                command("run", config), env=variables, stdout=output, stderr=output, start_new_session=True
            )

    def undisturbed(self) -> tuple[dict[str, str], float]:
        """Artifacts of a run that nothing disturbs, and its seconds."""
        if not (self.world.folder / DIGESTS).exists():
            self.undisturbed_run("check")
            shutil.copy(self.world.store("check") / DIGESTS, self.world.folder)
        name = f"undisturbed-{self.engine}"
        self.skip_check(name)
        seconds = self.undisturbed_run(name)
        return markers(self.world.store(name), "checksum"), seconds

    def undisturbed_run(self, name: str) -> float:
        config, began = self.config(name), time.monotonic()
        if wait(self.start(config), PATIENCE_SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed: {config.with_suffix('.log')}")
        return time.monotonic() - began

    def skip_check(self, name: str) -> None:
        """Note in a run's store that the weights fit their architecture.

        To compare them takes longer here than all stages, and a kill meanwhile undoes nothing.
        """
        self.world.store(name).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.world.folder / DIGESTS, self.world.store(name))


def wait(process: Forked | subprocess.Popen[bytes], seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while (code := process.poll()) is None and time.monotonic() < until:
        time.sleep(0.005)
    return code


def markers(store: Path, value: str) -> dict[str, str]:
    """``value`` ("nonce" or "checksum") of every part that was committed, pruned since or not.

    Training states go when their checkpoint is there, and are not among them.
    """
    result = {}
    for path in [*store.rglob("part-*.pruned"), *store.rglob("part-*.json")]:
        if "progress" in path.parts:
            continue
        try:
            marker = json.loads(path.read_text())
        except FileNotFoundError:  # pruned just now: the next look finds its tombstone
            continue
        committed = {**marker, **marker["info"].get("pruned", {})}  # a tombstone keeps what the marker said
        result[str(path.relative_to(store).with_suffix(""))] = committed[value]
    return result


def children(process: int) -> dict[int, str]:
    """Living children of a process, and the stage each works on."""
    result = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process:
            result[int(folder.name)] = stage_of(int(folder.name))
    return result


def stage_of(process: int) -> str:
    """What a worker does, by the log that its output goes to."""
    try:
        output = os.readlink(f"/proc/{process}/fd/1")
    except OSError:
        return "gone"
    return output.rpartition("/")[2].split("-")[0] if output.endswith(".log") else "check of weights"


def disturb(trial: Trial, name: str, kills: int, every: float, chance: random.Random, count: Count) -> None:
    """One run, killed about every ``every`` seconds until ``kills`` are spent or it ends."""
    config, store = trial.config(name), trial.world.store(name)
    trial.skip_check(name)
    process, known = trial.start(config), markers(store, "nonce")
    count.runs += 1
    while True:
        code = wait(process, chance.uniform(0.0, 2.0) * every if kills else PATIENCE_SECONDS)
        if code is not None or not kills:
            if code != 0:
                count.needed_a_hand += 1
                print(f"{name}: ended with {code}: {config.with_suffix('.log')}", flush=True)
                kill_tree(process)
            break
        known |= markers(store, "nonce")
        workers = children(process.pid)
        victim = chance.choice([process.pid, *workers, *workers])
        os.kill(victim, signal.SIGKILL)
        kills, count.kills = kills - 1, count.kills + 1
        if victim != process.pid:
            count.by_stage[workers[victim]] += 1
            continue
        count.kills_of_runner += 1
        process.wait()
        count.restarts += 1
        process = trial.start(config)
    listed = markers(store, "nonce")
    count.lost += sum(listed.get(part) != nonce for part, nonce in known.items())


def kill_tree(process: Forked | subprocess.Popen[bytes]) -> None:
    for victim in (*children(process.pid), process.pid):
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def trials(world: World, audit: Mapping[str, str], kills: int, vllm: int) -> Iterator[tuple[Trial, int]]:
    if kills > vllm:
        yield Trial(world, "transformers", True, 12, {"evaluate": {"engine": "transformers"}}, audit), kills - vllm
    if vllm:
        yield Trial(world, "vllm", False, 5, {"rounds": 1, "evaluate": None}, audit), vllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--vllm", type=int, help="how many of them with vLLM (default: a tenth)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it (default: a temporary one)")
    arguments = parser.parse_args()
    vllm = arguments.kills // 10 if arguments.vllm is None else min(arguments.vllm, arguments.kills)
    with tempfile.TemporaryDirectory(prefix="eopd-faults-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(folder, arguments.kills, vllm, arguments.seed)))


def measure(folder: Path, kills: int, vllm: int, seed: int = 0) -> dict[str, Any]:
    """Spend ``kills``, ``vllm`` of them in runs with vLLM; the document."""
    began = time.monotonic()
    make = "from pathlib import Path; import sys; from tests.end_to_end.world import make_world as m"
    subprocess.run(  # in a process of its own: this one must stay fit to be forked, and never computes
        [sys.executable, "-c", f"{make}; m(Path(sys.argv[1]))", folder], env=environment(), check=True
    )
    world, log, chance = World(folder), folder / "audit.log", random.Random(seed)
    audit = auditing(log)
    os.environ[LOG_VARIABLE] = str(log)
    install()
    if kills > vllm:
        preload()
    shown: dict[str, Any] = {}
    for trial, share in trials(world, audit, kills, vllm):
        wanted, seconds = trial.undisturbed()
        count = Count()
        while count.kills < share:
            name = f"{trial.engine}-{count.runs}"
            allowed = min(trial.kills_per_run, share - count.kills)
            disturb(trial, name, allowed, 1.5 * seconds / trial.kills_per_run, chance, count)
            count.different += markers(world.store(name), "checksum") != wanted
            print(f"{name}: {count.kills} of {share} kills, {time.monotonic() - began:.0f} s", flush=True)
        shown[trial.engine] = {**count.to_json(), "undisturbed_seconds": round(seconds, 2)}
    redone = sum(one.committed for one in begun(log))
    totals = {
        name: sum(part[name] for part in shown.values())
        for name in ("kills", "kills_of_runner", "lost_committed", "runs_that_needed_a_hand")
    }
    same = not any(part["runs_with_other_artifacts"] for part in shown.values())
    return {
        "benchmark": "faults",
        **totals,
        "redone_committed": redone,
        "parts_begun": len(begun(log)),
        "artifacts_identical": same,
        "engines": shown,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        **machine(),
    }


if __name__ == "__main__":
    main()
