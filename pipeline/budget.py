"""`max_store_bytes`: a run that would outgrow its store is refused before any work, with what would make it fit.

`eopd run` asks once, and so does a stage's command that a person or a batch system gives; the workers of `eopd run` do
not ask again, and nobody asks between parts. Nothing is measured on the disk: what is there is the sum of the sizes in
the markers of other artifacts, a small file a part, and what is to come is the forecast that `eopd plan` shows.
"""

from __future__ import annotations

from eopd.pipeline.config import ConfigError
from eopd.pipeline.estimate import Keep
from eopd.pipeline.overview import Overview, look
from eopd.pipeline.runner import Runner, states_of
from eopd.pipeline.words import size
from eopd.storage import listing

SPAREST = Keep(weights=1, optimizer=1)


def refuse_too_large(runner: Runner) -> None:
    """Compare what the store would hold at the run's worst moment with the limit, if one is set.

    Raises:
        ConfigError: it is more; says how much, of what, and what would help.
    """
    limit = runner.settings.max_store_bytes
    if limit is None:
        return
    overview = look([runner])
    others = _others(runner)
    need = others + overview.peak_bytes
    if need <= limit:
        return
    bound = "at most " if overview.totals["all"].at_most else ""
    raise ConfigError(
        f"max_store_bytes is {size(limit)}, and {runner.store} would hold {bound}{size(need)} at this run's worst "
        f"moment: {size(overview.peak_bytes)} of its own, {size(others)} of other artifacts. "
        f"{_what_would_help(runner, overview)} Nothing was started."
    )


def _others(runner: Runner) -> int:
    """Bytes of the store that this run's plan does not name."""
    named = (identity for job in runner.plan.jobs for identity in (job.output, job.side, states_of(job)))
    ours = {identity.key for identity in named if identity is not None}
    others = ((kind, key) for kind, key in listing.keys(runner.store) if key not in ours)
    return sum(listing.listed(runner.store, kind, key).bytes for kind, key in others)


def _what_would_help(runner: Runner, overview: Overview) -> str:
    spared = overview.peak_bytes - overview.peak_with(SPAREST)
    checkpoint = overview.checkpoint_of(runner.settings.name)
    told = (
        f"A checkpoint is {size(checkpoint.weights)} of weights and {size(checkpoint.optimizer)} of optimiser state, "
        "one a round."
    )
    if spared > 0:
        told += f" train.keep_checkpoints=1 and train.keep_optimizer_states=1 would save {size(spared)}."
    return f"{told} Fewer rounds, `eopd store gc --runs {runner.settings.runs}`, or a higher limit help."
