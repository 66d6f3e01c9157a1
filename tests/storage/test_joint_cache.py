"""Scores by several teachers, read as one cache."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from eopd.storage.artifacts import Artifact
from eopd.storage.coverage import HeadNeed, NeedNotMet
from eopd.storage.errors import WrongArtifact
from eopd.storage.identity import Identity
from eopd.storage.teacher_cache import JointCache, TeacherCache, in_order, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.raises import raises
from tests.storage.making import dense, header, rows_of, scores

OWN = ([0, 40, 0, 17], [5, 0, 1, 0])
"""Tokens of each response that either teacher scored."""


def of_teacher(store: Path, name: str, lengths: list[int], head: HeadRule, parts: int = 2) -> Artifact:
    artifact = Artifact(store, Identity("scores", 1, parts, {"teacher": name}))
    for part in range(parts):
        with artifact.write_part(part, inputs={"rollouts": "rollouts"}) as folder:
            write_part(folder, rows_of(dense(part, lengths, 300), head), header(head, 300))
    return artifact


@pytest.fixture
def two(tmp_path: Path) -> list[Artifact]:
    return [of_teacher(tmp_path, str(n), lengths, HeadRule()) for n, lengths in enumerate(OWN)]


def equal(one: TeacherRows, other: TeacherRows) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(TeacherRows))


def test_each_response_is_read_from_the_artifact_that_scored_it(two: list[Artifact]) -> None:
    joint, caches = JointCache(two), [TeacherCache(artifact) for artifact in two]
    assert list(joint.parts()) == [0, 1]
    assert joint.token_counts(0).tolist() == [5, 40, 1, 17]
    wanted = [(1, 3), (0, 0), (0, 1), (1, 2), (0, 0), (1, 0)]
    rows = joint.read(wanted)
    assert rows.responses == len(wanted)
    for place, (part, row) in enumerate(wanted):
        owner = caches[0] if OWN[0][row] else caches[1]
        assert equal(in_order(rows, np.asarray([place])), owner.read([(part, row)])), (part, row)
    assert equal(joint.read_part(1), joint.read([(1, row) for row in range(4)]))


def test_one_artifact_is_read_as_it_is(tmp_path: Path) -> None:
    artifact, written = scores(tmp_path)
    assert equal(JointCache([artifact]).read_part(1), TeacherCache(artifact).read_part(1))
    assert equal(in_order(TeacherCache(artifact).read_part(0), np.arange(4)), TeacherCache(artifact).read_part(0))
    assert len(written) == 2


def test_a_part_that_one_teacher_gave_up_holds_the_other_s(tmp_path: Path) -> None:
    first = of_teacher(tmp_path, "0", OWN[0], HeadRule())
    second = of_teacher(tmp_path, "1", OWN[1], HeadRule(), parts=1)
    given_up = Artifact(tmp_path, Identity("scores", 1, 2, {"teacher": "given up"}))
    given_up.set_aside(0, "its logits are NaN")
    assert JointCache([first, second]).sources(1) == [first]
    joint = JointCache([given_up, first])
    assert joint.token_counts(0).tolist() == OWN[0]
    assert joint.read([(0, 1)]).tokens == 40


def test_every_teacher_s_scores_must_hold_what_is_read(tmp_path: Path) -> None:
    narrow = of_teacher(tmp_path, "narrow", OWN[0], HeadRule(k_max=4))
    wide = of_teacher(tmp_path, "wide", OWN[1], HeadRule(k_max=16))
    for artifacts in ([wide, narrow], [narrow, wide]):
        with raises(NeedNotMet, setting="score.head.k_max"):
            JointCache(artifacts).require([HeadNeed(8, above=0.4, min_prob=0.5)])


def test_draws_are_weighed_by_one_rule(tmp_path: Path) -> None:
    """The weight of a draw is ``min_prob`` of the rule: two rules would weigh one teacher's draws by the other's."""
    fine = of_teacher(tmp_path, "fine", OWN[0], HeadRule(min_prob=0.01))
    coarse = of_teacher(tmp_path, "coarse", OWN[1], HeadRule(min_prob=0.03))
    with raises(WrongArtifact, r"min_prob=0\.03.*min_prob=0\.01", setting="score.head"):
        JointCache([fine, coarse]).require([])
    with pytest.raises(WrongArtifact):
        _ = JointCache([fine, coarse]).coverage
    assert JointCache([fine, fine]).coverage.head == HeadRule(min_prob=0.01)
