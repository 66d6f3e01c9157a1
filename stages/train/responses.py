"""A round's responses for training: token ids, places of their scores, and the sampler's log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eopd.stages.models.packing import Sequence as TokenSequence
from eopd.stages.rollout.settings import OFF_POLICY, Source
from eopd.stages.train.job import COLUMNS as SELECTED_BY
from eopd.stages.train.job import Candidate, Selection
from eopd.stages.train.objectives.base import Objective
from eopd.stages.train.settings import TrainedTokens
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart, InputError
from eopd.storage.records import Writer, read_rollouts
from eopd.storage.sources import ScoreSource, filled_parts
from eopd.storage.teacher_cache import JointCache
from eopd.storage.teacher_record import TeacherRows

COLUMNS = ("prompt_id", "sample", "prompt_token_ids", "response_token_ids", "logprobs", "written")


@dataclass(frozen=True)
class Responses:
    """The responses of a round that are trained on, in the order of the rollouts. Each has a token to train on."""

    names: tuple[str, ...]  # "prompt id/sample"
    sequences: tuple[TokenSequence, ...]  # response cut to its scored tokens
    locations: tuple[tuple[int, int], ...]  # (part, row) in the teacher cache
    sampler_logprobs: tuple[NDArray[np.float32] | None, ...]
    offsets: NDArray[np.int64]  # [S+1] rows of response s in arrays over the whole round
    written: NDArray[np.int8]  # [T] writer of each token (``storage.rollouts.Writer``)
    trained: NDArray[np.bool_] | None = None  # [T] tokens that are trained on; None: all
    left_out: int = 0  # responses without such a token
    selection: str | None = None  # how many of the round's responses these are, in words; None: all

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Sampled ids [T] of the whole round."""
        return np.concatenate([np.asarray(sequence.response_ids, np.int64) for sequence in self.sequences])

    def tokens_of(self, number: int) -> int:
        """Return how many tokens of a response are trained on."""
        span = slice(self.offsets[number], self.offsets[number + 1])
        return int(span.stop - span.start if self.trained is None else self.trained[span].sum())

    def rows_of(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """Return indices [T] into a per-token array of the round, for responses ``numbers`` one after the other."""
        spans = [np.arange(self.offsets[number], self.offsets[number + 1]) for number in numbers]
        return np.concatenate(spans) if spans else np.zeros(0, np.int64)


Region = Callable[[NDArray[np.int8]], NDArray[np.bool_]]
"""Tokens of a response that are trained on, by their writers."""


def region_of(tokens: TrainedTokens, source: Source) -> Region | None:
    """Return the tokens that `train.tokens` names; None: all.

    Of responses that the student revises, `all` and `after_text` take those with a revision.
    """
    match tokens:
        case "own" if source in ("mixed", "revise"):
            return lambda written: (written != Writer.TEXT) & (written != Writer.EXPERT)
        case "all" if source == "revise":
            return lambda written: np.full(len(written), (written == Writer.TEXT).any())
        case "after_text":
            return _after_text
        case _:
            return None


def _after_text(written: NDArray[np.int8]) -> NDArray[np.bool_]:
    texts = np.flatnonzero(written == Writer.TEXT)
    return np.arange(len(written)) > (texts[-1] if len(texts) else len(written))


def load_responses(
    rollouts: Artifact,
    cache: JointCache | None,
    selection: Selection | None = None,
    region: Region | None = None,
) -> Responses:
    """Read every part of ``rollouts`` and the lengths that were scored; parts that were set aside are left out.

    Args:
        cache: None if no scores are read: then all tokens are trained on.
        selection: which of the responses with such a token are trained on; None: all.
        region: which of the tokens are trained on; None: all.

    Raises:
        InputError: nothing to train on.
        DamagedPart: scores or verdicts that were made from other rollouts than these.
    """
    columns = COLUMNS if selection is None else tuple(dict.fromkeys((*COLUMNS, *SELECTED_BY)))
    candidates: list[Candidate] = []
    names, sequences, locations, sampler, written, trained = [], [], [], [], [], []
    left_out = 0
    for part in filled_parts(rollouts) if cache is None else cache.parts():
        for scores in () if cache is None else cache.sources(part):
            _check_same_rollouts(rollouts, scores, part)
        stored = read_rollouts(rollouts.part_folder(part), columns)
        table = stored.to_pydict()
        if cache is not None:
            lengths = cache.token_counts(part).tolist()
        else:
            lengths = [len(ids) for ids in table["response_token_ids"]]
        of_part = [] if selection is None else selection.candidates(rollouts, part, stored)
        for row, length in enumerate(lengths):
            writers = np.asarray(table["written"][row], np.int8)
            mask = np.ones(length, bool) if region is None else region(writers)[:length]
            if not mask.any():
                left_out += bool(length)
                continue
            candidates += of_part[row : row + 1]
            names.append(f"{table['prompt_id'][row]}/{table['sample'][row]}")
            sequences.append(TokenSequence(table["prompt_token_ids"][row], table["response_token_ids"][row][:length]))
            locations.append((part, row))
            logprobs = table["logprobs"][row]
            sampler.append(None if logprobs is None else np.asarray(logprobs[:length], np.float32))
            written.append(writers[:length])
            trained.append(mask)
    if not names:
        problem = f"{rollouts} holds no response with a token to train on"
        raise InputError(problem, setting="train.tokens", artifact=str(rollouts))
    chosen, words = (range(len(names)), None) if selection is None else selection.choose(candidates)
    offsets = np.cumsum([0, *(len(sequences[number].response_ids) for number in chosen)], dtype=np.int64)
    return Responses(
        names=tuple(names[number] for number in chosen),
        sequences=tuple(sequences[number] for number in chosen),
        locations=tuple(locations[number] for number in chosen),
        sampler_logprobs=tuple(sampler[number] for number in chosen),
        offsets=offsets,
        written=np.concatenate([written[number] for number in chosen]),
        trained=None if region is None else np.concatenate([trained[number] for number in chosen]),
        left_out=left_out,
        selection=words,
    )


def refuse_truncated_sampling(objective: Objective, truncated: bool) -> None:
    """Refuse top-p, top-k and min-p: they draw from another distribution than the one whose log-probs stand for q_old.

    Raises:
        ValueError: one of them was used, and the objective reads q_old.
    """
    if not truncated or "q_old" not in objective.per_round:
        return
    raise InputError(
        f"objective {objective.name!r} weighs tokens by the policy that drew them, but rollout.top_p, rollout.top_k "
        "or rollout.min_p cut that policy's distribution, of which its log-probs at the round's start say nothing",
        setting="rollout.top_p",
        remedy="Sample with rollout.top_p=1, rollout.top_k=0 and rollout.min_p=0, or choose an objective without "
        "log-probs of the round's start (train.objective.advantage=current with train.objective.ratio=none, or a "
        "divergence).",
    )


def refuse_other_writers(objective: Objective, source: Source) -> None:
    """Refuse responses that the student did not write, where the objective reads log-probs of when it wrote them.

    Raises:
        ValueError: names the figures of the round's start that there are not.
    """
    missing = sorted(objective.per_round - {"token_key"})
    if source in OFF_POLICY and missing:
        raise InputError(
            f"objective {objective.name!r} reads {', '.join(missing)}, of the student at the round's start, and with "
            f"rollout.source: {source} the responses are not its samples",
            setting="rollout.source",
            remedy="take another objective, or rollout.source: student",
        )


def check_alignment(responses: Responses, numbers: Sequence[int], rows: TeacherRows) -> None:
    """Check that the teacher's rows are for exactly these tokens.

    Raises:
        DamagedPart: they are not; names the response.
    """
    for place, number in enumerate(numbers):
        start, stop = rows.response_offsets[place], rows.response_offsets[place + 1]
        expected = np.asarray(responses.sequences[number].response_ids)
        if not np.array_equal(rows.token_ids[start:stop], expected):
            raise DamagedPart(
                f"response {responses.names[number]}: the teacher cache holds scores of other tokens than the rollout's"
            )


def _check_same_rollouts(rollouts: Artifact, scores: ScoreSource, part: int) -> None:
    scored = scores.marker(part).inputs.get("rollouts")
    checksum = rollouts.marker(part).checksum
    if scored is not None and scored != checksum:
        raise DamagedPart(
            f"{scores} part {part} was scored from rollouts with checksum {scored[:12]}, but {rollouts} part {part} "
            f"has {checksum[:12]}",
            part=part,
            remedy="`eopd store verify --repair` re-queues the scores.",
        )
