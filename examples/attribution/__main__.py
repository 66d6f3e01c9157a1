"""Attribute what a trained student gets right to its training documents, and check the top bin by leaving it out.

    python -m examples.attribution [--seeds 3] [--query times] [--out attribution]

Resumable: everything is kept in ``--out``. Prints the bins of every query set with a permutation test, then what is
lost on the query set's problems without its top bin, and without a random other bin, over seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from eopd.stages.intervals import t_interval
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from examples.attribution.data import OPERATORS, make

CONFIG = Path(__file__).parent / "countdown.yaml"
ARMS = ("top", "random")


def places(out: Path, changes: list[str]) -> list[str]:
    """Return the settings that say where things lie, and the user's."""
    benchmarks = [
        {"name": name, "path": str(out / f"{name}.jsonl"), "verifier": "countdown"} for name in OPERATORS.values()
    ]
    data = out / "documents.jsonl"
    paths = [f"prompts.path={data}", f"attribute.documents.path={data}"]
    paths.append(f"evaluate.benchmarks={json.dumps(benchmarks)}")
    return [f"store={out / 'store'}", f"runs={out / 'runs'}", *paths, *changes]


def start(out: Path, changes: list[str], sweep: Path | None = None) -> None:
    """Run the config, or a sweep over it."""
    overrides = [part for change in places(out, changes) for part in ("--set", change)]
    more = [] if sweep is None else ["--sweep", str(sweep)]
    subprocess.run([sys.executable, "-m", "eopd.pipeline.cli", "run", str(CONFIG), *more, *overrides], check=True)


def result(out: Path, changes: list[str], stage: str, file: str, round_: int = 1) -> dict[str, Any]:
    """Read the figures of a summary of the trained student, or with round 0 of the first one."""
    run = open_run(load_config(str(CONFIG), places(out, changes)))
    text = (run.artifact(run.plan.job(stage, round_).output).part_folder(0) / file).read_text(encoding="utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


def without(bins: list[str], left_out: str, seed: int) -> dict[str, Any]:
    """Return the settings of a run that is not trained on one bin."""
    kept = [name for name in bins if name != left_out]
    return {"seed": seed, "train": {"select": {"where": {"bin": kept}}}, "attribute": None}


def top_bin(results: dict[str, Any], query: str) -> str:
    """Return the bin with the highest mean score."""
    return " ".join(max(results["queries"][query]["bins"], key=lambda row: row["mean"])["bin"])


def random_bins(bins: list[str], top: str, seeds: int) -> list[str]:
    """Draw one of the other bins for each seed."""
    others = [name for name in bins if name != top]
    return [others[np.random.default_rng(seed).integers(len(others))] for seed in range(seeds)]


def as_changes(settings: dict[str, Any]) -> list[str]:
    """Return the settings of ``without`` as changes of a config."""
    values = {"seed": settings["seed"], "train.select": settings["train"]["select"], "attribute": None}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def shown(values: list[float], form: str = "+.3f") -> str:
    mean, interval = sum(values) / len(values), t_interval(values)
    return f"{mean:{form}}" + ("" if interval is None else f" [{interval.low:{form}}, {interval.high:{form}}]")


def table(results: dict[str, Any]) -> str:
    """Return the z-scores of the bins by query set, as Markdown."""
    queries = results["queries"]
    bins = [" ".join(row["bin"]) for row in next(iter(queries.values()))["bins"]]
    lines = [f"| query set (samples) | {' | '.join(f'`{name}`' for name in bins)} | between bins | p |"]
    lines.append("|---|" + "---|" * (len(bins) + 2))
    for name, query in queries.items():
        cells = [f"{row['z']:+.2f}" for row in query["bins"]]
        test = query["permutation"]
        lines.append(f"| {name} ({query['count']}) | {' | '.join(cells)} | {test['between']:.1%} | {test['p']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--query", choices=list(OPERATORS.values()), default="times", help="query set to check")
    parser.add_argument("--documents", type=int, default=200, help="documents of each bin")
    parser.add_argument("--problems", type=int, help="held-out problems of each benchmark (default: all)")
    parser.add_argument("--out", type=Path, default=Path("attribution"), help="folder for data, store and runs")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="as of eopd run"
    )
    given = parser.parse_args()
    out, changes = given.out.resolve(), given.changes
    out.mkdir(parents=True, exist_ok=True)
    make(out, given.documents, given.problems)
    start(out, changes)
    results = result(out, changes, "attribution_summary", analyses.ATTRIBUTION_RESULTS)
    print(table(results), flush=True)

    bins = sorted(" ".join(row["bin"]) for row in results["queries"][given.query]["bins"])
    top = top_bin(results, given.query)
    drawn = random_bins(bins, top, given.seeds)
    left_out = {(arm, seed): top if arm == "top" else drawn[seed] for arm in ARMS for seed in range(given.seeds)}
    settings = {(arm, seed): without(bins, name, seed) for (arm, seed), name in left_out.items()}
    entries = [{"name": f"{given.query}-{arm}-{seed}", **one} for (arm, seed), one in settings.items()]
    sweep = out / f"{given.query}.yaml"
    sweep.write_text(yaml.safe_dump({"sweep": entries}), encoding="utf-8")
    start(out, changes, sweep)
    print(f"\n| left out | Avg@8 on {given.query} by seed |\n|---|---|")
    right: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        for seed in range(given.seeds):
            figures = result(
                out, [*changes, *as_changes(settings[arm, seed])], "evaluation_summary", evaluations.RESULTS
            )
            right[arm].append(figures["benchmarks"][given.query]["avg_at_k"])
        names = ", ".join(f"`{left_out[arm, seed]}` {right[arm][seed]:.3f}" for seed in range(given.seeds))
        print(f"| {arm} bin | {names} |")
    differences = [a - b for a, b in zip(right["top"], right["random"], strict=True)]
    print(f"\nwithout the top bin minus without a random one, paired by seed: {shown(differences)}", flush=True)


if __name__ == "__main__":
    main()
