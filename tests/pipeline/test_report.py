"""What the report asks of verifiers."""

from __future__ import annotations

import pytest

from eopd.pipeline.report import judge_rollouts


@pytest.mark.parametrize(
    ("verifier", "pairs", "said"),
    [
        ("math", [(r"\boxed{2}", "2"), (r"\boxed{2}", "$"), (r"\boxed{3}", "2")], [True, None, False]),
        ("countdown", [("4+7=11", "4,7=11"), ("4+7=11", "eleven"), ("", "4,7=11")], [True, None, False]),
        ("unknown", [("4+7=11", "4,7=11")], [None]),
        ("exact", [], []),
    ],
)
def test_a_reference_that_cannot_be_read_leaves_its_own_rollout_unjudged(
    verifier: str, pairs: list[tuple[str, str]], said: list[bool | None]
) -> None:
    assert judge_rollouts(verifier, pairs) == said
