"""Sweeps: several runs as changes to one config over one store, so that common jobs are done once.

    # sweep.yaml                              eopd run study.yaml --sweep sweep.yaml
    sweep:
      - {name: opd, train: {objective: {name: opd}}}
      - {name: fkl, train: {objective: {name: fkl}}}

Each entry is merged over the config group by group, as `extends` does; its run is called <config's name>-<name>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eopd.pipeline.config import ConfigError, RunSettings, load_raw, merge, parse_settings, read_list
from eopd.stages.job import Progress

SHARED = ("store", "read_only_stores", "runs", "launcher")


def load_sweep(config: str, file: str, overrides: Sequence[str] = ()) -> list[RunSettings]:
    """Load the settings of every run of the sweep. ``overrides`` change the config before the entries do.

    Raises:
        ConfigError: the file is no list of named changes, two have one name, or one moves away from the common store.
    """
    raw, source = load_raw(config, overrides)
    base = parse_settings(raw, source)
    sweep: list[RunSettings] = []
    for number, entry in enumerate(read_list(Path(file), "sweep")):
        try:
            sweep.append(_changed(raw, base.name, entry, [other.name for other in sweep]))
        except ConfigError as error:
            raise ConfigError.of(error, f"entry {number + 1}", file=file) from error
    return sweep


def _changed(raw: dict[str, Any], base: str, entry: Any, taken: Sequence[str]) -> RunSettings:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError("it must be settings with a name, such as {name: opd, train: {epochs: 2}}")
    name = f"{base}-{entry['name']}"
    for field in SHARED:
        if field in entry:
            problem = f"{field!r} is common to all runs of a sweep"
            raise ConfigError(problem, setting=field, remedy="set it in the config")
    if name in taken:
        raise ConfigError(f"the name {entry['name']!r} is taken by an earlier entry", setting="name")
    return parse_settings(merge(raw, {**entry, "name": name}), None)


@dataclass(frozen=True)
class NamedProgress:
    """Progress that prefixes every line with the name of its run."""

    name: str
    inner: Progress

    def start(self, what: str, total: int, unit: str = "tokens") -> None:
        self.inner.start(f"{self.name}: {what}", total, unit)

    def advance(self, n: int, **figures: float) -> None:
        self.inner.advance(n, **figures)

    def expect(self, total: int, in_hand: int = 0) -> None:
        self.inner.expect(total, in_hand)

    def line(self, text: str) -> None:
        self.inner.line(f"{self.name}: {text}")

    def close(self) -> None:
        self.inner.close()
