"""The Ray cluster of the settings."""

from __future__ import annotations

import os
import signal
from typing import Any

from eopd.pipeline.config import ConfigError
from eopd.pipeline.launchers.ray.settings import RaySettings
from eopd.storage.extras import installing

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # pages of a dead node's state on stdout; the scheduler says that it is lost
}


def connect(asked: RaySettings) -> Any:
    """The `ray` module, connected to the cluster of the settings.

    Raises:
        ConfigError: ray is not installed, or there is no cluster at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"launcher.kind is ray, but ray is not installed. To add it, {installing('ray')}") from error
    if not ray.is_initialized():
        heeding = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own in its place
        try:
            ray.init(
                address=asked.address,
                runtime_env=asked.runtime_env or None,
                log_to_driver=False,  # workers write to the run's logs
                logging_level="ERROR",
                include_dashboard=False if asked.address == "local" else None,
            )
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(
                f"launcher.ray.address {asked.address!r}: {first_sentence(error)}. Start a cluster with "
                "`ray start --head`, or use address: local."
            ) from error
        finally:
            signal.signal(signal.SIGTERM, heeding)
    return ray


def first_sentence(error: Exception) -> str:
    """Of Ray's errors, which go on with advice to developers."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.partition(". ")[0] for line in lines if line), type(error).__name__)
