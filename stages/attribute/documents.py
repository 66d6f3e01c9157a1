"""Documents and query sets as token ids with the tokens that have a loss, and the bins of documents.

Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.stages.attribute.settings import AttributeSettings, QuerySettings
from eopd.stages.models import prompt_sources
from eopd.stages.models.prompts import NOT_TRAINED, PromptSettings, load_prompts, render_prompt
from eopd.stages.models.responses import NoResponse, response_ids
from eopd.stages.problems import Problems
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.records import read_rollouts
from eopd.storage.sources import filled_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bin = tuple[str, ...]
"""The values of a document in the columns of bins."""
SAMPLES = ("benchmark", "problem_id", "problem_index", "sample", "response_token_ids", "correct")


@dataclass(frozen=True)
class Text:
    """A document, or a sample of a query set."""

    name: str
    ids: list[int]
    start: int  # tokens before it have no loss

    @property
    def labels(self) -> list[int]:
        """Return the ids, with ``NOT_TRAINED`` for tokens without a loss. Token i is predicted after token i - 1."""
        return [NOT_TRAINED] * self.start + self.ids[self.start :]

    @property
    def losses(self) -> int:
        """Return how many tokens have a loss; nothing predicts the first one."""
        return len(self.ids) - max(self.start, 1)


def read_documents(
    source: PromptSettings, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> Iterator[Text]:
    """Yield the documents of a file, in order (``DocumentSettings.source``).

    Raises:
        ValueError: bad rows, as ``prompts.load_prompts``; a document that cannot be read as tokens, by its id.
    """
    for prompt in load_prompts(source):
        ids = render_prompt(tokenizer, prompt, source)
        if source.columns.response is None:
            yield Text(prompt.id, ids, 0)
            continue
        try:
            response = response_ids(tokenizer, prompt, source, stop_ids)
        except NoResponse as error:
            where, setting = "the text of the document", "attribute.documents"
            raise InputError.of(error, where, setting=setting, file=source.path, prompt=prompt.id) from error
        yield Text(prompt.id, ids + response, len(ids))


def read_rollout_documents(rollouts: Artifact) -> Iterator[Text]:
    """Yield stored rollouts as documents, in order."""
    columns = ("prompt_id", "sample", "prompt_token_ids", "response_token_ids")
    for part in filled_parts(rollouts):
        for row in read_rollouts(rollouts.part_folder(part), columns).to_pylist():
            prompt = row["prompt_token_ids"]
            yield Text(f"{row['prompt_id']}/{row['sample']}", prompt + row["response_token_ids"], len(prompt))


def read_queries(evaluation: Artifact, query: QuerySettings, problems: Problems) -> Iterator[Text]:
    """Yield the samples of a query set, in the evaluation's order."""
    for part in filled_parts(evaluation):
        for row in evaluations.SAMPLES.read(evaluation.part_folder(part), SAMPLES).to_pylist():
            wanted = query.samples == "any" or row["correct"] is (query.samples == "right")
            if row["benchmark"] == query.benchmark and wanted:
                prompt = problems.ids(row["benchmark"], row["problem_id"], row["problem_index"])
                yield Text(f"{row['problem_id']}/{row['sample']}", prompt + row["response_token_ids"], len(prompt))


def check_texts(what: str, texts: Sequence[Text], longest: int) -> None:
    """Refuse texts without a gradient, and those that the model cannot read whole.

    Raises:
        ValueError: names the first one.
    """
    for text in texts:
        if text.losses < 1:
            raise InputError(
                f"{what}: {text.name!r} has no token with a loss, so it has no gradient",
                setting=what,
                prompt=text.name,
                remedy="remove it",
            )
        if len(text.ids) > longest:
            raise InputError(
                f"{what}: {text.name!r} has {len(text.ids):,} tokens, and {longest:,} are read at most (the model's "
                "length, or attribute.token_batch)",
                setting=what,
                prompt=text.name,
                remedy="shorten or split it, or raise attribute.token_batch",
            )


def bins_of_file(settings: AttributeSettings, prompts: PromptSettings) -> list[Bin]:
    """Return the bin of every row of the documents, or of the prompts where rollouts are the documents.

    Raises:
        ValueError: no such column; a row without a value there, or with a list or struct; one bin for all rows.
    """
    source = prompts if settings.documents is None else settings.documents
    bins = []
    for row in prompt_sources.read(Path(source.path), source.split, settings.bins, source.limit):
        values = [row.values[column] for column in settings.bins]
        for column, value in zip(settings.bins, values, strict=True):
            if not isinstance(value, (bool, int, float, str)) or value == "":
                given = "no value" if value in (None, "") else type(value).__name__
                raise row.refusal(column, f"has {given}, and every document needs a bin")
        bins.append(tuple(map(str, values)))
    if len(set(bins)) < 2:
        raise InputError(
            f"{source.path}: the columns {', '.join(settings.bins)} put all documents into one bin, so there is "
            "nothing to compare",
            setting="attribute.documents.bins" if settings.documents else "attribute.rollouts.bins",
            file=source.path,
            remedy="name others",
        )
    return bins


def read_bins(settings: AttributeSettings, prompts: PromptSettings, rollouts: Artifact | None) -> list[tuple[str, Bin]]:
    """Return the id and the bin of every document, in order. Raises ValueError, as ``bins_of_file``."""
    bins = bins_of_file(settings, prompts)
    if settings.documents is not None:
        names = [prompt.id for prompt in load_prompts(settings.documents.source(prompts))]
        return list(zip(names, bins, strict=True))
    assert rollouts is not None
    named = []
    for part in filled_parts(rollouts):
        for row in read_rollouts(rollouts.part_folder(part), ("prompt_id", "sample", "prompt_index")).to_pylist():
            named.append((f"{row['prompt_id']}/{row['sample']}", bins[row["prompt_index"]]))
    return named


def check_bins(settings: AttributeSettings, bins: Sequence[Bin]) -> None:
    """Refuse to contrast query sets over bins of fewer than `attribute.min_documents`. Raises ValueError."""
    if not settings.contrasts:
        return
    name, count = min(Counter(bins).items(), key=lambda item: item[1])
    if count < settings.min_documents:
        raise InputError(
            f"attribute.contrasts: the bin {' / '.join(name)} has {count} documents, and attribute.min_documents is "
            f"{settings.min_documents}",
            setting="attribute.contrasts",
            remedy="lower it, add documents, or name other columns of bins",
        )
