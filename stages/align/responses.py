"""Samples of an evaluation as teacher and student read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eopd.stages.align.job import AlignmentJob
from eopd.stages.models.packing import Sequence
from eopd.stages.models.prompts import Prompt, PromptTable, load_prompts, render_prompt
from eopd.stages.models.teacher_prompts import Context, donors, teacher_context
from eopd.storage import records as evaluations
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ["benchmark", "problem_id", "problem_index", "sample", "response_token_ids"]


@dataclass(frozen=True)
class Responses:
    """The responses to read from one part of an evaluation; all lists in the samples' order."""

    names: list[tuple[str, str, int]]  # benchmark, problem id, sample
    student: list[Sequence]
    teacher: list[Sequence]
    cut: int  # responses whose first tokens alone fit into both models

    @property
    def tokens(self) -> int:
        return sum(len(sequence.response_ids) for sequence in self.student)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that either model reads."""
        return max((one.input_length for one in (*self.student, *self.teacher)), default=1)


class ResponseReader:
    """Renders prompts once and truncates responses that are too long."""

    def __init__(
        self,
        job: AlignmentJob,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        limits: tuple[int | None, int | None],
    ) -> None:
        """``limits``: most tokens that student and teacher can read."""
        self._job, self._student, self._teacher, self._limits = job, student, teacher, limits
        self._tables: dict[str, PromptTable] = {}
        self._contexts: dict[tuple[str, str], tuple[Context, Context]] = {}

    def read(self, evaluation: Artifact, part: int) -> Responses:
        """Read the first samples of the first problems of a part, as the settings say.

        Raises:
            ValueError: a problem, by id, that is no longer in its benchmark or cannot be rendered for the teacher.
        """
        settings = self._job.settings.alignment
        assert settings is not None
        responses = Responses([], [], [], 0)
        cut = 0
        for row in evaluations.SAMPLES.read(evaluation.part_folder(part), COLUMNS).to_pylist():
            late = settings.limit is not None and row["problem_index"] >= settings.limit
            if late or row["sample"] >= settings.samples:
                continue
            own, theirs = self._contexts_of(row["benchmark"], row["problem_id"], row["problem_index"])
            response = row["response_token_ids"]
            stops = self._job.stop_ids
            room = min(
                context.length_that_fits(response, stops, limit)
                for context, limit in zip((own, theirs), self._limits, strict=True)
            )
            cut += room < len(response)
            response = response[:room]
            responses.names.append((row["benchmark"], row["problem_id"], row["sample"]))
            responses.student.append(Sequence(own.ids(response, stops), response))
            responses.teacher.append(Sequence(theirs.ids(response, stops), response))
        return Responses(responses.names, responses.student, responses.teacher, cut)

    def _contexts_of(self, benchmark: str, problem: str, index: int) -> tuple[Context, Context]:
        key = (benchmark, problem)
        if key not in self._contexts:
            settings = next(one for one in self._job.settings.benchmarks if one.name == benchmark)
            source = self._job.settings.prompts_of(settings)
            if benchmark not in self._tables:
                self._tables[benchmark] = load_prompts(source)
            (prompt,) = self._tables[benchmark].rows([index])
            where = f"benchmark {benchmark}, problem {problem!r}"
            if prompt.id != problem:
                raise InputError(
                    f"{where} is now {prompt.id!r}: the benchmark changed since it was evaluated",
                    setting="evaluate.benchmarks",
                    file=source.path,
                    prompt=problem,
                    remedy="plan the run again",
                )
            own = render_prompt(self._student, prompt, source)
            theirs = self._as_the_teacher_reads(prompt, own, self._shown(benchmark, index), where)
            if not theirs.ids((), ()):
                reason = f"{where} has no tokens as the teacher reads it"
                raise InputError(reason, file=source.path, prompt=problem)
            self._contexts[key] = Context((tuple(own),)), theirs
        return self._contexts[key]

    def _shown(self, benchmark: str, index: int) -> dict[str, str | None]:
        """Texts of the placeholders of a problem."""
        settings, table = self._job.teacher_prompt, self._tables[benchmark]
        if settings.shuffled:
            index = donors(range(len(table)), self._job.seed, benchmark)[index]
        return {name: table[index].value(name) for name in settings.values_needed}

    def _as_the_teacher_reads(
        self, prompt: Prompt, own: list[int], shown: dict[str, str | None], where: str
    ) -> Context:
        settings = self._job.teacher_prompt
        source = {"same": None, "template": prompt.messages_json, "column": prompt.teacher_prompt}[settings.kind]
        if source is None and settings.kind != "same":
            raise InputError(
                f"{where}: score.teacher_prompt.kind is column, but evaluate.benchmarks names no "
                "columns.teacher_prompt",
                setting="evaluate.benchmarks",
            )
        return teacher_context(source, own, settings, self._teacher, shown, where)
