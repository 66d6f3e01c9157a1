"""Inputs of the score stage, and a part's rollouts as the teacher reads them: contexts, truncated responses, identities
for the draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eopd.stages.engines.kept import Engines
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.packing import Sequence
from eopd.stages.models.prompts import PromptSettings, load_prompts
from eopd.stages.models.teacher_prompts import SIBLING, VERDICT, Context, TeacherPromptSettings, donors, teacher_context
from eopd.stages.score.settings import ScoreSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError
from eopd.storage.files import canonical_json
from eopd.storage.records import read_rollouts
from eopd.storage.student_topk import StudentTopk, read_student_topk
from eopd.storage.verdict_signal import read_correct

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoreJob:
    """Scoring of rollouts with the teacher: part i of ``output`` comes from part i of ``rollouts``."""

    output: Artifact
    parts: SequenceOf[int]
    settings: ScoreSettings
    progress: Progress
    log_dir: Path
    rollouts: Artifact
    teacher: ModelRef
    student_tokenizer: str  # folder or hub id: its ids must mean the same bytes as the teacher's
    stop_ids: tuple[int, ...]  # union of student's and teacher's
    rollout_temperature: float
    student_topk: Artifact | None = None  # the student's own top-k: ids whose teacher log-probs are stored too
    prompts: PromptSettings | None = None  # the prompt source, where contexts hold solutions
    prompt_rows: frozenset[int] | None = None  # the prompts whose responses are scored, by their rows; None: all
    verdicts: Artifact | None = None  # on the rollouts, where contexts depend on them
    seed: int = 0  # of score.teacher_prompt.shuffled
    engines: Engines = field(default_factory=Engines)


@dataclass(frozen=True)
class PartResponses:
    """The responses of one part to score, in the rollouts' order."""

    sequences: list[Sequence]  # responses cut to what the teacher can read
    identities: NDArray[np.int64]  # [S, 3] prompt index, sample, seed: what the draws are seeded by
    names: list[str]  # for errors
    truncated: int  # responses that were cut
    copies: int  # how many responses a context holds
    without_sibling: int  # responses that lack the right sibling that their context would show
    topk: StudentTopk | None

    @property
    def tokens(self) -> int:
        """Response tokens to score."""
        return sum(len(sequence.response_ids) for sequence in self.sequences)

    @property
    def tokens_read(self) -> int:
        """Response tokens to score, plus their copies in the contexts."""
        return self.tokens * (1 + self.copies)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the teacher reads; 0 if there is nothing to score."""
        return max((sequence.input_length for sequence in self.sequences if len(sequence.response_ids)), default=0)

    def extra_ids(self, response: int) -> NDArray[np.int64]:
        """Return the student's own top ids at the scored positions of a response: [T, k]."""
        assert self.topk is not None
        start = int(self.topk.lengths[:response].sum())
        return self.topk.ids[start : start + len(self.sequences[response].response_ids)].astype(np.int64)


def read_part(job: ScoreJob, part: int, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> PartResponses:
    """Read and render a part.

    A sequence longer than ``limit`` tokens is refused, or its response cut to its first tokens that fit: to none
    where the context alone does not. Copies of the response in its context are cut alike.

    Raises:
        ValueError: a context that cannot be rendered; a sequence too long; a student top-k of other lengths.
    """
    where = f"{job.rollouts} part {part}"
    table = read_rollouts(job.rollouts.part_folder(part), [*COLUMNS, "seed", "correct"])
    correct: list[bool] = table.column("correct").to_pylist() if "correct" in table.schema.names else []
    if job.verdicts is not None:
        correct = read_correct(job.verdicts, job.rollouts, part, table)
    sources = Sources(job.prompts, correct, job.stop_ids, (job.seed, part))
    contexts = _contexts(job, table, tokenizer, where, sources)
    responses: list[list[int]] = table.column("response_token_ids").to_pylist()
    numbers = np.stack([table.column(name).to_numpy() for name in ("prompt_index", "sample", "seed")], axis=1)
    prompt_ids = table.column("prompt_id").to_pylist()
    names = [f"prompt {name!r} sample {sample}" for name, sample in zip(prompt_ids, numbers[:, 1], strict=True)]
    topk = _student_topk(job, part, [len(response) for response in responses])
    sequences, truncated = [], 0
    for context, response, name in zip(contexts, responses, names, strict=True):
        length = context.length_that_fits(response, job.stop_ids, limit)
        if length < len(response) and context.scored and job.settings.too_long == "refuse":
            whole = Sequence(context.ids(response, job.stop_ids), response)
            raise InputError(
                f"{where}: {name} has {whole.input_length} tokens to read ({len(whole.context_ids)} of context), "
                f"more than the teacher's {limit}",
                setting="score.max_tokens",
                remedy="set score.too_long: truncate to score what fits, or shorten rollout.max_new_tokens",
            )
        truncated += length < len(response) and context.scored
        response = response[:length]
        sequences.append(Sequence(context.ids(response, job.stop_ids), response))
    copies = job.settings.teacher_prompt.copies
    alone = sum(context.without_sibling for context in contexts)
    return PartResponses(sequences, numbers.astype(np.int64), names, truncated, copies, alone, topk)


def _contexts(
    job: ScoreJob, table: pa.Table, tokenizer: PreTrainedTokenizerBase, where: str, sources: Sources
) -> list[Context]:
    """Render the context of each rollout; responses to another teacher's prompts have one that is not scored."""
    if job.prompt_rows is None:
        return render_contexts(table, job.settings.teacher_prompt, tokenizer, where, sources)
    own = [row in job.prompt_rows for row in table.column("prompt_index").to_pylist()]
    correct = [right for right, is_own in zip(sources.correct, own, strict=bool(sources.correct)) if is_own]
    mine, sources = table.filter(pa.array(own, pa.bool_())), replace(sources, correct=correct)
    rendered = iter(render_contexts(mine, job.settings.teacher_prompt, tokenizer, where, sources))
    others = (Context((tuple(ids),), scored=False) for ids in table.column("prompt_token_ids").to_pylist())
    return [next(rendered) if is_own else other for is_own, other in zip(own, others, strict=True)]


def _student_topk(job: ScoreJob, part: int, lengths: list[int]) -> StudentTopk | None:
    if job.student_topk is None:
        return None
    topk = read_student_topk(job.student_topk.part_folder(part))
    if topk.lengths.tolist() != lengths:
        raise InputError(
            f"{job.student_topk} part {part} is not of these rollouts: its responses have other lengths", part=part
        )
    return topk


# -- the teacher's contexts -------------------------------------------------------------------------------------------

# The teacher's context: a rollout's prompt as the teacher reads it. The student's response ids follow it.


COLUMNS = (
    *("prompt_id", "prompt_index", "sample", "messages", "answer", "teacher_prompt"),
    *("prompt_token_ids", "response_token_ids"),
)
"""Columns of the rollout record that a context may be made of."""


def context_name(settings: TeacherPromptSettings) -> str:
    """Return how contexts were rendered, for the cache's header: canonical JSON."""
    used = {"placeholders": list(settings.used)} if settings.used else {}
    return canonical_json({**settings.semantic(), **used})


@dataclass(frozen=True)
class Sources:
    """Sources of the placeholders' values, besides the rollouts."""

    prompts: PromptSettings | None = None  # the prompt source, which holds the solutions
    correct: SequenceOf[bool] = ()  # verdicts on the rollouts
    stop_ids: Collection[int] = ()
    shuffle: tuple[int, ...] = ()  # a seed and a path below it, for ``shuffled``


@dataclass(frozen=True)
class _Shown:
    """The values that the teacher is shown of one rollout, besides its prompt."""

    values: dict[str, str | None] = field(default_factory=dict)
    sibling: tuple[int, ...] = ()
    lacks_sibling: bool = False


def render_contexts(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    sources: Sources | None = None,
) -> list[Context]:
    """Render the context of each rollout.

    Args:
        rollouts: with the columns ``COLUMNS``.
        where: what to call the table in errors.
    Raises:
        ValueError: a prompt, by its id, that has no messages, no column, no answer or solution that the context shows,
            several messages for template: plain, or no tokens at all; a teacher without a chat template.
    """
    shown = _shown(rollouts, settings, tokenizer, where, sources or Sources())
    name = {"same": None, "template": "messages", "column": "teacher_prompt"}[settings.kind]
    texts = [None] * len(rollouts) if name is None else rollouts.column(name).to_pylist()
    ids = rollouts.column("prompt_token_ids").to_pylist()
    rendered: dict[object, Context] = {}  # the samples of one prompt often share it
    contexts = []
    for prompt_id, source, own, seen in zip(rollouts.column("prompt_id").to_pylist(), texts, ids, shown, strict=True):
        if seen.lacks_sibling:
            contexts.append(Context((tuple(own),), without_sibling=True, scored=settings.otherwise == "same"))
            continue
        if source is None and name is not None:
            missing = "messages" if name == "messages" else "text in the teacher_prompt column"
            raise InputError(
                f"{where}: prompt {prompt_id!r} has no {missing}, of which its teacher context is made",
                setting="score.teacher_prompt",
                prompt=prompt_id,
            )
        key = (source, tuple(own) if name is None else None, seen.sibling, *seen.values.values())
        if key not in rendered:
            place = f"{where}: prompt {prompt_id!r}"
            try:
                context = teacher_context(source, own, settings, tokenizer, seen.values, place, seen.sibling)
            except InputError as error:
                raise InputError.of(error, prompt=prompt_id) from error
            if not context.ids((), ()):
                raise InputError(
                    f"{where}: prompt {prompt_id!r} has an empty teacher context, so nothing predicts the first "
                    "response token",
                    setting="score.teacher_prompt",
                    prompt=prompt_id,
                    remedy="use a teacher_prompt that writes at least one token",
                )
            rendered[key] = context
        contexts.append(rendered[key])
    return contexts


def _shown(
    rollouts: pa.Table,
    settings: TeacherPromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    sources: Sources,
) -> list[_Shown]:
    """Return the values shown with each rollout; with ``shuffled``, those of rollouts to another prompt."""
    if not {*settings.values_needed, *settings.judged} or not len(rollouts):
        return [_Shown()] * len(rollouts)
    prompts: list[int] = rollouts.column("prompt_index").to_pylist()
    try:
        whose = donors(prompts, *sources.shuffle) if settings.shuffled else {prompt: prompt for prompt in prompts}
    except ValueError as error:
        raise InputError.of(error, where, remedy="raise rollout.rows_per_part") from error
    of_prompt = _of_prompts(rollouts, settings, prompts, where, sources)
    shown = [_Shown(dict(of_prompt.get(whose[prompt], {}))) for prompt in prompts]
    if not settings.judged:
        return shown
    samples, responses = (rollouts.column(name).to_pylist() for name in ("sample", "response_token_ids"))
    rows_of: dict[int, list[int]] = defaultdict(list)  # rows of a prompt's responses, by sample
    for row in sorted(range(len(prompts)), key=lambda row: (samples[row], row)):
        rows_of[prompts[row]].append(row)
    for row, prompt in enumerate(prompts):
        others = rows_of[whose[prompt]]
        values, sibling = shown[row].values, ()
        if settings.verdicts is not None:
            judged = others[rows_of[prompt].index(row) % len(others)]
            values[VERDICT] = settings.verdicts.right if sources.correct[judged] else settings.verdicts.wrong
        if SIBLING in settings.judged:
            right = next(
                (other for other in others if sources.correct[other] and other != row and responses[other]), None
            )
            if right is None:
                shown[row] = _Shown(lacks_sibling=True)
                continue
            ids = responses[right]
            sibling = tuple(ids[:-1] if ids[-1] in sources.stop_ids else ids)
            values[SIBLING] = str(tokenizer.decode(list(sibling), skip_special_tokens=True))
        shown[row] = _Shown(values, sibling)
    return shown


def _of_prompts(
    rollouts: pa.Table, settings: TeacherPromptSettings, prompts: list[int], where: str, sources: Sources
) -> dict[int, dict[str, str | None]]:
    """Return answer and solution of every prompt, as far as they are shown."""
    by_prompt: dict[int, dict[str, str | None]] = defaultdict(dict)
    if "solution" in settings.values_needed:
        assert sources.prompts is not None, where
        for prompt in load_prompts(sources.prompts).rows(list(dict.fromkeys(prompts))):
            by_prompt[prompt.index]["solution"] = prompt.solution
    if "answer" in settings.values_needed:
        for row, answer in zip(prompts, rollouts.column("answer").to_pylist(), strict=True):
            by_prompt[row]["answer"] = answer
    return by_prompt
