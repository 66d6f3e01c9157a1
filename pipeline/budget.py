"""`max_store_bytes`: a run that would outgrow its store is refused before any work, with what would make it fit.

`eopd run` asks once, and so does a stage's command that a person or a batch system gives; the workers of `eopd run` do
not ask again, and nobody asks between parts. Nothing is measured on the disk: what is there is the sum of the sizes in
the markers of other artifacts, a small file a part. What is to come is the forecast that `eopd plan` shows, with scores
at the size that they cannot exceed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from eopd.pipeline.config import ConfigError
from eopd.pipeline.estimate import Keep
from eopd.pipeline.overview import Overview, look
from eopd.pipeline.plan import Stage
from eopd.pipeline.runner import Runner, states_of
from eopd.stages.format import size
from eopd.storage import listing

LIKELY_SHARE = 0.1
"""Of a bound on tokens."""
SOON_FREED = 100_000_000
"""A disk that lacks less than this is soon cleared, and pauses the run until then."""
RESPONSE_BYTES = 1024
"""What a response takes before it has a token: the request, its sample, its row."""
ASKED_BY: dict[Stage, str] = {
    "rollout": "rollout.samples_per_prompt, rollout.prompts_per_round, rollout.max_new_tokens or rounds",
    "score": "rollout.samples_per_prompt, rollout.max_new_tokens, score.head.k_max or rounds",
    "train": "train.keep_checkpoints, train.keep_optimizer_states or rounds",
    "evaluate": "evaluate.samples, evaluate.max_new_tokens or the benchmarks' limit",
    "align": "evaluate.alignment.samples",
}

SPAREST = Keep(weights=1, optimizer=1)


def refuse_too_large(runners: Sequence[Runner]) -> None:
    """Compare what the store would hold at the worst moment of the runs, together, with the limit, if one is set.

    Raises:
        ConfigError: it is more; says how much, of what, and what would help.
    """
    limits = [runner.settings.max_store_bytes for runner in runners if runner.settings.max_store_bytes is not None]
    if not limits:
        return
    overview = look(runners)
    others = _others(runners)
    need = others + overview.peak_bound
    if need <= min(limits):
        return
    runs = "this run's worst moment" if len(runners) == 1 else f"the worst moment of these {len(runners)} runs"
    raise ConfigError(
        f"max_store_bytes is {size(min(limits))}, and {overview.store} would hold about {size(need)} at {runs}: "
        f"{size(overview.peak_bound)} of {'its' if len(runners) == 1 else 'their'} own, {size(others)} of other "
        f"artifacts. {_what_would_help(runners, overview)} Nothing was started."
    )


def refuse_what_the_machine_lacks(runners: Sequence[Runner]) -> None:
    """Compare what `eopd plan` forecasts with the free disk, and one engine call with the free memory.

    Tokens that nothing like was sampled of yet are forecast as bounds, of which often a tenth is used: so much is
    asked for. A disk that fills up all the same pauses the run.

    Raises:
        ConfigError: there is far too little; names the settings that ask for so much.
    """
    overview = look(runners)
    bounds = sum(row.bytes - row.present for row in overview.rows if row.at_most and row.stage != "train")
    need = overview.peak_bytes - overview.present_bytes - round((1 - LIKELY_SHARE) * bounds)
    if need > max(overview.free_bytes, SOON_FREED):
        missing = max(overview.rows, key=lambda row: row.bytes - row.present)
        raise ConfigError(
            f"{size(overview.free_bytes)} are free at {overview.store}, and {size(need)} and more would be needed, "
            f"most of it for `{missing.stage}`: lower {ASKED_BY[missing.stage]}, free space, or choose another "
            "store. `eopd plan` shows what takes how much. Nothing was started."
        )
    available = _available_memory()
    if available is None:
        return
    for runner in runners:
        if runner.settings.launcher.kind not in ("inline", "local"):  # other machines have other memory
            continue
        for settings, responses in _responses_of_a_part(runner):
            if responses * RESPONSE_BYTES > available:
                raise ConfigError(
                    f"{settings}: a part of {responses:,} responses is sampled at once and takes "
                    f"{size(responses * RESPONSE_BYTES)} of memory and more, of which {size(available)} are available; "
                    "lower one of them. Nothing was started."
                )


def _responses_of_a_part(runner: Runner) -> Iterator[tuple[str, int]]:
    """The settings that decide it, and how many responses one engine call samples."""
    rollout, evaluate = runner.settings.rollout, runner.settings.evaluate
    prompts = min(rollout.rows_per_part, rollout.prompts_per_round, runner.facts.prompt_count)
    yield "rollout.samples_per_prompt and rollout.rows_per_part", prompts * rollout.samples_per_prompt
    if evaluate is not None:
        most = max((benchmark.count for benchmark in runner.facts.benchmarks), default=0)
        yield "evaluate.samples and evaluate.rows_per_part", min(evaluate.rows_per_part, most) * evaluate.samples


def _available_memory() -> int | None:
    """Bytes that programs may still take on this machine; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    line = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(line[1]) * 1024 if line else None


def _others(runners: Sequence[Runner]) -> int:
    """Bytes of the store that no plan of the runs names."""
    jobs = (job for runner in runners for job in runner.plan.jobs)
    named = (identity for job in jobs for identity in (job.output, job.side, states_of(job)))
    ours = {identity.key for identity in named if identity is not None}
    store = runners[0].store
    others = ((kind, key) for kind, key in listing.keys(store) if key not in ours)
    return sum(listing.listed(store, kind, key).bytes for kind, key in others)


def _what_would_help(runners: Sequence[Runner], overview: Overview) -> str:
    spared = overview.peak_bytes - overview.peak_with(SPAREST)
    checkpoint = max((overview.checkpoint_of(name) for name in overview.runs), key=lambda one: one.weights)
    told = (
        f"A checkpoint is {size(checkpoint.weights)} of weights and {size(checkpoint.optimizer)} of optimiser state, "
        "one a round."
    )
    if spared > 0:
        told += f" train.keep_checkpoints=1 and train.keep_optimizer_states=1 would save {size(spared)}."
    fewer = "Fewer rounds" if len(runners) == 1 else "Fewer rounds or runs"
    return f"{told} {fewer}, `eopd store gc --runs {runners[0].settings.runs}`, or a higher limit help."
