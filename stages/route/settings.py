"""Settings of routing, with keys of their own: routing changes no evaluation's key."""

from __future__ import annotations

from eopd.stages.settings import COUNT, LENGTH, Settings, setting
from eopd.storage.errors import InputError

STANDARD = "standard"
"""The mode that is `evaluate` itself. The first tokens of its responses are the probe."""
SHORTEST = 3
"""Tokens of the shortest probe that has the three descriptors."""


class RuleSettings(Settings):
    """A routing rule. Conditions are tried in order, and a null threshold is never reached."""

    entropy: float | None = setting(None, "`certain` is taken below this sum of entropies, nats", ge=0.0, le=1e9)
    trend: float | None = setting(
        None, "`unsettled` is taken above this rank correlation of entropy and position", ge=-1.0, le=1.0
    )
    roughness: float | None = setting(None, "`unsettled` is taken above this von Neumann ratio, too", ge=0.0, le=1e9)
    certain: str = setting(STANDARD, "Mode of probes with little entropy")
    unsettled: str = setting(STANDARD, "Mode of other probes whose entropy rises or jumps")
    otherwise: str = setting(STANDARD, "Mode of all others")

    @property
    def modes(self) -> tuple[str, str, str]:
        return self.certain, self.unsettled, self.otherwise


class RouteSettings(Settings):
    """Routing by the entropies of a response's first tokens (EDRM, arXiv 2605.22873)."""

    tokens: int = setting(
        64,
        "First tokens of a response in the mode `standard` whose entropies are read: the probe",
        ge=SHORTEST,
        le=LENGTH,
    )
    rule: RuleSettings | None = setting(
        None, "Thresholds and modes of your own (null: those that do best on the calibration problems)"
    )
    calibration: int = setting(
        50,
        "Problems, drawn by `seed`, that a rule is fitted to and the result leaves out; less than half",
        ge=1,
        le=COUNT,
    )
    sampled: bool = setting(False, "Route samples of a temperature above 0, each by its own first tokens")

    def check_calibration(self, problems: int) -> None:
        """Refuse to fit a rule to half of the problems or more. Raises ValueError."""
        if self.rule is None and 2 * self.calibration >= problems:
            raise InputError(
                f"evaluate.route.calibration is {self.calibration}, which must be less than half of the {problems} "
                "problems",
                setting="evaluate.route.calibration",
                remedy="lower it, add problems, or set evaluate.route.rule to thresholds of your own",
            )
