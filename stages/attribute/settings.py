"""Settings of the attribute stage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from eopd.stages.models.model_config import read_config
from eopd.stages.models.prompts import Columns, PromptSettings
from eopd.stages.settings import COUNT, ENTRIES, LENGTH, ROUNDS, THREADS, Settings, setting
from eopd.storage.errors import InputError, installing

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]
AttributedRound = Literal["last"] | Annotated[int, Field(ge=0, le=ROUNDS)]
Column = Annotated[str, Field(min_length=1)]


class DocumentColumns(Settings):
    """Column names of the documents."""

    text: str = setting("text", "What the loss is of: a whole document, or with `prompt` the response to it")
    prompt: str | None = setting(
        None, "What precedes the text: read as `prompts` are rendered, and without a loss of its own (null: nothing)"
    )
    id: str | None = setting(None, "A unique id (null: the row's number)")


class DocumentSettings(Settings):
    """A file of documents, each in one bin."""

    path: str = setting(..., "JSONL, Parquet, or a folder saved with save_to_disk (known by content)", keyed=False)
    split: str | None = setting(None, "Split of a folder that holds several")
    limit: int | None = setting(None, "Use the first documents only (null: all)", ge=1, le=COUNT)
    columns: DocumentColumns = setting(DocumentColumns, "Which column holds what")
    # keyed apart: scores of documents do not depend on bins, only their summary does
    bins: tuple[Column, ...] = setting(
        ..., "Columns whose values are a document's bin, such as [topic, format]", keyed=False, min_length=1
    )

    def source(self, prompts: PromptSettings) -> PromptSettings:
        """Return the documents as a prompt source: with prompts of their own, they are rendered as ``prompts`` are."""
        own = self.columns
        plain = PromptSettings(
            path=self.path,
            split=self.split,
            limit=self.limit,
            columns=Columns(prompt=own.text, id=own.id),
            template="plain",
            max_prompt_tokens=LENGTH,
        )
        if own.prompt is None:
            return plain
        return PromptSettings(
            **plain.model_dump(exclude={"columns", "template", "template_arguments", "system", "suffix"}),
            columns=Columns(prompt=own.prompt, id=own.id, response=own.text),
            template=prompts.template,
            template_arguments=prompts.template_arguments,
            system=prompts.system,
            suffix=prompts.suffix,
        )


class RolloutDocuments(Settings):
    """The rollouts of a round as documents."""

    round: int = setting(..., "Round whose stored rollouts are the documents", keyed=False, ge=0, le=ROUNDS)
    bins: tuple[Column, ...] = setting(
        ..., "Columns of the prompts' file whose values are a rollout's bin", keyed=False, min_length=1
    )


class QuerySettings(Settings):
    """A query set: evaluated samples of one benchmark."""

    benchmark: str = setting(..., "Name of a benchmark in evaluate.benchmarks")
    samples: Literal["right", "wrong", "any"] = setting("right", "Samples that its verifier judges so")


class AttributeSettings(Settings):
    """Attribution of evaluated samples to documents, by gradients (TrackStar, arXiv 2410.17413)."""

    documents: DocumentSettings | None = setting(None, "The documents: a file of them, or `rollouts`")
    rollouts: RolloutDocuments | None = setting(None, "In place of `documents`: stored rollouts")
    queries: dict[Name, QuerySettings] = setting(..., "Query sets by name", keyed=False, min_length=1)
    contrasts: tuple[tuple[Name, Name], ...] = setting(
        (), "Pairs of query sets whose standardised scores are subtracted, bin by bin", keyed=False
    )
    rounds: tuple[AttributedRound, ...] = setting(
        ("last",),
        "Students whose gradients are taken, by the round at whose start they stand; 0 is the first student",
        keyed=False,
        min_length=1,
    )
    projection_dim: int = setting(16, "Rows and columns of the random projection of a weight's gradient", ge=1, le=4096)
    downweight: int = setting(
        1000,
        "Common directions of the gradients to weigh down: sets the mix of the two preconditioners",
        ge=1,
        le=COUNT,
    )
    statistics: int = setting(
        10_000, "Documents that the preconditioner is estimated from at most, drawn by `seed`", ge=2, le=COUNT
    )
    min_documents: int = setting(
        20, "Fewest documents of a bin where query sets are contrasted", keyed=False, ge=2, le=COUNT
    )
    permutations: int = setting(
        2000,
        "Random assignments of documents to bins that the bins are tested against",
        keyed=False,
        ge=100,
        le=ENTRIES,
    )
    token_batch: int = setting(
        2048, "Tokens of one backward pass; a model's length at most", keyed=False, ge=8, le=LENGTH
    )
    cpu_threads: int | None = setting(
        None, "Threads on a CPU (null: torch's choice). Tiny models are fastest with 1.", keyed=False, ge=1, le=THREADS
    )

    @model_validator(mode="after")
    def _consistent(self) -> AttributeSettings:
        if (self.documents is None) == (self.rollouts is None):
            raise InputError(
                "attribute reads documents or rollouts",
                setting="attribute.documents",
                remedy="set one of attribute.documents, attribute.rollouts",
            )
        for pair in self.contrasts:
            unknown = next((name for name in pair if name not in self.queries), None)
            if unknown is not None:
                raise InputError(
                    f"attribute.contrasts names {unknown}, and attribute.queries has {', '.join(self.queries)}",
                    setting="attribute.contrasts",
                )
            if pair[0] == pair[1]:
                raise InputError(
                    f"attribute.contrasts compares {pair[0]} with itself",
                    setting="attribute.contrasts",
                    remedy="name two query sets",
                )
        return self

    @property
    def bins(self) -> tuple[str, ...]:
        """The columns that decide a document's bin."""
        documents = self.documents or self.rollouts
        assert documents is not None
        return documents.bins

    def of_round(self, round_: int, rounds: int) -> bool:
        """True if the student at the start of ``round_`` is attributed, in a run of ``rounds`` rounds."""
        return any((rounds if one == "last" else one) == round_ for one in self.rounds)


# -- requirements -----------------------------------------------------------------------------------------------------

# Refusals of the attribute stage before work: a package that is missing, models that bergson would misread.


BERGSON = "2.5"
"""The series of bergson whose scores the stage's keys stand for; its last digit is recorded beside the scores."""


def bergson_version() -> str:
    """Return the version that is installed; empty if there is none."""
    try:
        return version("bergson")
    except PackageNotFoundError:
        return ""


def lacking_bergson() -> InputError | None:
    """Return an error if bergson, in the series that keys stand for, is not installed; names the extra."""
    there = bergson_version()
    if there.startswith(f"{BERGSON}."):
        return None
    state = f"version {there} is" if there else "it is not"
    problem = f"attribute needs bergson {BERGSON}, and {state} installed"
    return InputError(problem, setting="attribute", remedy=f"To add it, {installing('attribution')}")


def check_model(folder: Path) -> None:
    """Refuse models whose weights are not the ones that were trained.

    Raises:
        ValueError: quantised weights; an adapter that was not merged.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"attribute: {folder} holds an adapter beside its model",
            setting="attribute",
            file=folder,
            remedy="merge it, and name the merged folder",
        )
    if read_config(folder).get("quantization_config"):
        raise InputError(
            f"attribute: {folder} is quantised, and gradients of quantised weights are none of the model's",
            setting="attribute",
            file=folder,
        )
