"""`max_store_bytes`: a run that would outgrow its store is refused before any work, with what would make it fit.

`eopd run` asks once, and so does a stage's command that a person or a batch system gives; the workers of `eopd run` do
not ask again, and nobody asks between parts. Nothing is measured on the disk: what is there is the sum of the sizes in
the markers of other artifacts, a small file a part. What is to come is the forecast that `eopd plan` shows, with scores
at the size that they cannot exceed.
"""

from __future__ import annotations

from collections.abc import Sequence

from eopd.pipeline.config import ConfigError
from eopd.pipeline.estimate import Keep
from eopd.pipeline.overview import Overview, look
from eopd.pipeline.runner import Runner, states_of
from eopd.stages.format import size
from eopd.storage import listing

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
