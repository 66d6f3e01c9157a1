"""Settings of the student and the teachers: which model, which student of another run, or which capture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eopd.stages.settings import ENTRIES, ROUNDS, Settings, setting
from eopd.storage.codec import MAX_ID
from eopd.storage.errors import InputError
from eopd.storage.teacher_record import HeadRule

TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]
"""The name of one of several teachers, as it stands in the prompts' column."""


class ModelSettings(Settings):
    path: str | None = setting(
        None, "Folder of a causal LM in Hugging Face format, a GGUF file, or a hub id.", keyed=False
    )
    run: str | None = setting(
        None,
        "In place of `path`: another run, by its name below `runs` or by its config. The model is a student of that "
        "run, in the same store; its key is known before it is trained.",
        keyed=False,
    )
    round: int | None = setting(
        None,
        "With `run`: which of its students, as `eopd student` counts them. None: the last.",
        keyed=False,
        ge=1,
        le=ROUNDS,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the weights when sampling or scoring; auto is the checkpoint's own."
    )
    revision: str | None = setting(None, "Hub commit or tag. Only a commit pins the weights.", keyed=False)
    tokenizer: str | None = setting(None, "Folder or hub id of the tokenizer if it is not in `path`.", keyed=False)
    trust_remote_code: bool = setting(False, "Run Python code that comes with the checkpoint. Off unless you trust it.")

    @model_validator(mode="after")
    def _one_model_is_named(self) -> ModelSettings:
        ways = [name for name in ("path", "run", "student", "capture", "by_prompt") if name in type(self).model_fields]
        named = [name for name in ways if getattr(self, name) is not None]
        if len(named) != 1:
            cure = "; set the others to null" if named else ""
            raise InputError(f"name the model by one of {', '.join(ways)}; got {' and '.join(named) or 'none'}{cure}")
        others = {
            "path": ("round", "renewed"),
            "run": ("renewed",),
            "student": ("round",),
            "capture": ("round", "renewed"),
            "by_prompt": ("round", "renewed"),
        }[named[0]]
        if named[0] != "path":
            others += ("dtype", "revision", "tokenizer", "trust_remote_code")
        fields = type(self).model_fields
        ignored = [name for name in others if name in fields and getattr(self, name) != fields[name].default]
        if ignored:
            raise InputError(
                f"{', '.join(ignored)} has no effect on a model that is named by {named[0]}", setting=ignored[0]
            )
        return self


class StudentSettings(ModelSettings):
    sft_teacher: str | None = setting(
        None,
        "Model (folder or hub id) that wrote the student's supervised data, if known. lightning_opd assumes that it is "
        "the teacher and warns otherwise.",
        keyed=False,
    )


class CaptureSettings(Settings):
    """Top-k log-probs of a teacher, captured by another tool, in place of a teacher that scores."""

    path: str = setting(
        ...,
        "Parquet file; its row i holds the sequence of row i of `prompts.path`, and a top-k list a token",
        keyed=False,
    )
    ids: str | None = setting(None, "Column of the token ids. None: input_ids")
    top_ids: str | None = setting(
        None, "Column of the lists of top-k ids. None: target_token_ids (axolotl), or else top_indices (DistillKit)"
    )
    top_logprobs: str | None = setting(None, "Column of their log-probs. None: target_logprobs, or else top_values")
    mask: str | None = setting(None, "Column of 0 for entries that are not there. None: target_mask, if there is one")
    shifted: bool = setting(True, "Position t predicts token t + 1; false: token t, as in vLLM's prompt log-probs")
    top_k: int = setting(
        1, "Entries that every token has at least, for objectives that read the k most probable ids", ge=1, le=ENTRIES
    )

    vocab_size: int | None = setting(
        None, "Rows of the teacher's vocabulary, beyond which ids are refused. None: not checked", ge=1, le=MAX_ID
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @property
    def named(self) -> dict[str, str]:
        """The columns that are named, by the fields of ``exchange.CaptureColumns``."""
        columns = {"ids": self.ids, "top_ids": self.top_ids, "top_logprobs": self.top_logprobs, "mask": self.mask}
        return {name: column for name, column in columns.items() if column is not None}

    def rule(self) -> HeadRule:
        return HeadRule(k_max=self.top_k, full_head_above=-1.0, draws="none")


class TeacherSettings(ModelSettings):
    student: Literal["initial", "latest"] | None = setting(
        None,
        "In place of `path`: the run's own student. initial: as it was before training; latest: at the start of the "
        "round, or of the last round that renews the teacher.",
    )
    renewed: int | None = setting(
        None, "With student: latest: renew the teacher every this many rounds. None: each round.", ge=1, le=ROUNDS
    )

    capture: CaptureSettings | None = setting(
        None,
        "In place of `path`: the top-k log-probs of a teacher, captured by another tool, for responses that come with "
        "the prompts (`rollout.source: data`). The name of the file is short for `capture.path`.",
    )

    by_prompt: dict[TeacherName, ModelSettings] | None = setting(
        None,
        "In place of `path`: several teachers by name, of which `prompts.columns.teacher` names one for each prompt. "
        "Each has score artifacts of its own, and a round trains on all of them. The setting `teachers` is short for "
        "it.",
        keyed=False,
        min_length=1,
    )

    @property
    def has_own_model(self) -> bool:
        """False if the teacher is the run's student, or a capture."""
        return self.student is None and self.capture is None

    @model_validator(mode="after")
    def _the_initial_student_stays(self) -> TeacherSettings:
        if self.student == "initial" and self.renewed is not None:
            raise InputError(
                "renewed has no effect with student: initial, which stays as it is",
                setting="renewed",
                remedy="set student: latest",
            )
        return self
