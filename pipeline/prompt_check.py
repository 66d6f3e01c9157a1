"""Trial rendering of prompt sources through templates before any work, without transformers or torch.

One prompt of each shape (roles, fields, tools) of each source is rendered as the student reads it and, where the
teacher reads it too, as the teacher does. `eopd doctor` shows the first of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.stages.models.chat_templates import ChatTemplate, Conversation, check_arguments, write_conversation
from eopd.stages.models.prompts import Prompt, PromptSettings, given_ids, load_prompts, student_conversation
from eopd.stages.models.teacher_prompts import TeacherPromptSettings, opening_text, teacher_conversation
from eopd.stages.rollout.settings import ExpertSettings
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from eopd.pipeline.run import Run

FIRST_ROWS = 1000
"""Rows of a source that interactive commands read."""


@dataclass(frozen=True)
class Source:
    """A prompt source, and how the models read it."""

    setting: str
    prompts: PromptSettings
    teacher: TeacherPromptSettings | None  # None: the teacher does not read it
    expert: ExpertSettings | None = None  # None: no rollouts are mixed
    rows: frozenset[int] | None = None  # that the teacher answers for; None: all
    mode: str = ""  # of `evaluate.modes`

    @property
    def name(self) -> str:
        return f"{self.setting} in evaluate.modes.{self.mode}" if self.mode else self.setting

    def refusal(self, error: Exception, prompt: Prompt | None = None, reader: str = "") -> ConfigError:
        """Return an error about this source, or about one of its prompts as ``reader`` reads it."""
        mode = f"in evaluate.modes.{self.mode}" if self.mode else ""
        which = "" if prompt is None else f"prompt {prompt.id!r} {reader}"
        where = ": ".join(filter(None, (mode, which)))
        return ConfigError.of(error, where, setting=self.setting, prompt=None if prompt is None else prompt.id)


@dataclass(frozen=True)
class Reader:
    """A model that reads prompts."""

    role: str
    tokenizer: Path
    trusted: bool  # its tokenizer may be custom code, which is not loaded here


@dataclass(frozen=True)
class Rendered:
    """A prompt as a model reads it."""

    source: str
    reader: str
    text: str


def sources_of(settings: RunSettings) -> Iterator[Source]:
    """Return the sources of a run: the prompts, every benchmark, and documents of attribution."""
    expert = settings.rollout.mixed.expert if settings.rollout.source == "mixed" else None
    yield Source("prompts", settings.prompts, settings.score.teacher_prompt, expert)
    if settings.evaluate is not None:
        teacher = settings.score.teacher_prompt if settings.evaluate.alignment is not None else None
        for number, benchmark in enumerate(settings.evaluate.benchmarks):
            yield Source(f"evaluate.benchmarks.{number}", settings.evaluate.prompts_of(benchmark), teacher)
            for mode in settings.evaluate.mode_names[1:]:
                prompts = settings.evaluate.in_mode(mode).prompts_of(benchmark)
                yield Source(f"evaluate.benchmarks.{number}", prompts, None, mode=mode)
    if settings.attribute is not None and settings.attribute.documents is not None:
        yield Source("attribute.documents", settings.attribute.documents.source(settings.prompts), None)


def check_prompts(runs: Sequence[Run], rows: int | None) -> None:
    """Check the sources of every run with missing jobs; shared sources once.

    Raises:
        ConfigError: as ``render_sources``.
    """
    tried: set[str] = set()
    for run in runs:
        if all(run.is_done(job) for job in run.plan.jobs):
            continue
        student = Reader("student", run.facts.student.tokenizer_folder, run.experiment.student_model.trust_remote_code)
        for name, experiment in run.experiment.by_teacher.items():
            trusted, folder = experiment.teacher_model.trust_remote_code, experiment.facts.teacher.tokenizer_folder
            teacher = Reader(f"teacher {name}".rstrip(), folder, trusted)
            for source in sources_of(run.settings):
                source = replace(source, rows=experiment.teachers_prompts if source.name == "prompts" else None)
                key = repr((source, student, teacher))
                if key not in tried:
                    render_sources([source], student, teacher, rows)
                    tried.add(key)
        if run.settings.judged_for:
            key = repr((run.settings.prompts, run.settings.judge))
            if key not in tried:
                check_answers(run.settings, rows)
                tried.add(key)


def check_answers(settings: RunSettings, rows: int | None) -> None:
    """Ask the verifier of the prompts whether it can read their reference answers.

    Of ``math``, which starts processes and takes milliseconds an answer, it asks about the first ``FIRST_ROWS`` alone;
    the judge stage asks about the others.

    Raises:
        ConfigError: names the prompt.
    """
    from eopd.stages.verifiers.registry import PLAIN, open_verifier

    prompts, name = settings.prompts, settings.prompts.verifier
    assert name is not None, "settings that read verdicts without a verifier are refused"
    limit = rows if name in PLAIN else min(rows or FIRST_ROWS, FIRST_ROWS)
    limited = prompts if limit is None else prompts.model_copy(update={"limit": min(prompts.limit or limit, limit)})
    verifier = open_verifier(name, seconds=settings.judge.seconds_per_answer)
    try:
        readable: set[str] = set()
        for prompt in load_prompts(limited):
            assert prompt.answer is not None, "settings that read verdicts without answers are refused"
            if prompt.answer in readable:
                continue
            try:
                verifier.check_answer(prompt.answer)
            except ValueError as error:
                where = f"prompt {prompt.id!r} has an answer that prompts.verifier: {name} cannot judge by, and "
                where += settings.judged_for
                raise ConfigError.of(error, where, setting="prompts.verifier", prompt=prompt.id) from error
            readable.add(prompt.answer)
    finally:
        verifier.close()


def render_sources(
    sources: Sequence[Source], student: Reader, teacher: Reader, rows: int | None = FIRST_ROWS
) -> list[Rendered]:
    """Render one prompt of each shape, and return the first of each source.

    Args:
        rows: how many rows of each source are read; None: all.

    Raises:
        ConfigError: a row, by its place, that cannot be read; a prompt that a template refuses or would write only in
            part; an argument that a template does not read.
    """
    rendered: list[Rendered] = []
    for source in sources:
        settings = source.prompts
        if rows is not None:
            settings = settings.model_copy(update={"limit": min(settings.limit or rows, rows)})
        try:
            shapes: dict[object, Prompt] = {}
            for prompt in load_prompts(settings):
                if source.rows is not None and prompt.index not in source.rows:
                    continue
                shapes.setdefault(prompt.conversation.shape(), prompt)
                for names, reader in _values_shown(source):
                    _check_values(prompt, names, reader)
        except (ValueError, OSError) as error:
            raise source.refusal(error) from error
        views: list[list[Rendered]] = [_views(source, prompt, student, teacher) for prompt in shapes.values()]
        rendered += views[0] if views else []
    return rendered


def _values_shown(source: Source) -> Iterator[tuple[Sequence[str], str]]:
    """Return the names of a prompt's values that settings show, and what shows them."""
    if source.teacher is not None:
        yield source.teacher.values_needed, "score.teacher_prompt shows to the teacher"
    if source.expert is not None:
        yield source.expert.values_needed, "rollout.mixed.expert shows"


def _check_values(prompt: Prompt, names: Sequence[str], shown: str) -> None:
    """Raises ValueError if a prompt lacks what a model is to see of it."""
    for name in names:
        if not (prompt.value(name) or "").strip():
            problem = f"prompt {prompt.id!r} has no {name}, which {shown} as {{{{{name}}}}}"
            raise InputError(problem, prompt=prompt.id, remedy="add it, or leave the prompt out")


def _views(source: Source, prompt: Prompt, student: Reader, teacher: Reader) -> list[Rendered]:
    try:
        ids = given_ids(prompt, source.prompts)
        if ids is None:
            conversation = student_conversation(prompt, source.prompts)
            text = _text(conversation, source.prompts.template, source.prompts.template_arguments, student)
        else:
            text = f"{len(ids):,} token ids: {', '.join(map(str, ids[:20]))}{', ...' if len(ids) > 20 else ''}"
    except ValueError as error:
        raise source.refusal(error, prompt, "as the student reads it") from error
    views = [Rendered(source.name, student.role, text)]
    if source.expert is not None:
        views.append(Rendered(source.name, "expert", _as_the_expert_reads(source, source.expert, prompt, student)))
    reads = source.teacher
    if reads is None:
        return views
    try:
        values = reads.example({name: prompt.value(name) for name in reads.values_needed})
        if reads.kind != "same":
            raw = prompt.messages_json if reads.kind == "template" else prompt.teacher_prompt
            if raw is None and reads.kind == "template":
                raise InputError("it is token ids, which kind: template cannot render", remedy="set kind: same")
            if raw is None:
                problem = "score.teacher_prompt.kind is column, and columns.teacher_prompt names none"
                raise InputError(problem, setting="score.teacher_prompt.kind")
            text = _text(teacher_conversation(raw, reads, values), reads.template, reads.arguments, teacher)
        text += opening_text(reads, values)
    except ValueError as error:
        raise source.refusal(error, prompt, "as the teacher reads it (score.teacher_prompt)") from error
    return [*views, Rendered(source.name, teacher.role, text)]


def _as_the_expert_reads(source: Source, expert: ExpertSettings, prompt: Prompt, student: Reader) -> str:
    from eopd.stages.rollout.mixed import expert_settings

    try:
        settings = expert_settings(expert, source.prompts, prompt)
        return _text(student_conversation(prompt, settings), settings.template, settings.template_arguments, student)
    except ValueError as error:
        raise source.refusal(error, prompt, "under rollout.mixed.expert") from error


def _text(conversation: Conversation, template: str, arguments: dict[str, object], reader: Reader) -> str:
    if template == "plain":
        return conversation.plain_text()
    if reader.trusted:
        return "(by code that comes with the model)"
    chat_template = ChatTemplate.of_folder(reader.tokenizer, tools=bool(conversation.tools or arguments.get("tools")))
    check_arguments(chat_template, arguments)
    return write_conversation(conversation, lambda what: chat_template.render(what, arguments))
