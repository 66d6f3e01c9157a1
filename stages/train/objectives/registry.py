"""Objectives by name.

``make_objective(settings)`` gives an ``Objective``: its ``needs`` go to the cache before training, its ``plan`` to
``TeacherBatch.build``, the object itself to ``sparse_head_loss``. A user's own is a file with a callable that takes
``ObjectiveSettings`` and returns an ``Objective``, named ``path/to/file.py:callable``; it composes the three primitives
``policy_gradient``, ``divergence`` and ``gate``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from eopd.stages.train.objectives import eopd, reopold, supervised, tropd, vopd
from eopd.stages.train.objectives.base import Objective, guided
from eopd.stages.train.objectives.settings import ObjectiveSettings, check_name, own_file_hash
from eopd.storage.errors import InputError

Builder = Callable[[ObjectiveSettings], Objective]

BUILDERS: dict[str, Builder] = {
    "sft": supervised.sft,
    "opd": eopd.opd,
    "lightning_opd": eopd.opd,
    "fkl": supervised.fkl,
    "rkl_topk": supervised.rkl_topk,
    "jsd": supervised.jsd,
    "eopd": eopd.eopd,
    "tropd": tropd.tropd,
    "reopold": reopold.reopold,
    "vopd": vopd.vopd,
    "rs_kd": supervised.rs_kd,
}


def make_objective(settings: ObjectiveSettings, *, has_prefixes: bool = False) -> Objective:
    """Create the objective that ``settings`` name.

    Args:
        has_prefixes: responses may begin with tokens that the teacher wrote, which it leaves to ``base.guided``.

    Raises:
        ValueError: unknown name (with the nearest), a refused one (with the reason), or a file that holds no such
            callable.
    """
    if ":" in settings.name:
        objective = _own(settings)
    else:
        check_name(settings.name)
        objective = BUILDERS[settings.name](settings)
    return guided(objective) if has_prefixes else objective


def _own(settings: ObjectiveSettings) -> Objective:
    own_file_hash(settings.name)  # names a missing file
    file, attribute = settings.name.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location(f"eopd_own_objective_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    builder = getattr(module, attribute, None)
    if not callable(builder):
        raise InputError(
            f"{file} has no callable {attribute!r}",
            setting="train.objective.name",
            file=file,
        )
    made = builder(settings)
    if not isinstance(made, Objective):
        raise InputError(
            f"{attribute} returned {type(made).__name__}, not an Objective",
            setting="train.objective.name",
            file=file,
        )
    return made
