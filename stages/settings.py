"""Base of every stage's settings: typed, frozen, unknown keys refused, and split into keyed and unkeyed fields.

A keyed field decides what an artifact contains and enters its key; an unkeyed one (device, batch size, engine
memory) only says how fast or where, is recorded beside the result and never keyed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Upper limits of settings: beyond anything that works, so that a typo is refused where it stands. What a number costs
# on this machine is another question, which `eopd plan` and `eopd run` answer.
COUNT = 1_000_000_000
ROUNDS = 10_000
LENGTH = 10_000_000  # tokens of a sequence
ENTRIES = 1_000_000  # of one token's distribution
PROCESSES = 4096
THREADS = 4096
SEED = 2**63 - 1
DAY = 86_400.0  # seconds
NATS = 1000.0
FACTOR = 1e9


def setting(default: Any, description: str, *, keyed: bool = True, **constraints: Any) -> Any:
    """Declare a documented field. ``default=...`` makes it required; ``keyed=False`` keeps it out of artifact keys."""
    extra: Any = {"keyed": keyed}
    if isinstance(default, (dict, list)) or (isinstance(default, type) and issubclass(default, BaseModel)):
        factory = default if isinstance(default, type) else (lambda: type(default)(default))
        return Field(default_factory=factory, description=description, json_schema_extra=extra, **constraints)
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


class Settings(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    def semantic(self) -> dict[str, Any]:
        """Return the keyed fields only, as plain JSON values, for an artifact's key."""
        kept: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("keyed") is False:
                continue
            value = getattr(self, name)
            kept[name] = value.semantic() if isinstance(value, Settings) else _plain(value)
        return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.semantic()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
