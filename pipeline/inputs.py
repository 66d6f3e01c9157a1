"""Inputs outside the store that a config names: models, prompts and benchmarks, read from small files without torch.

Everything that can be wrong with an input and can be seen without loading a model is refused here, before any work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eopd.pipeline.config import ConfigError, RunSettings, config_file, errors_of, load_config
from eopd.stages.experiment import BenchmarkFacts, Facts, ModelFacts, TeacherFacts
from eopd.stages.models.gguf import ensure_prepared, gguf_fingerprint, is_gguf
from eopd.stages.models.model_config import GENERATION_FILE
from eopd.stages.models.prompts import PromptSettings, count_prompts, rows_by_teacher, rows_where, source_files
from eopd.stages.models.settings import ModelSettings
from eopd.stages.models.weight_files import AGAIN, read_tensors
from eopd.storage import paths
from eopd.storage.errors import InputError
from eopd.storage.files import canonical_json, sha256_text
from eopd.storage.identity import KEY_LENGTH, Digests, code_files, model_files, template_files, tokenizer_files
from eopd.storage.paths import RunPaths
from eopd.storage.untrusted import refuse_links

TOKENIZER_FILE = "tokenizer.json"
CHECK_ATTEMPTS = 10  # a process that checks weights (it reads headers only) and that a signal ends is started again


def gather_facts(
    settings: RunSettings, digests: Digests | None = None, others: Mapping[str, ModelFacts] | None = None
) -> Facts:
    """Collect fingerprints and counts of every input.

    Args:
        digests: of files that were hashed before; those that the store remembers unless given.
        others: students of other runs, by the role that they play here.

    Raises:
        ConfigError: an input is missing or unreadable; names the setting.
    """
    digests = Digests.of_store(settings.store) if digests is None else digests
    known = dict(others or {})
    teachers: dict[str, TeacherFacts] = {}
    student = known.get("student") or inspect_model("student", settings.student, digests, settings.store)
    if settings.teacher.student is not None:
        teacher = student
    elif settings.teacher.capture is not None:
        teacher = captured_teacher(settings, student, digests)
    elif settings.teacher.by_prompt is None:
        teacher = known.get("teacher") or inspect_model("teacher", settings.teacher, digests, settings.store)
    else:
        teachers = _teachers(settings, digests, known)
        teacher = next(iter(teachers.values())).model
    count, fingerprint = _source("prompts", settings.prompts, digests)
    selected = _selected_prompts(settings)
    benchmarks = []
    evaluate = settings.evaluate
    for number, benchmark in enumerate(evaluate.benchmarks if evaluate else ()):
        assert evaluate is not None
        rows, digest = _source(f"evaluate.benchmarks.{number}", evaluate.prompts_of(benchmark), digests)
        benchmarks.append(BenchmarkFacts(benchmark.name, rows, digest))
    documents = None
    if settings.attribute is not None and settings.attribute.documents is not None:
        source = settings.attribute.documents.source(settings.prompts)
        documents = BenchmarkFacts("documents", *_source("attribute.documents", source, digests))
    digests.save()
    return Facts(student, teacher, count, fingerprint, tuple(benchmarks), selected, documents, digests, teachers)


def _teachers(settings: RunSettings, digests: Digests, known: Mapping[str, ModelFacts]) -> dict[str, TeacherFacts]:
    """Collect the facts of several teachers. Raises ConfigError, as ``gather_facts``."""
    with errors_of("prompts.columns.teacher"):
        rows = rows_by_teacher(settings.prompts, tuple(settings.teachers))
    teachers = {}
    for name, model in settings.teachers.items():
        role = f"teachers.{name}"
        facts = known.get(role) or inspect_model(role, model, digests, settings.store)
        teachers[name] = TeacherFacts(facts, rows[name])
    main = {name: one.model.stop_ids[:1] for name, one in teachers.items()}
    if settings.train.objective.stops == "remap" and len(set(main.values())) > 1:
        raise ConfigError(
            f"train.objective.stops is remap, which moves one stop id of the teacher's, and teachers have "
            f"{', '.join(f'{name} {list(ids)}' for name, ids in main.items())}",
            setting="train.objective.stops",
            remedy="set it to merge or keep",
        )
    return teachers


def models_by_role(facts: Facts) -> dict[str, ModelFacts]:
    """Return the facts of every model by the setting that names it: `student`, `teacher` or `teachers.NAME`."""
    teachers = {f"teachers.{name}" if name else "teacher": one for name, one in facts.teacher_models.items()}
    return {"student": facts.student, **teachers}


def captured_teacher(settings: RunSettings, student: ModelFacts, digests: Digests) -> ModelFacts:
    """Return the facts of a capture in place of a teacher's. Its ids, and what ends a response, are the student's.

    Raises:
        ConfigError: there is no such file, or it is no capture of the prompts' rows.
    """
    columns = capture_columns(settings)
    capture = settings.teacher.capture
    assert capture is not None
    path = Path(capture.path)
    content = {
        "file": digests.of_files(path.parent, [path]),
        "columns": columns,
        "shifted": capture.shifted,
        "vocabulary": student.tokenizer_fingerprint,
    }
    return replace(student, fingerprint=sha256_text(canonical_json(content))[:KEY_LENGTH], other=None)


def capture_columns(settings: RunSettings) -> list[str]:
    """Return the columns that are read of `teacher.capture`. Raises ConfigError, as ``captured_teacher``."""
    from eopd.storage.captures import check_capture, columns_of

    capture = settings.teacher.capture
    assert capture is not None
    path = Path(capture.path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", setting="teacher.capture.path", file=path)
    with errors_of("teacher.capture"):
        columns = columns_of(path, capture.named)
        rows, prompts = check_capture(path, columns), count_prompts(settings.prompts)
    if rows < prompts or (rows > prompts and settings.prompts.limit is None):
        raise ConfigError(
            f"{path} has {rows} rows, and {settings.prompts.path} {prompts}: row i of one must be the sequence of row "
            "i of the other",
            setting="teacher.capture",
            file=path,
        )
    return columns.names


def _selected_prompts(settings: RunSettings) -> frozenset[int] | None:
    """Find the rows of the prompts that `train.select.where` selects; None: all.

    Raises:
        ConfigError: as ``prompts.rows_where``.
    """
    where = settings.train.select.where
    if not where:
        return None
    with errors_of("train.select.where"):
        return rows_where(settings.prompts, where)


def count_source(where: str, settings: PromptSettings) -> tuple[list[Path], int]:
    """List the files of a prompt source and count its prompts. Raises ConfigError if it is missing or empty."""
    with errors_of(where):
        return source_files(settings), count_prompts(settings)


def _source(where: str, settings: PromptSettings, digests: Digests) -> tuple[int, str]:
    files, count = count_source(where, settings)
    with errors_of(where):
        return count, digests.of_files(files[0].parent, files)


# -- students of other runs ------------------------------------------------------------------------------------------


def load_other(role: str, settings: RunSettings) -> RunSettings:
    """Load the settings of the run that ``role``.run names, from its folder or its config.

    Raises:
        ConfigError: there is none, or it has no such student.
    """
    model = settings.models[role]
    assert model.run is not None, role
    own = RunPaths(Path(settings.runs) / model.run).config
    file = own if own.is_file() else config_file(model.run)
    if file is None:
        raise ConfigError(
            f"there is no run {model.run!r} below {settings.runs}, and no config of that name",
            setting=f"{role}.run",
            remedy="Start that run first, or name its config",
        )
    other = load_config(str(file))
    if model.round is not None and model.round > other.rounds:
        raise ConfigError(
            f"{role}.round is {model.round}, and the run {other.name} has the students 1 to {other.rounds}",
            setting=f"{role}.round",
        )
    return other


def external_model(role: str, settings: RunSettings, seen: tuple[str, ...] = ()) -> ModelSettings:
    """Return the external model that plays ``role``, or that the student was trained from which plays it.

    Raises:
        ConfigError: a run that is named cannot be found, or is named in a circle.
    """
    seen = refuse_circle(role, settings, seen)
    if role == "teacher" and not settings.teacher.has_own_model:
        return external_model("student", settings, seen[:-1])
    model = settings.models[role]
    return model if model.run is None else external_model("student", load_other(role, settings), seen)


def refuse_circle(role: str, settings: RunSettings, seen: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``seen`` with this run. Raises ConfigError if it is among them: its student would be made from itself."""
    place = str((Path(settings.runs) / settings.name).resolve())
    if place in seen:
        chain = " -> ".join(Path(one).name for one in (*seen, place))
        problem = f"the run {settings.name} would be made from its own student ({chain})"
        raise ConfigError(problem, setting=f"{role}.run")
    return (*seen, place)


# -- models ----------------------------------------------------------------------------------------------------------


def inspect_model(role: str, settings: ModelSettings, digests: Digests, store: str | Path | None = None) -> ModelFacts:
    """Collect the facts of the model that plays ``role`` ("student" or "teacher").

    Args:
        store: where GGUF files are prepared on first use; None: they are refused.

    Raises:
        ConfigError: its folder or hub id is not at hand, or lacks a file; says what to do.
    """
    folder, tokenizer = find_weights(role, settings, store, digests), find_tokenizer(role, settings, store, digests)
    ours, theirs = (code_files(folder), code_files(tokenizer)) if settings.trust_remote_code else ([], [])
    if settings.path is not None and is_gguf(settings.path):
        weights = gguf_fingerprint(Path(settings.path).expanduser(), digests)
    else:
        weights = digests.of_files(folder, [*model_files(folder), *ours])
    semantic = {"weights": weights, "dtype": settings.dtype, "remote_code": settings.trust_remote_code}
    return ModelFacts(
        folder=folder,
        tokenizer_folder=tokenizer,
        fingerprint=sha256_text(canonical_json(semantic))[:KEY_LENGTH],
        tokenizer_fingerprint=digests.of_files(
            tokenizer, [*tokenizer_files(tokenizer), *template_files(tokenizer), *theirs]
        ),
        stop_ids=stop_ids_of(folder, tokenizer),
    )


def find_weights(
    role: str, settings: ModelSettings, store: str | Path | None = None, digests: Digests | None = None
) -> Path:
    """Find the model's folder and weight files, and read their headers. Raises ConfigError, as ``inspect_model``."""
    folder = _locate_model(role, settings, store, digests)
    if not (folder / "config.json").is_file():
        problem = f"{folder} has no config.json; it is no Hugging Face model folder"
        raise ConfigError(problem, setting=f"{role}.path", file=folder)
    with errors_of(f"{role}.path"):
        eos_of(folder)
        with suppress(PermissionError):  # the fingerprint of another user's model may be known
            read_tensors(folder)
    return folder


def check_architectures(
    models: Mapping[str, tuple[ModelSettings, Path]], *, in_process: bool = False
) -> dict[str, InputError]:
    """Compare the headers of each model's weight files with the architecture in its config.

    Args:
        models: role -> settings and folder.
        in_process: import torch into this process, for one that needs it anyway.

    Returns:
        Role -> what is wrong, for those that are refused.

    Raises:
        ConfigError: the process failed.
    """
    arguments = {
        role: {"path": str(folder), "trust_remote_code": settings.trust_remote_code}
        for role, (settings, folder) in models.items()
    }
    if in_process:
        from eopd.stages.models.loading import refusals

        return refusals(arguments)
    command = [sys.executable, "-m", "eopd.stages.models.loading", json.dumps(arguments)]
    for _ in range(CHECK_ATTEMPTS):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode >= 0:  # below zero: a signal ended it, which tells nothing about the weights
            break
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].strip()[:300]
        raise ConfigError(f"{', '.join(models)}: the weights could not be checked: {reason}")
    return {role: InputError(**fields) for role, fields in json.loads(lines[-1]).items()}


def check_weights(
    models: Mapping[str, tuple[ModelSettings, ModelFacts]], digests: Digests, *, in_process: bool = False
) -> None:
    """Refuse weights that do not fit their architecture, before any work.

    ``digests`` remembers which fingerprints passed, so that a model is looked at once.

    Raises:
        ConfigError: names the role, the folder and the tensors.
    """
    tool = f"transformers {version('transformers')}"
    new = {
        role: (settings, facts)
        for role, (settings, facts) in models.items()
        if not digests.has_passed(tool, facts.fingerprint)
    }
    if not new:
        return
    folders = {role: (settings, facts.folder) for role, (settings, facts) in new.items()}
    for role, refusal in check_architectures(folders, in_process=in_process).items():
        raise ConfigError.of(refusal, setting=f"{role}.path")
    for _, facts in new.values():
        digests.note_pass(tool, facts.fingerprint)
    digests.save()


def find_tokenizer(
    role: str, settings: ModelSettings, store: str | Path | None = None, digests: Digests | None = None
) -> Path:
    """Find the folder of a tokenizer. Raises ConfigError, as ``inspect_model``."""
    if settings.tokenizer is None:
        folder = _locate_model(role, settings, store, digests)
    else:
        folder = locate(f"{role}.tokenizer", settings.tokenizer, None, store, digests)
    if not tokenizer_files(folder):
        remedy = f"name their folder in {role}.tokenizer"
        raise ConfigError(f"no tokenizer files in {folder}", setting=f"{role}.path", file=folder, remedy=remedy)
    return folder


def _locate_model(role: str, settings: ModelSettings, store: str | Path | None, digests: Digests | None) -> Path:
    assert settings.path is not None, f"{role} is no external model"
    return locate(f"{role}.path", settings.path, settings.revision, store, digests)


def locate(
    setting: str,
    path: str,
    revision: str | None,
    store: str | Path | None = None,
    digests: Digests | None = None,
) -> Path:
    """Return the local folder of a model: the one named, one in the local hub cache, or a prepared GGUF file."""
    folder = Path(path).expanduser()
    if is_gguf(path):
        return _prepared(setting, folder, store, digests)
    if folder.is_dir():
        return folder.resolve()
    looks_local = path.startswith(("/", "./", "../", "~")) or path.count("/") > 1
    if looks_local:
        remedy = "Point it to a model folder, or to a hub id."
        raise ConfigError(f"there is no folder {path}", setting=setting, file=path, remedy=remedy)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" --revision {revision}" if revision else ""
        raise ConfigError(
            f"{path!r} is neither a folder nor in the local hub cache",
            setting=setting,
            remedy=f"Download it once with `hf download {path}{at}`, or point {setting} to a folder that holds it.",
        ) from error


def _prepared(setting: str, file: Path, store: str | Path | None, digests: Digests | None) -> Path:
    if not file.is_file():
        remedy = "Point it to a GGUF file, or to a model folder."
        raise ConfigError(f"there is no file {file}", setting=setting, file=file, remedy=remedy)
    if store is None:
        remedy = f"Prepare it with `eopd prepare {file} FOLDER` first."
        raise ConfigError(f"{file} is a GGUF file", setting=setting, file=file, remedy=remedy)
    digests = digests or Digests.of_store(store)
    with errors_of(setting):
        refuse_links(Path(store), paths.MODELS)
        folder = ensure_prepared(file.resolve(), Path(store) / paths.MODELS, digests)
    digests.save()
    return folder.resolve()


def stop_ids_of(folder: Path, tokenizer: Path) -> tuple[int, ...]:
    """Return the ids that end a response: the tokenizer's eos token first (the main one), then eos of
    generation_config.json and of config.json."""
    text = _read_json(tokenizer / "tokenizer_config.json").get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    added = _read_json(tokenizer / "tokenizer.json").get("added_tokens", []) if text is not None else []
    try:
        ids = [int(entry["id"]) for entry in added if entry["content"] == text]
    except (TypeError, KeyError, ValueError) as error:
        problem = "added_tokens must list an id and a content each"
        raise ConfigError(problem, file=tokenizer / "tokenizer.json") from error
    return tuple(dict.fromkeys([*ids, *eos_of(folder)]))


def eos_of(folder: Path) -> list[int]:
    """Return the eos ids of the model in ``folder``: those of generation_config.json, then of config.json.

    Raises:
        ConfigError: one is no id, or is beyond the vocabulary that config.json states; names the file and the key.
    """
    vocabulary = _vocabulary_of(folder / "config.json")
    return [number for name in (GENERATION_FILE, "config.json") for number in _eos_in(folder / name, vocabulary)]


def _vocabulary_of(path: Path) -> int | None:
    """Return the largest vocabulary size that a config.json states; None if it states none."""
    config = _read_json(path)
    text = config.get("text_config")
    if not isinstance(text, (dict, type(None))):
        raise ConfigError(f"text_config must be an object, got {repr(text)[:40]}", file=path)
    counts = []
    for where, group in (("", config), ("text_config.", text or {})):
        count = group.get("vocab_size")
        if count is None:
            continue
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 2**31:
            raise ConfigError(f"{where}vocab_size must be a whole number of ids, got {repr(count)[:40]}", file=path)
        counts.append(count)
    return max(counts, default=None)


def token_names(tokenizer: Path) -> dict[int, str]:
    """Return the special tokens of a tokenizer's folder, by id."""
    added = _read_json(tokenizer / "tokenizer.json").get("added_tokens", [])
    return {int(entry["id"]): str(entry["content"]) for entry in added}


def _eos_in(path: Path, vocabulary: int | None) -> list[int]:
    eos = _read_json(path).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            problem = f"eos_token_id must be a token's id, or a list of them; got {repr(number)[:40]}"
            raise ConfigError(problem, file=path)
        if vocabulary is not None and number >= vocabulary:
            problem = f"eos_token_id {number} is beyond the vocabulary: vocab_size in config.json is {vocabulary}"
            raise ConfigError(problem, file=path)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be read", file=path, remedy=AGAIN) from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ConfigError(f"{path} cannot be read ({error})", file=path, remedy=AGAIN) from error
    if not isinstance(value, dict):
        problem = f"{path} must hold a JSON object, found a {type(value).__name__}"
        raise ConfigError(problem, file=path, remedy=AGAIN)
    return value


# -- tokens ----------------------------------------------------------------------------------------------------------


def check_same_tokens(facts: Facts) -> None:
    """Raise ConfigError if an id stands for other bytes in the teacher's vocabulary than in the student's."""
    for teacher in facts.teacher_models.values():
        if teacher.tokenizer_fingerprint != facts.student.tokenizer_fingerprint:
            compare_vocabularies(teacher.tokenizer_folder, facts.student.tokenizer_folder)


@lru_cache
def compare_vocabularies(teacher: Path, student: Path) -> None:
    """Compare the vocabularies of two tokenizer folders. Cached per process: large ones take seconds to read, and the
    runs of a sweep share them."""
    files = (teacher / TOKENIZER_FILE, student / TOKENIZER_FILE)
    if not all(file.exists() for file in files):
        return
    from tokenizers import Tokenizer

    from eopd.stages.models.tokenizers import check_same_vocabulary

    try:
        ours, theirs = (Tokenizer.from_file(str(file)) for file in files)
    except Exception:  # the library's errors; the stage that loads the tokenizer reports them
        return
    try:
        check_same_vocabulary(ours, theirs)
    except ValueError as error:
        raise ConfigError.of(error) from error
