"""GSM8K as the examples read it: {id, problem, solution, answer}, one JSON object a line.

    python -m examples.gsm8k.data --out data/gsm8k     # openai/gsm8k from the Hugging Face hub: 8,792 problems, 5 MB

The hub's calculator marks (<<48/2=24>>) are left out of a solution, and so is its last line (#### 24), the answer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SPLITS = ("train", "test")
MARK = re.compile(r"<<[^>]*>>")


def converted(rows: Iterable[Mapping[str, str]], split: str) -> Iterator[dict[str, str]]:
    """Rows of the hub's {question, answer}.

    Raises:
        ValueError: a row without a last line "#### ANSWER", by number.
    """
    for number, row in enumerate(rows):
        solution, marker, answer = row["answer"].rpartition("\n####")
        if not marker:
            raise ValueError(f"{split} row {number}: no line '#### ANSWER' ends its answer")
        yield {
            "id": f"gsm8k-{split}/{number}",
            "problem": row["question"],
            "solution": MARK.sub("", solution),
            "answer": answer.strip().replace(",", ""),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/gsm8k"), help="folder to write to")
    out: Path = parser.parse_args(arguments).out
    from datasets import load_dataset

    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = converted(load_dataset("openai/gsm8k", "main", split=split), split)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / split}.jsonl: {len(lines)} problems")


if __name__ == "__main__":
    main()
