"""The process that computes gradients with bergson: python -m eopd.stages.attribute.trackstar FOLDER

FOLDER is temporary. It holds ``task.json`` (``Task``), ``documents.parquet`` and ``queries.parquet`` with the columns
``input_ids`` and ``labels``. The process writes ``scores.npy`` [documents] and ``result.json``; what else it leaves
there, pickled tensors included, goes with the folder.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TASK, SCORES, RESULT = "task.json", "scores.npy", "result.json"
DOCUMENTS, QUERIES = "documents.parquet", "queries.parquet"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "SLURM_NODEID")
"""Variables by which bergson would take itself for one of several processes."""


@dataclass(frozen=True)
class Task:
    """Inputs and settings of one attribution."""

    model: str
    tokenizer: str
    trust_remote_code: bool
    projection_dim: int
    downweight: int
    statistics: int
    token_batch: int
    seed: int
    cpu_threads: int | None


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the process: offline, temporary files in ``folder``."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    caches = {"HF_DATASETS_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    return {**kept, **OFFLINE, **caches, "TOKENIZERS_PARALLELISM": "false"}


def main(folder: Path) -> None:
    import torch
    from bergson.cli.trackstar import trackstar
    from bergson.config.config import (
        DataConfig,
        DistributedConfig,
        PreprocessConfig,
        QuerySetConfig,
        TrackstarConfig,
        TrackstarIndexConfig,
    )
    from bergson.data import load_scores
    from datasets import Dataset

    task = Task(**json.loads((folder / TASK).read_text(encoding="utf-8")))
    if task.cpu_threads is not None:
        torch.set_num_threads(task.cpu_threads)
    for name in (DOCUMENTS, QUERIES):
        Dataset.from_parquet(str(folder / name), cache_dir=str(folder / "cache")).save_to_disk(str(_data(folder, name)))
    torch.manual_seed(task.seed)  # labels of the preconditioners are drawn from the model
    index = TrackstarIndexConfig(
        run_path=str(folder / "run"),
        model=task.model,
        tokenizer=task.tokenizer,
        model_kwargs="trust_remote_code=true" if task.trust_remote_code else "",
        data=DataConfig(dataset=str(_data(folder, DOCUMENTS))),
        distributed=DistributedConfig(nnode=1, nproc_per_node=1, node_rank=0),
        precision="fp32",
        projection_dim=task.projection_dim,
        projection_seed=task.seed,
        token_batch_size=task.token_batch,
    )
    settings = TrackstarConfig(
        query=QuerySetConfig(dataset=str(_data(folder, QUERIES)), aggregation="mean"),
        preprocess_cfg=PreprocessConfig(unit_normalize=True),
        target_downweight_components=task.downweight,
        stats_sample_size=task.statistics,
    )
    trackstar(index, settings)
    scores = load_scores(folder / "run" / "scores")
    if not scores.is_written():
        raise RuntimeError("bergson left documents without a score")
    info = json.loads((folder / "run" / "query" / "info.json").read_text(encoding="utf-8"))
    np.save(folder / SCORES, np.asarray(scores[:], dtype=np.float32)[:, 0], allow_pickle=False)
    (folder / RESULT).write_text(json.dumps({"modules": len(info["grad_sizes"])}), encoding="utf-8")


def _data(folder: Path, name: str) -> Path:
    return folder / name.removesuffix(".parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
