"""Advisory claims: who is at work on a part, so that two processes do not do the same one for nothing.

A claim is a kernel lock on a small file. It vanishes with its process, however that ends, so nothing has to be
cleaned after a crash; and it only saves work: correctness is the commit rule's (``storage.artifacts``). Where a file
system has no locks (Lustre mounted without ``-o flock``), everybody's claim is granted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from eopd.storage import paths
from eopd.storage.artifacts import Artifact
from eopd.storage.files import naming_full_disks

POLL_SECONDS = 0.5
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def claim(artifact: Artifact, part: int) -> Iterator[bool]:
    """Try to claim a part; yields whether it is ours. Never waits."""
    with naming_full_disks(artifact.folder):
        artifact.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(artifact.folder / paths.claim_name(part), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield True
    finally:
        os.close(handle)


def claimed_parts(artifact: Artifact, parts: Sequence[int]) -> Iterator[int]:
    """Yield each part of ``parts`` that still has to be done, one at a time, while it is claimed by us.

    Parts that others are at work on come last: by then they are mostly done; if their worker died, they are ours.
    Returns when every part is committed.
    """
    for part, held in held_parts(artifact, parts):
        with held:
            yield part


def held_parts(artifact: Artifact, parts: Sequence[int]) -> Iterator[tuple[int, ExitStack]]:
    """As ``claimed_parts``, with the claim for the caller to close: when the part is committed."""
    waiting = list(parts)
    while waiting:
        held_by_others = []
        for part in waiting:
            if artifact.is_committed(part):
                continue
            held = ExitStack()
            if not held.enter_context(claim(artifact, part)):
                held.close()
                held_by_others.append(part)
            elif artifact.is_committed(part):
                held.close()
            else:
                yield part, held
        waiting = held_by_others
        if waiting:
            time.sleep(POLL_SECONDS)
