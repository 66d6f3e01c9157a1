"""Which objective, for a real language model? One scoring a seed, every objective trained on it, each measured alike.

    python -m examples.smollm2 && python -m examples.smollm2.question [--out smollm2] [--seeds 3]

The student is the one that phase 1 healed, or one that has collapsed (`collapse.yaml`). Every run reads the same
rollouts and scores, so all see the same tokens, in the same order, at the same rate. Measured on held-out questions:
the model's own samples (diversity, KL to the teacher by its entropy), the teacher's answers (NLL), and a choice of
four short answers. Resumable: a model a line in ``--out``/question.jsonl, which is committed as results/question.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from eopd.stages.evaluate.summary import distinct, self_bleu
from eopd.stages.intervals import t_interval
from examples.smollm2.__main__ import eopd
from examples.smollm2.measure import EDGES, Text, chosen, generate, load, log_probs, prompt_ids, texts
from examples.smollm2.questions import choices, questions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "question.jsonl"
EOPD = {"name": "eopd", "tau": 0.8, "alpha": 1.0, "support": "renormalised", "k": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "opd": {"name": "opd"},
    "eopd": EOPD,
    "mix": {**EOPD, "tau": -1.0},
    "random gate": {**EOPD, "name": f"{HERE.parent / 'study' / 'gates.py'}:random_gate"},
    "opd, rkl: topk": {"name": "opd", "rkl": "topk", "k": 16},
    "fkl": {"name": "fkl", "support": "bucket", "k": 16},
    "jsd": {"name": "jsd", "k": 16},
    "no teacher": {"name": f"{HERE / 'no_teacher.py'}:fixed_advantage", "options": {"advantage": -1.0}},
}
"""Learner: its loss. `mix` is `eopd` with an open gate, `random gate` opens for as many tokens as `eopd`'s."""
COLLAPSED = ("opd", "eopd", "mix", "random gate")
"""Objectives that the collapsed student is trained with."""
TASK: Mapping[str, Sequence[str]] = choices()
"""The verifiable task, on which the teacher is clearly above the student (``--task``)."""
SAMPLES, LENGTH, QUESTIONS, TEXTS = 4, 64, 20, 24
FIGURES = (
    "entropy",
    "self_bleu",
    "distinct_2",
    "rkl",
    "rkl_sure",
    "rkl_unsure",
    "fkl",
    "fkl_sure",
    "fkl_unsure",
    "nll",
    "choices",
)
BINS = tuple(f"fkl_bin_{number}" for number in range(len(EDGES) + 1))


class Measures:
    """What every model is measured on: held-out questions and the teacher's answers to some of them."""

    def __init__(self, teacher: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, self.teacher = AutoTokenizer.from_pretrained(teacher), load(teacher)
        held_out = questions(900, 48)[1]
        self.prompts = [prompt_ids(self.tokenizer, question) for question in held_out[:QUESTIONS]]
        self.texts: list[Text] = texts(self.tokenizer, self.teacher, held_out[:TEXTS], LENGTH)

    def of(self, folder: Path, seed: int) -> dict[str, float]:
        """Figures of a model: divergences and entropies in nats a token, the rest shares in [0, 1].

        Everything is computed in float32 but the texts, which are written in bfloat16.
        """
        model, writer = load(folder), load(folder).to(torch.bfloat16)
        rows = generate(writer, [ids for ids in self.prompts for _ in range(SAMPLES)], LENGTH, 1.0, seed)
        groups = [rows[start : start + SAMPLES] for start in range(0, len(rows), SAMPLES)]
        arrays = [[torch.tensor(row, dtype=torch.int32).numpy() for row in group] for group in groups]
        result = {
            "self_bleu": _mean(self_bleu(group) for group in arrays),
            "distinct_2": _mean(distinct(group, 2) for group in arrays),
            "tokens": float(sum(map(len, rows))),
        }
        sampled = [(ids, row) for ids, group in zip(self.prompts, groups, strict=True) for row in group[:2] if row]
        result |= self._divergences(model, sampled)
        nll = torch.cat(
            [-log_probs(model, ids, row).gather(1, torch.tensor(row)[:, None])[:, 0] for ids, row in self.texts]
        )
        result["nll"] = float(nll.mean())
        result["choices"] = _mean(map(float, chosen(self.tokenizer, model, TASK)))
        return result

    def _divergences(self, model: Any, sampled: Sequence[Text]) -> dict[str, float]:
        """Means over the tokens that the model sampled; unsure: where the teacher's entropy exceeds 0.8 nats."""
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("fkl", "rkl", "entropy", "teacher")}
        for ids, row in sampled:
            p, q = log_probs(self.teacher, ids, row), log_probs(model, ids, row)
            columns["fkl"].append((p.exp() * (p - q)).sum(1))
            columns["rkl"].append((q.exp() * (q - p)).sum(1))
            columns["entropy"].append(-(q.exp() * q).sum(1))
            columns["teacher"].append(-(p.exp() * p).sum(1))
        values = {name: torch.cat(parts) for name, parts in columns.items()}
        unsure = values["teacher"] > 0.8
        result = {"entropy": float(values["entropy"].mean()), "unsure": float(unsure.float().mean())}
        bins = torch.bucketize(values["teacher"], torch.tensor(EDGES))
        for name in ("fkl", "rkl"):
            result[name] = float(values[name].mean())
            result[f"{name}_sure"] = float(values[name][~unsure].mean())
            result[f"{name}_unsure"] = float(values[name][unsure].mean())
            for number in range(len(EDGES) + 1):
                result[f"{name}_bin_{number}"] = float(values[name][bins == number].mean())
        return result


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def overrides(**places: object) -> list[str]:
    return [part for name, value in places.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]


def collapse(out: Path) -> Path:
    """The collapsed student's folder; made if it is not there."""
    folder = out / "collapsed"
    if not folder.exists():
        places = {"teacher__path": out / "teacher", "student__path": out / "offline", "runs": out / "runs"}
        places |= {"prompts__path": out / "questions.jsonl", "store": out / "store"}
        eopd("run", HERE / "collapse.yaml", *overrides(**places))
        eopd("student", "smollm2-collapse", "--runs", out / "runs", "--to", folder)
    return folder


def train(start: str, seed: int, names: Sequence[str], out: Path, changes: Sequence[str] = ()) -> dict[str, Path]:
    """Train the student in ``out/start`` by every objective of ``names``; returns the models' folders."""
    folder = out / "question" / f"{start}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"name": str(number), "train": {"objective": OBJECTIVES[name]}} for number, name in enumerate(names)]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"sweep": entries}), encoding="utf-8")
    places = overrides(
        seed=seed,
        teacher__path=out / "teacher",
        student__path=out / start,
        prompts__path=out / "questions.jsonl",
        store=folder / "store",
        runs=folder / "runs",
    )
    places += [part for change in changes for part in ("--set", change)]
    eopd("run", HERE / "question.yaml", "--sweep", folder / "sweep.yaml", *places)
    models = {}
    for number, name in enumerate(names):
        models[name] = folder / str(number)
        if not models[name].exists():
            eopd("student", f"question-{number}", "--runs", folder / "runs", "--to", models[name])
    return models


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(out: Path, seeds: int, starts: Sequence[str], changes: Sequence[str] = ()) -> None:
    """Train and measure what ``out/question.jsonl`` does not have yet."""
    path, measures = out / "question.jsonl", None
    for start in starts:
        for seed in range(seeds):
            names = list(OBJECTIVES) if start == "offline" else list(COLLAPSED)
            there = {row["objective"] for row in rows_of(path) if (row["start"], row["seed"]) == (start, seed)}
            missing = [name for name in names if name not in there]
            if not missing and "untrained" in there:
                continue
            measures = measures or Measures(out / "teacher")
            folders = {"untrained": out / start, **(train(start, seed, names, out, changes) if missing else {})}
            for name, folder in folders.items():
                if name not in there:
                    began = time.monotonic()
                    row = {"start": start, "seed": seed, "objective": name, **measures.of(folder, seed)}
                    with path.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps({key: _short(value) for key, value in row.items()}) + "\n")
                    print(f"{start}, seed {seed}, {name}: measured in {time.monotonic() - began:.0f} s", flush=True)
            shutil.rmtree(out / "question" / f"{start}-{seed}", ignore_errors=True)  # gigabytes


def _short(value: Any) -> Any:
    """Five decimals of a float, None for NaN (a bin without tokens)."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, 5)


def table(rows: Sequence[Mapping[str, Any]], start: str, against: str, figures: Sequence[str]) -> str:
    """Markdown: means over seeds, and below each the paired difference to ``against`` with its 95 % interval."""
    values = {(row["objective"], row["seed"]): row for row in rows if row["start"] == start}
    names = list(dict.fromkeys(name for name, _ in values))
    seeds = sorted({seed for _, seed in values})
    lines = [f"| {start} | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for name in names:
        cells = []
        for figure in figures:
            own = [values[name, seed][figure] for seed in seeds if (name, seed) in values]
            others = [values[against, seed][figure] for seed in seeds]
            if None in (*own, *others):  # a bin without tokens
                cells.append("·")
                continue
            cell = f"{_mean(own):.3f}"
            if name != against:
                gaps = [mine - other for mine, other in zip(own, others, strict=True)]
                interval = t_interval(gaps)
                if interval is not None:
                    cell += f" ({_mean(gaps):+.3f} [{interval.low:+.3f}, {interval.high:+.3f}])"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_task(out: Path) -> None:
    """Print how many of the choices the models get right that no objective has trained, by form of question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "teacher")
    for name in ("teacher", "student", "offline"):
        right = chosen(tokenizer, load(out / name), TASK)
        forms = [question.split(" of ")[0] for question in TASK]
        shares = {
            form: f"{sum(r for r, f in zip(right, forms, strict=True) if f == form)}/{forms.count(form)}"
            for form in dict.fromkeys(forms)
        }
        print(f"{name}: {sum(right)}/{len(right)}", shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="folder of `python -m examples.smollm2`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the tables of the committed results alone")
    parser.add_argument("--task", action="store_true", help="measure teacher and students on the choices alone")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="as of eopd run"
    )
    given = parser.parse_args()
    out: Path = given.out.resolve()
    if given.task:
        print_task(out)
        return
    if not given.table:
        if not (out / "offline" / "model.safetensors").exists():
            raise SystemExit(f"{out} has no student yet: python -m examples.smollm2 --out {given.out}")
        run(out, given.seeds, ("offline",), given.changes)
        collapse(out)
        run(out, given.seeds, ("collapsed",), given.changes)
    rows = rows_of(RESULTS if given.table else out / "question.jsonl")
    for start in dict.fromkeys(row["start"] for row in rows):
        for figures in ((*FIGURES[:3], *FIGURES[9:]), FIGURES[3:9], BINS):
            print(table(rows, start, "opd", figures), "\n")


if __name__ == "__main__":
    main()
