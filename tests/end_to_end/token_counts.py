"""A made-up stage, as another package brings it: how many tokens training reads of every response."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from eopd.stages.experiment import Experiment
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.stage import Input, Job, JobContext, Measured, PlanView, Size, Stage, read_size
from eopd.storage import stopping
from eopd.storage.claims import claimed_parts
from eopd.storage.records import read_rollouts
from eopd.storage.sources import passes_on

HOLD = "TOKEN_COUNTS_HOLD"
"""Names a file; while it exists, only part 0 can be made."""


class TokenCounts(Stage):
    """Count the tokens that training reads of every response."""

    name = kind = command = "token_counts"

    def plan(self, plan: PlanView, round_: int) -> Job | None:
        rollouts = plan.output("rollout", round_)
        if rollouts is None:
            return None
        settings = {"epochs": plan.experiment.settings.train.epochs}
        output = self.identity(parts=rollouts.parts, settings=settings, inputs={"rollouts": rollouts.key})
        return Job(self, round_, output, {"rollouts": Input(rollouts, by_part=True)})

    def gpus(self, settings: ExperimentSettings) -> int:
        return 0

    def forecast(self, job: Job, experiment: Experiment, inputs: Mapping[str, Size], measured: Measured) -> Size:
        return read_size(inputs["rollouts"], 1.0, measured)

    def run(self, context: JobContext) -> None:
        rollouts, output = context.inputs["rollouts"], context.output
        for part in claimed_parts(output, context.parts, context.progress.line):
            while part and Path(os.environ[HOLD]).exists():
                stopping.check()
                time.sleep(0.05)
            if passes_on(rollouts, part, output, part):
                continue
            responses = read_rollouts(rollouts.part_folder(part), ["response_token_ids"]).to_pydict()
            counts = [context.settings.train.epochs * len(ids) for ids in responses["response_token_ids"]]
            info = {"responses": len(counts), "tokens": sum(counts)}
            inputs = {"rollouts": rollouts.marker(part).checksum}
            with output.write_part(part, inputs=inputs, info=info) as folder:
                (folder / "counts.json").write_text(json.dumps(counts))
