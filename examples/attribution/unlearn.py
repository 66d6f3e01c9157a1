"""Unlearn a bin of documents by NGDiff, and measure what the student can still do.

    python -m examples.attribution.unlearn [--query times] [--out attribution]    # after python -m examples.attribution

The second check of an attribution, beside leaving the bin out: from the trained student, steps go along the difference
of normalised gradients g_R / |g_R| - g_F / |g_F|, of documents to retain and to forget. The top bin of the query set is
forgotten, and for comparison a random other one. Prints accuracy on every benchmark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eopd.pipeline.config import load_config
from eopd.pipeline.run import open_run
from eopd.stages.attribute.documents import Text, bins_of_file, read_documents
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage.paths import WEIGHTS
from examples.attribution.__main__ import ARMS, CONFIG, places, random_bins, result, shown, top_bin
from examples.attribution.data import OPERATORS

STEPS, BATCH, RATE = 40, 32, 1e-4


def gradient(model: PreTrainedModel, texts: list[Text]) -> list[torch.Tensor]:
    """Return the gradient of the mean loss of some texts, of unit length over all parameters."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.tensor([text.ids + [0] * (longest - len(text.ids)) for text in texts])
    labels = torch.tensor([text.labels + [-100] * (longest - len(text.ids)) for text in texts])
    loss = model(input_ids=ids, attention_mask=(torch.arange(longest) < _lengths(texts)).long(), labels=labels).loss
    grads = torch.autograd.grad(loss, [*model.parameters()])
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    return [grad / norm for grad in grads]


def _lengths(texts: list[Text]) -> torch.Tensor:
    return torch.tensor([[len(text.ids)] for text in texts])


def unlearn(model: PreTrainedModel, forget: list[Text], retain: list[Text], seed: int, steps: int = STEPS) -> None:
    """Take NGDiff steps with AdamW."""
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(steps):
        drawn = [[texts[i] for i in random.integers(len(texts), size=BATCH)] for texts in (retain, forget)]
        kept, forgotten = (gradient(model, texts) for texts in drawn)
        for parameter, one, other in zip(model.parameters(), kept, forgotten, strict=True):
            parameter.grad = one - other
        optimizer.step()


def accuracy(out: Path, changes: list[str]) -> dict[str, float]:
    """Return Avg@8 on each benchmark of a student that is not trained further."""
    overrides = [part for change in places(out, changes) for part in ("--set", change)]
    subprocess.run([sys.executable, "-m", "eopd.pipeline.cli", "evaluate", str(CONFIG), *overrides], check=True)
    figures = result(out, changes, "evaluation_summary", evaluations.RESULTS, 0)
    return {name: one["avg_at_k"] for name, one in figures["benchmarks"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--query", choices=list(OPERATORS.values()), default="times")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--out", type=Path, default=Path("attribution"), help="folder of python -m examples.attribution"
    )
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="as there")
    given = parser.parse_args()
    out, changes = given.out.resolve(), given.changes
    torch.set_num_threads(1)
    run = open_run(load_config(str(CONFIG), places(out, changes)))
    asked = run.settings.attribute
    assert asked is not None
    assert asked.documents is not None
    trained = run.artifact(run.plan.job("train", 0).output).part_folder(WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    source = asked.documents.source(run.settings.prompts)
    texts = list(read_documents(source, tokenizer, run.facts.ordered_stop_ids))
    bins = [" ".join(bin_) for bin_ in bins_of_file(asked, run.settings.prompts)]
    top = top_bin(result(out, changes, "attribution_summary", analyses.ATTRIBUTION_RESULTS), given.query)
    forgotten = {"top": [top] * given.seeds, "random": random_bins(sorted(set(bins)), top, given.seeds)}
    before = result(out, changes, "evaluation_summary", evaluations.RESULTS)["benchmarks"]
    after: dict[str, list[dict[str, float]]] = {}
    for arm in ARMS:
        after[arm] = []
        for seed, name in enumerate(forgotten[arm]):
            folder = out / "unlearned" / f"{given.query}-{arm}-{seed}-{given.steps}"
            if not (folder / "done.json").exists():
                model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
                forget = [text for text, bin_ in zip(texts, bins, strict=True) if bin_ == name]
                retain = [text for text, bin_ in zip(texts, bins, strict=True) if bin_ != name]
                unlearn(model, forget, retain, seed, given.steps)
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                (folder / "done.json").write_text(json.dumps({"forgotten": name}), encoding="utf-8")
            after[arm].append(accuracy(out, [*changes, f"student.path={folder}", "attribute=null"]))
    print(f"| forgotten, {given.steps} steps | {' | '.join(before)} |\n|---|{'---|' * len(before)}")
    print(f"| nothing | {' | '.join(format(one['avg_at_k'], '.3f') for one in before.values())} |")
    for arm in ARMS:
        for name, figures in zip(forgotten[arm], after[arm], strict=True):
            print(f"| {arm} bin, `{name}` | {' | '.join(format(value, '.3f') for value in figures.values())} |")
    for name in before:
        differences = [a[name] - b[name] for a, b in zip(after["top"], after["random"], strict=True)]
        print(f"{name}: the top bin forgotten minus a random one, paired by seed: {shown(differences)}")


if __name__ == "__main__":
    main()
