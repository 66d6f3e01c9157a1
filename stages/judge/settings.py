"""Settings of the judge stage."""

from __future__ import annotations

from typing import Literal

from eopd.stages.settings import DAY, PROCESSES, Settings, setting


class JudgeSettings(Settings):
    """Settings of judging rollouts with the verifier of the prompts (`prompts.verifier`)."""

    text: Literal["response"] = setting("response", "The text to judge: the whole response")
    seconds_per_answer: float = setting(10.0, "Time limit of the math verifier for one answer", gt=0.0, le=DAY)
    verifier_workers: int = setting(2, "Processes of the math verifier", keyed=False, ge=1, le=PROCESSES)
