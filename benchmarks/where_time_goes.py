"""Where the time of a run goes, stage by stage: imports, engines, checks, the work itself, commits.

    python -m benchmarks.where_time_goes quickstart                    # a run in this process, engines kept
    python -m benchmarks.where_time_goes quickstart --cold             # an engine per job, as in a process per job
    python -m benchmarks.where_time_goes quickstart --set rounds=2     # a shorter one

Named functions are wrapped with timers for the length of the run; a span's time is its own, without the spans inside
it. CPU seconds are of the whole process (threads included) and stand on a busy machine too; wall seconds do not.
The store is a temporary one. Prints a Markdown table on stderr and one JSON document, the last line, on stdout.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.machine import machine

IMPORTS = (
    "torch",
    "transformers",
    "vllm.entrypoints.llm",
    "eopd.stages.train.run",
    "eopd.stages.score.run",
    "matplotlib.pyplot",
)

SPANS = {
    "eopd.stages.engines.vllm_process:VLLMProcess.__init__": "engine: load",
    "eopd.stages.engines.vllm_process:VLLMProcess.close": "engine: close",
    "eopd.stages.engines.probe:replace_weights": "engine: weights in place, probe",
    "eopd.stages.engines.sampling_vllm:VLLMSamplingEngine._run": "sampling",
    "eopd.stages.engines.sampling_transformers:TransformersSamplingEngine.__init__": "engine: load",
    "eopd.stages.engines.sampling_transformers:TransformersSamplingEngine._decode": "sampling",
    "eopd.stages.engines.hidden_vllm:VLLMHiddenEngine._read": "teacher's forward pass",
    "eopd.stages.engines.hidden:final_hidden": "teacher's forward pass",
    "eopd.stages.score.run:check_first_batch": "first-batch check",
    "eopd.stages.score.run:Scorer.survey": "rollouts read",
    "eopd.stages.models.loading:load_tokenizer_at": "tokenizers",
    "eopd.stages.rollout.run:_prepare": "prompts read and rendered",
    "eopd.stages.evaluate.run:_prepare": "prompts read and rendered",
    "eopd.stages.evaluate.run:_write_summary": "summary",
    "eopd.storage.artifacts:fsync_tree": "commits",
    "eopd.storage.artifacts:create_exclusively": "commits",
    "eopd.stages.train.run:_load": "model loaded",
    "eopd.stages.train.run:load_responses": "rollouts read",
    "eopd.stages.train.run:_round_start": "round-start pass",
    "eopd.stages.train.loop:Loop.take": "steps",
}


class Spans:
    """Own time of nested spans, per (stage, span). Spans of other threads are left out: their CPU counts where the main
    thread is."""

    def __init__(self) -> None:
        self.stage = "start"
        self.wall: dict[tuple[str, str], float] = defaultdict(float)
        self.cpu: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self._stack: list[str] = ["other"]
        self._mark = (time.perf_counter(), time.process_time())

    def _settle(self) -> None:
        now = (time.perf_counter(), time.process_time())
        key = (self.stage, self._stack[-1])
        self.wall[key] += now[0] - self._mark[0]
        self.cpu[key] += now[1] - self._mark[1]
        self._mark = now

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        self.calls[self.stage, name] += 1
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    @contextmanager
    def of_stage(self, stage: str) -> Iterator[None]:
        self._settle()
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self._settle()
            self.stage = before

    def rows(self) -> list[dict[str, Any]]:
        self._settle()
        return [
            {
                "stage": stage,
                "span": name,
                "calls": self.calls[stage, name],
                "cpu_s": cpu,
                "wall_s": self.wall[stage, name],
            }
            for (stage, name), cpu in sorted(self.cpu.items(), key=lambda item: (item[0][0], -item[1]))
            if cpu >= 0.005
        ]


def wrap(spans: Spans, target: str, label: str) -> None:
    """Time every call of ``module:attribute`` that the main thread makes."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *above, last = path.split(".")
    for name in above:
        owner = getattr(owner, name)
    timed = getattr(owner, last)

    @functools.wraps(timed)
    def call(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return timed(*arguments, **named)
        with spans.span(label):
            return timed(*arguments, **named)

    setattr(owner, last, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--cold", action="store_true", help="open an engine for every job and close it")
    given = parser.parse_args()
    spans = Spans()
    with spans.of_stage("imports"):
        for name in IMPORTS:
            with spans.span(name):
                importlib.import_module(name)
    for target, label in SPANS.items():
        wrap(spans, target, label)
    with tempfile.TemporaryDirectory() as folder:
        run(spans, given.config, [*given.set, f"store={folder}/store", f"runs={folder}/runs"], keep=not given.cold)
    rows = spans.rows()
    for row in rows:
        figures = f"{row['calls']} | {row['cpu_s']:.2f} | {row['wall_s']:.2f}"
        sys.stderr.write(f"| {row['stage']} | {row['span']} | {figures} |\n")
    document = {"benchmark": "where_time_goes", "config": given.config, "set": given.set, "kept": not given.cold}
    print(json.dumps({**document, "rows": rows, "machine": machine()}))


def run(spans: Spans, config: str, changes: list[str], *, keep: bool) -> None:
    """All jobs in order in this process, and the report."""
    from eopd.pipeline.config import load_config
    from eopd.pipeline.progress import make_display
    from eopd.pipeline.report import write_report
    from eopd.pipeline.run import open_run
    from eopd.pipeline.worker import execute
    from eopd.stages.engines.kept import Engines

    engines = Engines(keep=keep)
    with spans.of_stage("plan"):
        settings = load_config(config, changes)
        opened = open_run(settings, progress=make_display().open())
    for job in opened.plan.jobs:
        with spans.of_stage(job.stage.name):
            execute(opened, job, engines=engines)
    with spans.of_stage("end"), spans.span("engines closed"):
        engines.close()
    with spans.of_stage("report"):
        write_report(opened)


if __name__ == "__main__":
    main()
