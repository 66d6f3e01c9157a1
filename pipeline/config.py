"""The settings of a run: one YAML file, typed, with ``--set`` overrides.

A config may name a base with ``extends: ./other.yaml``. A string that starts with ``./`` or ``../`` is a path
relative to the file that states it (for ``--set``: to the current folder), one that starts with ``~/`` lies in the
home folder; any other relative path is relative to the current folder. Unknown keys are refused with the nearest known
one, and so is a key that stands twice in one group.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, field_validator, model_validator

from eopd.pipeline.launchers.settings import LauncherSettings
from eopd.stages.experiment_settings import ExperimentSettings
from eopd.stages.format import error_line
from eopd.stages.job import Progress
from eopd.stages.settings import SEED, setting
from eopd.storage.errors import InputError, StoreError, UserError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(InputError):
    """Invalid settings, or inputs that settings name."""


@contextmanager
def errors_of(setting: str) -> Iterator[None]:
    """Raise errors of what ``setting`` names as ConfigErrors that name it."""
    try:
        yield
    except (ValueError, OSError, StoreError) as error:
        raise ConfigError.of(error, setting=setting) from error


class RunSettings(ExperimentSettings):
    """All settings of a config: the experiment, and where and how it runs."""

    name: str = setting(
        ..., "Name of the run: its folder below `runs`.", keyed=False, pattern=r"^[A-Za-z0-9._-]+$", max_length=200
    )
    store: str = setting(
        "store",
        "Folder of the artifact store. Runs that share it share work. A list is this folder and, behind it, the "
        "read_only_stores.",
        keyed=False,
    )
    read_only_stores: list[str] = setting(
        [],
        "Stores that are only read, searched in this order after `store`: folders, or URLs of buckets (s3://, gs://, "
        "az://) and datasets on the Hub (hf://datasets/USER/NAME), whose scores are read by byte range.",
        keyed=False,
    )
    runs: str = setting("runs", "Folder that receives logs, metrics and reports.", keyed=False)
    max_store_bytes: int | None = setting(
        None,
        "Refuse a run, or a stage of it, that would take the store beyond this, before any work. None: no limit.",
        keyed=False,
        gt=0,
        le=SEED,
    )
    launcher: LauncherSettings = setting(LauncherSettings, "How stages are started.", keyed=False)

    @model_validator(mode="before")
    @classmethod
    def _one_store_is_written(cls, raw: Any) -> Any:
        """Read ``store: [mine, theirs, ...]`` as ``store: mine`` and ``read_only_stores: [theirs, ...]``."""
        if isinstance(raw, dict) and isinstance(raw.get("store"), list):
            if raw.get("read_only_stores"):
                raise InputError("give `store` as a list, or `read_only_stores`, not both", setting="read_only_stores")
            if not raw["store"]:
                raise InputError(
                    "`store` is an empty list; its first entry is the folder that is written to", setting="store"
                )
            return {**raw, "store": raw["store"][0], "read_only_stores": raw["store"][1:]}
        return raw

    @field_validator("store")
    @classmethod
    def _a_folder_is_written(cls, store: str) -> str:
        if "://" in store:
            raise InputError(
                f"a run writes to a folder, and reads buckets behind it: store: [store, {store}]. `eopd store copy "
                f"scores/KEY {store} --inputs` puts what it made there"
            )
        return store

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, name: str) -> str:
        if set(name) == {"."}:
            raise InputError("a run cannot be called '.' or '..'")
        return name


def find_config(name: str) -> Path:
    """Find a config by path, by the folder of a run, or by the name of a config that comes with the package.

    Raises:
        ConfigError: neither; lists what is there.
    """
    path = config_file(name)
    if path is not None:
        return path
    known = sorted(file.relative_to(CONFIG_FOLDER).with_suffix("").as_posix() for file in CONFIG_FOLDER.rglob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    raise ConfigError(
        f"no config file {name!r}, and none of that name comes with eopd ({', '.join(known)})",
        remedy=f"Did you mean {near[0]}?" if near else "",
    )


def config_file(name: str) -> Path | None:
    """Return what ``find_config`` would, or None if there is none. Raises ConfigError for an impossible path."""
    path = Path(name)
    packaged = CONFIG_FOLDER / f"{name}.yaml"
    try:
        # the second is the resolved config of a run
        return next((file for file in (path, path / "config.yaml", packaged) if file.is_file()), None)
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"no config file {name[:80]!r}: {error.strerror}") from error


def load_config(name: str, overrides: Sequence[str] = ()) -> RunSettings:
    """Load settings from a YAML file and ``key.path=value`` overrides (values are read as YAML).

    Raises:
        ConfigError: a file, key or value is wrong.
    """
    raw, source = load_raw(name, overrides)
    return parse_settings(raw, source)


def load_raw(name: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Load the mapping that ``load_config`` checks, and the file it comes from."""
    path = find_config(name)
    raw = _read_yaml(path, seen=())
    for override in overrides:
        _apply_override(raw, override)
    return raw, str(path)


def read_list(path: Path, key: str) -> list[Any]:
    """Read the list under ``key`` of a YAML file; its paths are relative to the file.

    Raises:
        ConfigError: no such file, not YAML, or no list there.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", file=path)
    entries = _read_yaml(path, seen=()).get(key)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must hold a list under `{key}:`", file=path)
    return entries


def parse_settings(raw: Mapping[str, Any], source: str | None) -> RunSettings:
    """Check the settings that the file ``source`` holds. Raises ConfigError."""
    try:
        _refuse_other_values(raw, "")
        return RunSettings.model_validate(raw)
    except ValidationError as error:
        first, *others = (_refusal(item) for item in error.errors() if not _follows(item, error.errors()))
        message = "; ".join(map(str, [first, *others]))
        refusal = ConfigError(message, setting=first.setting) if others else first
        raise ConfigError.of(refusal, file=source) from error
    except ConfigError as error:
        raise ConfigError.of(error, file=source) from error


def _refuse_other_values(value: Any, where: str) -> None:
    """Raise ConfigError for values that no artifact key, resolved config or path can hold.

    YAML has dates, sets, binary data and NaN; and fields such as template arguments take any value.
    """
    problem, remedy = None, ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                problem = f"{key!r} in {where or 'the settings'} must be text"
                raise ConfigError(problem, setting=where or None, remedy="write it in quotes")
            _refuse_other_values(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _refuse_other_values(item, f"{where}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        problem = f"is {value}, and must be a finite number"
    elif isinstance(value, str):
        if "\0" in value or not _can_be_encoded(value):
            problem = "holds a character that no text or path can hold (NUL, or half of a surrogate pair)"
    elif value is not None and not isinstance(value, (bool, int, float)):
        problem, remedy = f"is a {type(value).__name__} in YAML, and must be text or a number", "write it in quotes"
    if problem is not None:
        raise ConfigError(f"setting {where!r} {problem}", setting=where, remedy=remedy)


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_yaml(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        path = path.resolve()
        if path in seen:
            raise ConfigError(
                f"{path} extends itself through {' -> '.join(map(str, seen))}", setting="extends", file=path
            )
        if seen and not path.is_file():
            problem = f"`extends` names {path}, which is no file or does not exist"
            raise ConfigError(problem, setting="extends", file=seen[-1])
        raw = _load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 text (byte {error.start})"
        raise ConfigError(problem, file=path, remedy="save it as UTF-8") from error
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError to pathlib
        raise ConfigError(f"{path} cannot be read: {error_line(error)}", file=path) from error
    except _BadYaml as error:
        raise ConfigError.of(error, file=path) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold settings as `key: value`, found {type(raw).__name__}", file=path)
    raw = _resolve_paths(raw, path.parent)
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str) or not base or "\0" in base:
        problem = f"`extends` must be the path of one YAML file, got {_shown(base)}"
        raise ConfigError(problem, setting="extends", file=path)
    return merge(_read_yaml(Path(base), (*seen, path)), raw)


def _resolve_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _resolve_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        try:
            return str((folder / value).resolve())
        except (OSError, RuntimeError, ValueError):  # a loop of links, or no path at all: refused where it is used
            return str(folder / value)
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value


class _BadYaml(UserError):
    """Text that is not YAML, or YAML that cannot be settings."""


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys; PyYAML silently keeps the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keep the node as the file has it: construction adds what `<<` merges to a mapping's own keys."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                problem = f"{key.value!r} is already given in line {first[key.value]}"
                raise _BadYaml(problem, line=line, remedy="keep one of them")
            first[key.value] = line
        return node


MOST_VALUES = 100_000
"""Values of a config with its aliases written out. A sweep of a thousand runs has fewer."""


def _load_yaml(text: str) -> Any:
    """Parse one YAML document. Raises _BadYaml."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise _BadYaml("it is not YAML for settings: it is nested too deeply") from error
    except _BadYaml:
        raise
    except Exception as error:  # PyYAML raises what Python raises where a tag does not fit its value (`!!int x`)
        mark = getattr(error, "problem_mark", None)
        raise _BadYaml(f"it is not YAML: {error_line(error)}", line=mark and mark.line + 1) from error


def _count_values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Count the values below ``node`` with aliases expanded; ``counts`` holds None for a node being counted.

    Raises:
        _BadYaml: a node holds itself, or a few lines of aliases stand for more values than any config has.
    """
    line = node.start_mark.line + 1
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise _BadYaml("an anchor holds an alias of itself", line=line)
        return known
    counts[id(node)] = None
    children = node.value if isinstance(node, yaml.SequenceNode) else ()
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    count = 1 + sum(_count_values(child, counts) for child in children)
    if count > MOST_VALUES:
        raise _BadYaml(f"its aliases stand for more than {MOST_VALUES:,} values", line=line)
    counts[id(node)] = count
    return count


def _shown(value: Any) -> str:
    """Format a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a whole number of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        problem = f"--set {override!r}: expected key=value, such as train.optimizer.lr=1e-5"
        raise ConfigError(problem, setting=dotted or None)
    try:
        value = _resolve_paths(_load_yaml(text), Path.cwd())
    except _BadYaml as error:
        raise ConfigError.of(error, f"--set {override!r}", setting=dotted) from error
    here = raw
    *above, last = dotted.split(".")
    for name in above:
        below = here.setdefault(name, {})
        if below is None:
            below = here[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {name!r} is a value, not a group of settings", setting=dotted)
        here = below
    here[last] = value


def _follows(item: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a list is only too short because items of it were refused."""
    length = len(item["loc"])
    below = (other for other in others if len(other["loc"]) > length and other["loc"][:length] == item["loc"])
    return item["type"] == "too_short" and any(below)


def _refusal(item: Mapping[str, Any]) -> ConfigError:
    """Return what pydantic reports about one setting. Validators of a group may name the setting that they mean."""
    location = [str(piece) for piece in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"Known here: {', '.join(known)}."
        return ConfigError(f"unknown setting {where!r}", setting=where, remedy=remedy)
    if item["type"] == "missing":
        return ConfigError(f"setting {where!r} is required", setting=where)
    value, raised = item.get("input"), item.get("ctx", {}).get("error")
    message, remedy, setting = str(raised or item["msg"]), "", where or None
    if isinstance(raised, UserError):
        message, remedy = raised.text(setting=False, remedy=False), raised.remedy
        if raised.setting is not None:
            setting = _joined(where, raised.setting)
    if item["type"] != "value_error" or (location and not isinstance(value, (Mapping, BaseModel))):
        message = f"setting {where!r} is {_shown(value)}: {message}"
    elif setting is not None and setting not in f"{message} {remedy}":
        message = f"setting {setting!r}: {message}"
    return ConfigError(message, setting=setting, remedy=remedy)


def _joined(group: str, setting: str) -> str:
    """Return the whole name of a setting that a validator of ``group`` names, with or without the group."""
    if f".{group}".endswith(f".{setting}"):
        return group
    return setting if not group or setting.startswith(f"{group}.") else f"{group}.{setting}"


def _fields_at(location: Sequence[str]) -> list[str]:
    model: Any = RunSettings
    for name in location:
        if name.isdigit():
            continue
        field = model.model_fields.get(name) if _is_model(model) else None
        model = _model_of(field.annotation) if field is not None else None
        if model is None:
            return []
    return sorted(model.model_fields)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _model_of(annotation: Any) -> Any:
    """Return the settings class inside ``X``, ``X | None``, ``list[X]`` or ``dict[str, X]``."""
    if _is_model(annotation):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        model = _model_of(inner)
        if model is not None:
            return model
    return None


# -- sweeps -----------------------------------------------------------------------------------------------------------

# Sweeps: several runs as changes to one config over one store, so that common jobs are done once.
#
#     # sweep.yaml                              eopd run study.yaml --sweep sweep.yaml
#     sweep:
#       - {name: opd, train: {objective: {name: opd}}}
#       - {name: fkl, train: {objective: {name: fkl}}}
#
# Each entry is merged over the config group by group, as `extends` does; its run is called <config's name>-<name>.


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
