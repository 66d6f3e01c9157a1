"""Tasks over worker processes, one thread each: models and imports stay in memory from task to task."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from examples.study.design import Task


def _start() -> None:
    import torch

    from eopd.pipeline.launchers.local import ask_to_stop_when_orphaned
    from examples.study.run import commit

    if sys.platform == "linux":
        ask_to_stop_when_orphaned()
    torch.set_num_threads(1)
    commit()


def _do(task: Task, work: Path, folder: Path) -> float:
    """Seconds it took."""
    from examples.study.run import run

    began = time.monotonic()
    run(task, work, folder)
    return time.monotonic() - began


def run_all(tasks: Sequence[Task], work: Path, folder: Path, workers: int, say: Callable[[str], None]) -> list[str]:
    """Make the results of ``tasks``, in their order; returns what failed and why. A failure stops nothing else."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers, which are started anew
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    failed: list[str] = []
    left = {seed: sum(task.seed == seed for task in tasks) for seed in {task.seed for task in tasks}}
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
        futures: dict[Future[float], Task] = {pool.submit(_do, task, work, folder): task for task in tasks}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                task = futures[future]
                error = future.exception()
                elapsed = time.monotonic() - began
                if error is None:
                    remaining = elapsed / number * (len(tasks) - number)
                    say(
                        f"[{number}/{len(tasks)}] {task.name}: {future.result():.0f} s; "
                        f"{elapsed / 60:.1f} min so far, about {remaining / 60:.0f} min left"
                    )
                else:
                    failed.append(f"{task.name}: {type(error).__name__}: {error}")
                    say(f"[{number}/{len(tasks)}] {failed[-1]}")
                left[task.seed] -= 1
                if not left[task.seed]:
                    shutil.rmtree(work / f"store-seed{task.seed}", ignore_errors=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed
