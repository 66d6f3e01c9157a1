"""Graceful shutdown: a stop request takes effect between units of work.

The request belongs to the process, as signals do. Code whose work should be committed before a stop marks it with
``in_hand``; code between two units of work calls ``check``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_wished = threading.Event()
_lock = threading.Lock()
_in_hand = 0


def _forget() -> None:
    global _in_hand
    _in_hand = 0
    _wished.clear()


os.register_at_fork(after_in_child=_forget)  # a forked process has its own work and its own end


class Stopped(BaseException):
    """The process was asked to stop, and everything it had in hand is committed. No error: nothing handles it."""


def stop_wished() -> bool:
    return _wished.is_set()


def check() -> None:
    """Raise Stopped if the process was asked to stop."""
    if _wished.is_set():
        raise Stopped


@contextmanager
def in_hand() -> Iterator[None]:
    """Delay a stop request until the block ends."""
    global _in_hand
    with _lock:
        _in_hand += 1
    try:
        yield
    finally:
        with _lock:
            _in_hand -= 1


@contextmanager
def heeding(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send SIGINT (even if ignored, as in the background) and SIGTERM to ``handler`` until the block ends."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stopping_on_signals(tell: Callable[[], None]) -> Iterator[None]:
    """Stop the block on SIGINT or SIGTERM: after the unit of work in progress, or at once on the second signal.

    ``tell`` is called when the first one comes and there is something to finish.
    """

    def heed(number: int, frame: FrameType | None) -> None:
        again = _wished.is_set()
        _wished.set()
        if again or not _in_hand:
            raise Stopped
        tell()

    with heeding(heed):
        try:
            yield
        finally:
            _wished.clear()
