"""The table of stages, in the order in which a round does them. No other place lists them.

Another package adds a stage as an entry point of the group ``eopd.stages``; it comes after those below:

    [project.entry-points."eopd.stages"]
    token_counts = "my_package.token_counts:TokenCountsStage"
"""

from __future__ import annotations

from importlib.metadata import entry_points

from eopd.stages.align.stage import AlignmentSummaryStage, AlignStage
from eopd.stages.attribute.stage import AttributeStage, AttributionSummaryStage
from eopd.stages.evaluate.stage import EvaluateStage, EvaluationSummaryStage
from eopd.stages.judge.stage import JudgeStage
from eopd.stages.rollout.stage import GuideStage, RolloutStage, StudentTopkStage
from eopd.stages.route.stage import EntropiesStage, RouteStage
from eopd.stages.score.stage import ScoreStage
from eopd.stages.stage import Stage
from eopd.stages.train.stage import TrainStage
from eopd.storage.errors import InputError
from eopd.storage.paths import is_kind

GROUP = "eopd.stages"
TRAIN = TrainStage()

STAGES: list[Stage] = [
    EvaluateStage(),
    EvaluationSummaryStage(),
    AlignStage(),
    AlignmentSummaryStage(),
    EntropiesStage(),
    RouteStage(),
    GuideStage(),
    RolloutStage(),
    StudentTopkStage(),
    JudgeStage(),
    ScoreStage(),
    TRAIN,
    AttributeStage(),
    AttributionSummaryStage(),
]
"""The student at the start of a round is evaluated before the round's rollouts are sampled."""


def _add_installed() -> None:
    """Append the stages that other packages bring, by the name of their entry point.

    Raises:
        InputError: one cannot be loaded, or is no stage, or takes the name or kind of another.
    """
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist else "an unknown package"
        problem = f"the stage {entry.name} = {entry.value}, which {package} adds to eopd,"
        mend = f"mend or uninstall {package}"
        try:
            stage = entry.load()()
        except Exception as error:
            raise InputError(f"{problem} cannot be loaded ({error!r})", remedy=mend) from error
        if not isinstance(stage, Stage):
            raise InputError(f"{problem} is no subclass of eopd.stages.stage.Stage", remedy=mend)
        for name in ("name", "kind", "command"):
            value = getattr(stage, name, None)
            if not (isinstance(value, str) and is_kind(value)):
                needed = "it must be lower-case words joined by underscores"
                raise InputError(f"{problem} has {name} {value!r}, and {needed}", remedy=mend)
            if name != "command" and value in (getattr(other, name) for other in STAGES):
                raise InputError(f"{problem} has {name} {value!r}, which another stage has", remedy=mend)
        STAGES.append(stage)


_add_installed()


def commands() -> list[str]:
    """Return the names of the `eopd` commands that run stages, each once."""
    return list(dict.fromkeys(stage.command for stage in STAGES))
