"""Checks of the inputs that a config names: models, prompts, benchmarks, stores and the launcher's program.

Each input is checked on its own, with the functions that make a plan, so that all missing inputs are reported at once.
No torch is imported into this process, and nothing is hashed but GGUF files, which are prepared as for a run.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import Finding, not_looked_at, refused
from eopd.pipeline.forecast import ELSEWHERE_BYTES, SMALLER, Need, gpu_bytes, largest, models_of, needs
from eopd.pipeline.inputs import (
    capture_columns,
    check_architectures,
    compare_vocabularies,
    count_source,
    external_model,
    find_tokenizer,
    find_weights,
    load_other,
)
from eopd.pipeline.prompt_check import Reader, Source, render_sources, sources_of
from eopd.stages.format import excerpt, size
from eopd.stages.models.memory import free_memory
from eopd.stages.models.prompts import PromptSettings, load_prompts, rows_by_teacher
from eopd.stages.models.settings import ModelSettings
from eopd.storage.errors import UserError, installing
from eopd.storage.stacked import StackedStores


def check_inputs(settings: RunSettings) -> Iterator[Finding]:
    """Yield a finding for each input that the config names."""
    for role in settings.models:
        yield from _named(role, settings)
    yield from _architectures(settings)
    yield from _memory(settings)
    yield from _tokens(settings)
    for source in sources_of(settings):
        count = _source(source.name, source.prompts)
        yield count
        if count.state == "ok":
            yield from _renderings(source, settings)
    for place in settings.read_only_stores:
        yield _tried("read_only_stores", partial(_read_only, settings.store, place), _HAVE_STORE)
    yield _tried("train", partial(_training_packages, settings), "")
    yield from _attribution(settings)
    yield _launcher(settings.launcher.kind)


_HAVE_STORE = "mount or create it, or take it out of read_only_stores"
_HAVE_SOURCE = "name a JSONL or Parquet file, or a folder saved with save_to_disk, and its columns"


def _tried(name: str, look: Callable[[], str], remedy: str) -> Finding:
    """Report what ``look`` returns, or the error it raises; ``remedy``: for an error that has none."""
    try:
        return Finding(name, "ok", look())
    except ImportError as error:
        return not_looked_at(name, error)
    except UserError as error:
        return refused(name, error, remedy)
    except (ValueError, OSError) as error:
        return Finding(name, "broken", str(error), remedy)


def _named(role: str, settings: RunSettings) -> Iterator[Finding]:
    model = settings.models[role]
    if role == "teacher" and settings.teacher.student is not None:
        yield Finding(role, "ok", f"the run's own student ({settings.teacher.student})")
        return
    if role == "teacher" and settings.teacher.capture is not None:
        path = settings.teacher.capture.path
        yield _tried(role, lambda: f"captured in {path}: {', '.join(capture_columns(settings))}", "name another file")
        return
    if model.run is not None:
        other = _tried(role, lambda: f"a student of the run {load_other(role, settings).name}", f"check {role}.run")
        yield other
        if other.state != "ok":
            return
    try:
        model = external_model(role, settings)
    except ConfigError as error:
        yield refused(role, error, f"check {role}.run")
        return
    yield from _model(role, model, settings.store)


def _external_models(settings: RunSettings) -> dict[str, ModelSettings]:
    """Return the external model behind each role that has one of its own; without those reported by ``_named``."""
    models: dict[str, ModelSettings] = {}
    for role in settings.models:
        with suppress(ConfigError):
            models[role] = external_model(role, settings)
    return models


def _model(role: str, settings: ModelSettings, store: str) -> Iterator[Finding]:
    weights = _tried(role, lambda: str(find_weights(role, settings, store)), f"point {role}.path to a model folder")
    yield weights
    if weights.state == "ok" or settings.tokenizer is not None:
        remedy = f"point {role}.tokenizer to its folder"
        yield _tried(f"{role}.tokenizer", lambda: str(find_tokenizer(role, settings, store)), remedy)


def _memory(settings: RunSettings) -> Iterator[Finding]:
    """Compare what each stage needs with the GPU, or with this machine's memory if it has none."""
    folders: dict[str, Path] = {}
    for role, model in _external_models(settings).items():
        with suppress(ValueError, OSError):  # reported by ``_model``
            folders[role] = find_weights(role, model, settings.store)
    gpu = gpu_bytes()

    pairs = []
    for role, teacher in zip(list(settings.models)[1:], settings.teachers.values(), strict=True):
        if "student" in folders and role in folders:
            models = models_of(folders["student"], folders[role])
            if models is not None:
                pairs.append((settings.model_copy(update={"teacher": teacher}), models))

    def needed(gpu: int, available: int | None = None) -> list[Need]:
        return largest(need for one, models in pairs for need in needs(one, models, gpu, available))

    elsewhere = {} if gpu else {need.stage: need for need in needed(ELSEWHERE_BYTES)}
    for need in needed(gpu, None if gpu else free_memory()):
        on_gpu = elsewhere.get(need.stage)
        also = f"; on a GPU about {size(on_gpu.memory.bytes)}" if on_gpu is not None else ""
        works_here = settings.launcher.kind in ("inline", "local")
        yield Finding(
            f"memory of {need.stage}",
            "ok" if need.fits or not works_here else "warning",
            f"{need}{also}",
            "" if need.fits or not works_here else SMALLER,
        )


def _architectures(settings: RunSettings) -> Iterator[Finding]:
    """Check that each readable model folder holds every weight of its architecture."""
    models: dict[str, tuple[ModelSettings, Path]] = {}
    for role, model in _external_models(settings).items():
        if role == "teacher" and not settings.teacher.has_own_model:
            continue
        with suppress(ValueError, OSError):  # reported by ``_model``
            models[role] = model, find_weights(role, model, settings.store)
    if not models:
        return
    try:
        refusals = check_architectures(models)
    except ValueError as error:
        yield Finding("weights", "broken", str(error), installing("train"))
        return
    for role in models:
        name = f"{role}.weights"
        fits = Finding(name, "ok", "fit the architecture in config.json")
        yield refused(name, refusals[role]) if role in refusals else fits


def _tokens(settings: RunSettings) -> Iterator[Finding]:
    """Check that teacher and student share their tokens, if both tokenizers are available."""
    try:
        student, *teachers = (
            find_tokenizer(role, external_model(role, settings), settings.store) for role in settings.models
        )
    except (ValueError, OSError):
        return

    def look() -> str:
        for teacher in teachers:
            compare_vocabularies(teacher, student)
        return f"{'teachers' if len(teachers) > 1 else 'teacher'} and student share them"

    yield _tried("tokens", look, "")


def _source(where: str, settings: PromptSettings) -> Finding:
    def look() -> str:
        _, count = count_source(where, settings)
        load_prompts(settings.model_copy(update={"limit": 1}))  # the columns are there
        return f"{count:,} in {settings.path}"

    return _tried(where, look, _HAVE_SOURCE)


def _renderings(source: Source, settings: RunSettings) -> Iterator[Finding]:
    """Show the first prompt of a source as each model reads it, if the tokenizers are available."""
    try:
        models = {role: external_model(role, settings) for role in settings.models}
        student, *teachers = (
            Reader(role, find_tokenizer(role, model, settings.store), model.trust_remote_code)
            for role, model in models.items()
        )
        several = settings.teacher.by_prompt is not None and source.name == "prompts"
        rows = rows_by_teacher(source.prompts, tuple(settings.teachers)) if several else {}
    except (ValueError, OSError):
        return
    shown: set[str] = set()
    try:
        for name, teacher in zip(settings.teachers, teachers, strict=True):
            for rendered in render_sources([replace(source, rows=rows.get(name))], student, teacher):
                if rendered.reader not in shown:
                    yield Finding(f"{source.name} ({rendered.reader})", "ok", excerpt(rendered.text))
                shown.add(rendered.reader)
    except ImportError as error:
        yield not_looked_at(f"{source.name} (rendered)", error)
    except ConfigError as error:
        yield refused(f"{source.name} (rendered)", error, "change the prompts, or the template")


def _read_only(private: str, place: str) -> str:
    StackedStores.at(private, [place])  # a bucket is not accessed yet
    return place


def _training_packages(settings: RunSettings) -> str:
    from eopd.stages.train.settings import require_extras

    require_extras(settings.train)
    return "the packages that training needs are installed"


def _attribution(settings: RunSettings) -> Iterator[Finding]:
    """Look for bergson, and for the bins of the documents."""
    asked = settings.attribute
    if asked is None:
        return

    def bins() -> str:
        from eopd.stages.attribute.documents import bins_of_file, check_bins

        bins = bins_of_file(asked, settings.prompts)
        if asked.documents is not None:
            check_bins(asked, bins)
        return f"{len(bins):,} rows in {len(set(bins)):,} bins by {', '.join(asked.bins)}"

    def package() -> str:
        from eopd.stages.attribute.settings import bergson_version, lacking_bergson

        lacking = lacking_bergson()
        if lacking is not None:
            raise lacking
        return f"bergson {bergson_version()}"

    yield _tried("attribute", package, "")
    yield _tried("attribute.bins", bins, "name other columns of bins")


def _launcher(kind: str) -> Finding:
    name = f"launcher.kind: {kind}"
    if kind == "slurm":
        program = shutil.which("sbatch")
        cure = "start it on a machine of the Slurm cluster, or set launcher.kind: local"
        return Finding(name, "ok", program) if program else Finding(name, "broken", "there is no sbatch here", cure)
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        return Finding(name, "broken", "ray is not installed", f"{installing('ray')}, or set launcher.kind: local")
    return Finding(name, "ok", "ray is installed" if kind == "ray" else "needs nothing else")
