"""Looking at the world before planning: models, prompts and benchmarks that the settings name.

Everything that can be wrong with an input and seen without loading a model is said here, before heavy work.
"""

from __future__ import annotations

from pathlib import Path

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.models import inspect_model
from eopd.pipeline.plan import BenchmarkFacts, Facts
from eopd.stages.models.prompts import PromptSettings, count_prompts, holds_conversations, source_files
from eopd.storage.files import sha256_text
from eopd.storage.fingerprints import LENGTH, Digests


def gather_facts(settings: RunSettings, digests: Digests | None = None) -> Facts:
    """Fingerprints and counts of every input.

    Args:
        digests: of files that were hashed before; those that the store remembers unless given.

    Raises:
        ConfigError: an input is missing or unreadable; names the setting.
    """
    digests = Digests.of_store(settings.store) if digests is None else digests
    student = inspect_model("student", settings.student, digests)
    teacher = inspect_model("teacher", settings.teacher, digests)
    count, fingerprint = _source("prompts", settings.prompts, digests)
    benchmarks = []
    evaluate = settings.evaluate
    for number, benchmark in enumerate(evaluate.benchmarks if evaluate else ()):
        assert evaluate is not None
        rows, digest = _source(f"evaluate.benchmarks.{number}", evaluate.prompts_of(benchmark), digests)
        benchmarks.append(BenchmarkFacts(benchmark.name, rows, digest))
    digests.save()
    return Facts(student, teacher, count, fingerprint, tuple(benchmarks), digests)


def count_source(where: str, settings: PromptSettings) -> tuple[list[Path], int]:
    """Files of a prompt source and how many prompts they hold. Raises ConfigError: it is not there, or empty."""
    try:
        return source_files(settings), count_prompts(settings)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _source(where: str, settings: PromptSettings, digests: Digests) -> tuple[int, str]:
    files, count = count_source(where, settings)
    try:
        digest = digests.of_files(files[0].parent, files)
        conversations = holds_conversations(settings)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if conversations:  # these were rendered without fields such as tool_calls at first, and a prefill was closed
        digest = sha256_text(f"{digest} whole conversations")[:LENGTH]
    return count, digest
