"""The loader reads one step ahead while the loop trains, and no further: memory holds two steps."""

from __future__ import annotations

from threading import Event, get_ident
from typing import Any

from eopd.stages.train.loop import Loop, Step


class Recorded(Loop):
    """The real ``steps`` over steps that note when they are loaded."""

    def __init__(self, count: int) -> None:
        self.begun = [Event() for _ in range(count)]
        self.threads: set[int] = set()

    def load_step(self, number: int) -> Step:
        self.begun[number].set()
        self.threads.add(get_ident())
        return Step(number, 0, [], 0, [])


def test_the_next_step_is_loaded_while_one_trains_and_none_after_it() -> None:
    loop = Recorded(5)
    seen: list[Any] = []
    for step, waited in loop.steps(1, 5):
        seen.append(step.number)
        assert waited >= 0
        if step.number + 1 < 5:
            assert loop.begun[step.number + 1].wait(30), "the next step is not loaded until it is asked for"
        assert not any(later.is_set() for later in loop.begun[step.number + 2 :])
    assert seen == [1, 2, 3, 4]
    assert not loop.begun[0].is_set()
    assert get_ident() not in loop.threads
    assert list(loop.steps(5, 5)) == []
