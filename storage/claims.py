"""Advisory claims on parts, so that two processes do not do the same part for nothing.

A claim is a kernel lock on a small file. It vanishes with its process, however that ends, so nothing has to be
cleaned after a crash; and it only saves work: correctness is the commit rule's (``storage.artifacts``). Where a file
system has no locks (Lustre mounted without ``-o flock``), everybody's claim is granted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from eopd.storage import paths, stopping
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.files import naming_full_disks
from eopd.storage.untrusted import open_plain

POLL_SECONDS = 0.5
TELL_EVERY_SECONDS = 60.0
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def claim(artifact: Artifact, part: int) -> Iterator[bool]:
    """Try to claim a part; yields True if it is ours. Never waits.

    Raises:
        DamagedPart: a link, or anything but a plain file, is in the claim's place, or on the way to it.
    """
    path = artifact.folder / paths.claim_name(part)
    with naming_full_disks(path):
        artifact.refuse_links()
        artifact.folder.mkdir(parents=True, exist_ok=True)
        handle = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        is_ours_alone = os.fstat(handle).st_nlink == 1  # another name may be that of somebody's file: only locked
        if is_ours_alone:
            _share(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if is_ours_alone:
            with suppress(OSError):  # the name is a courtesy: a full disk must not stop what may be free to go on
                os.ftruncate(handle, 0)
                os.pwrite(handle, _own_name().encode(), 0)
        with stopping.in_hand():
            yield True
    finally:
        os.close(handle)


def _share(handle: int) -> None:
    """Let other users of a shared store lock our claim files, whatever our umask is."""
    status = os.fstat(handle)
    if status.st_uid == os.geteuid() and status.st_mode & 0o666 != 0o666:
        with suppress(OSError):  # where it cannot be changed, it is as the umask has it
            os.fchmod(handle, 0o666)


def holder(artifact: Artifact, part: int) -> str | None:
    """Describe the process that holds a part ("process 412 on node7 since 12:03:11"); None if none is visible."""
    try:
        return _locked_by(artifact.folder / paths.claim_name(part))
    except (PermissionError, DamagedPart):
        return None


def may_be_held(path: Path) -> bool:
    """True if a living process holds this claim file, or an invisible one may."""
    try:
        return _locked_by(path) is not None
    except DamagedPart:  # only plain files are claims
        return False
    except OSError:
        return True


def _locked_by(path: Path) -> str | None:
    """Return the holder without changing anything. Raises PermissionError, or DamagedPart if this is no plain file."""
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        name = os.pread(handle, 256, 0).decode(errors="replace")
        return "".join(letter if letter.isprintable() else "?" for letter in name) or "another process"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(handle)
    return None


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%H:%M:%S')}"


def claimed_parts(artifact: Artifact, parts: Sequence[int], tell: Callable[[str], None] | None = None) -> Iterator[int]:
    """Yield each part of ``parts`` that is not committed, one at a time, while we hold its claim.

    Parts that others are at work on come last: by then they are mostly done; if their worker died, they are ours.
    Returns when every part is committed.

    Args:
        tell: hears whom we wait for, when that is all there is to do, and again every minute.

    Raises:
        Stopped: between two parts, where the process was asked to stop.
    """
    for part, held in held_parts(artifact, parts, tell):
        with held:
            yield part


def held_parts(
    artifact: Artifact,
    parts: Sequence[int],
    tell: Callable[[str], None] | None = None,
    before_waiting: Callable[[], None] | None = None,
) -> Iterator[tuple[int, ExitStack]]:
    """Like ``claimed_parts``, but the caller closes each claim after the commit.

    Args:
        before_waiting: sees to it that what the caller still holds will be committed: others may wait for that.
    """
    waiting = list(parts)
    patience = Patience(tell)
    while waiting:
        held_by_others = []
        for part in waiting:
            stopping.check()
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
            if before_waiting is not None:
                before_waiting()
            patience.wait_for(artifact, waiting)


class Patience:
    """Waiting for other processes with occasional messages, so that it does not look like a hang."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self._tell = tell
        self._told, self._told_at = "", 0.0

    def wait_for(self, artifact: Artifact, parts: Sequence[int]) -> None:
        """Sleep briefly; now and then report who holds ``parts``."""
        self.say(artifact, parts)
        time.sleep(POLL_SECONDS)

    def say(self, artifact: Artifact, parts: Sequence[int]) -> None:
        if self._tell is None:
            return
        holders = sorted({name for part in parts[:16] if (name := holder(artifact, part)) is not None})
        who, now = f"{'; '.join(holders)}", time.monotonic()
        if holders and (who != self._told or now - self._told_at > TELL_EVERY_SECONDS):
            self._told, self._told_at = who, now
            shown = ", ".join(map(str, parts[:8])) + (" ..." if len(parts) > 8 else "")
            self._tell(f"{artifact.kind}: waiting for part{'s' if len(parts) > 1 else ''} {shown}, held by {who}")
