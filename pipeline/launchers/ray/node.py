"""What runs on the nodes of a Ray cluster: the command of a stage, in a process of its own.

Ray places and watches it; the command is the same that a person would give, so that memory and GPUs are given back
whatever happens, and a task that is killed loses no more than the part in hand.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

from eopd.pipeline.launchers.processes import Leader

POLL_SECONDS = 0.1


def do(
    arguments: Sequence[str], folder: str, log: str, environment: Mapping[str, str], meeting: tuple[str, int] | None
) -> int:
    """Run ``python ARGUMENTS`` in ``folder``, its output appended to ``log``; returns its exit code.

    Args:
        meeting: host and port at which processes of several nodes meet; stands for {host} and {port} in ``arguments``.
    """
    if meeting is not None:
        host, port = meeting
        arguments = [argument.format(host=host, port=port) for argument in arguments]
    with open(log, "ab") as output:
        process = Leader(
            arguments,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    told = False
    while True:
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)  # not wait(): Ray's cancellation comes between two instructions
            return process.returncode
        except KeyboardInterrupt:  # cancelled: what is in hand is committed, then the process ends by itself
            if not told:  # Ray may say it again, and a second interruption stops at once
                process.send_signal(signal.SIGTERM)  # Ray's processes are deaf to SIGINT, and so are their children
            told = True


def meeting_place() -> tuple[str, int]:
    """Address of this node and a port that is free on it now."""
    import ray

    host: str = ray.util.get_node_ip_address()
    with socket.socket() as one:
        one.bind((host, 0))
        port: int = one.getsockname()[1]
    return host, port
