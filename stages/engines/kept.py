"""The engine pool of a process: one sampling and one reading engine, opened on demand and kept for the next job.

    engines = Engines(keep=True)
    with engines.sampling("auto", student, max_model_len=512, log_dir=logs, progress=progress) as engine:
        ...

A kept sampling engine loads the weights of the next student in place; a probe must then agree with the checkpoint's own
log-probs, else the engine is closed and a new one opened. If memory does not allow both engines, and before training on
a GPU, open engines are closed first. Results do not depend on kept engines. No torch is needed until an engine opens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from eopd.stages.engines.sampling import EngineKind, EngineOptions, SamplingEngine
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.memory import free_memory, weight_bytes
from eopd.stages.models.model_config import length_boundary, longest_readable, same_shape
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from eopd.stages.engines.hidden import HiddenEngine


# -- open -------------------------------------------------------------------------------------------------------------

# Open an engine by its kind; the protocols are in ``sampling`` and ``hidden``.


def resolve_engine(kind: EngineKind) -> Literal["vllm", "transformers"]:
    """Resolve ``auto`` to vLLM if it is installed.

    Raises:
        InputError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if kind == "vllm" and not installed:
        raise InputError(
            "engine: vllm is asked for, but vLLM is not installed",
            setting="engine",
            remedy="Install it or set engine: transformers.",
        )
    if kind == "auto":
        return "vllm" if installed else "transformers"
    return kind


@contextmanager
def naming_engine(setting: str) -> Iterator[None]:
    """Name ``setting`` in errors about the engine, which do not know what chose it."""
    try:
        yield
    except InputError as error:
        if error.setting == "engine":
            error.setting = setting
        raise


def open_sampling_engine(
    kind: EngineKind, ref: ModelRef, *, max_model_len: int, log_dir: Path, options: EngineOptions | None = None
) -> SamplingEngine:
    """Load ``ref`` for sampling.

    Args:
        max_model_len: longest prompt plus response, tokens (``options.max_model_len`` overrides it).
        log_dir: where the engine's own log goes.

    Raises:
        ValueError: the engine is not installed, or it cannot serve this model; the message says why.
    """
    options = options or EngineOptions()
    length = options.max_model_len or max_model_len
    if resolve_engine(kind) == "vllm":
        from eopd.stages.engines.sampling_vllm import VLLMSamplingEngine

        return VLLMSamplingEngine(ref, max_model_len=length, log_dir=log_dir, options=options)
    from eopd.stages.engines.sampling_transformers import TransformersSamplingEngine

    return TransformersSamplingEngine(ref, max_model_len=length, options=options)


def open_hidden_engine(
    kind: EngineKind,
    ref: ModelRef,
    *,
    longest: int,
    log_dir: Path,
    options: EngineOptions | None = None,
    dtype: str = "auto",
    batch_tokens: int = 16384,
    row_tokens: int = 2048,
) -> HiddenEngine:
    """Load a model for reading. It works on as many threads as torch has at the time.

    Args:
        kind: auto is vLLM where it is installed and known to read this architecture right.
        longest: tokens of the longest sequence it will read.
        dtype: of the forward pass; auto: that of ``ref``.
        batch_tokens: tokens of one forward pass, about; transformers on a CPU reads at most ``CPU_BATCH_TOKENS``.
        row_tokens: tokens of a packed row (transformers only).

    Raises:
        ValueError: the engine is not installed, or it cannot serve this model; the message says why.
    """
    options = options or EngineOptions()
    if dtype != "auto":
        ref = replace(ref, dtype=dtype)
    if resolve_engine(kind) == "vllm":
        from eopd.stages.engines.hidden_vllm import VLLMHiddenEngine, is_known
        from eopd.stages.models.loading import model_folder

        if kind == "vllm" or is_known(model_folder(ref.path, ref.revision), longest):
            return VLLMHiddenEngine(ref, longest=longest, log_dir=log_dir, options=options, batch_tokens=batch_tokens)
    from eopd.stages.engines.hidden import TransformersHiddenEngine

    return TransformersHiddenEngine(ref, options=options, batch_tokens=batch_tokens, row_tokens=row_tokens)


# -- the pool ---------------------------------------------------------------------------------------------------------

ROOM_TOKENS = 256
"""A kept engine is opened for sequences up to the next multiple of this: the next round's may be a little longer."""
MEMORY_PER_WEIGHTS = 2.0
"""A second engine is opened while the first stays if this many times its weights' size, and its KV cache, are free."""


@dataclass
class _Sampler:
    engine: SamplingEngine
    wanted: tuple[object, ...]  # arguments of opening, besides weights and length
    ref: ModelRef  # whose weights it serves


@dataclass
class _Reader:
    engine: HiddenEngine
    wanted: tuple[object, ...]
    longest: int


class Engines:
    """Engine pool. ``keep=False`` closes an engine at the end of its job; ``keep=True`` keeps it until ``close``.

    The pool is not thread-safe. A job that fails closes its engine, whose state is unknown.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._sampler: _Sampler | None = None
        self._reader: _Reader | None = None

    @property
    def any_open(self) -> bool:
        return self._sampler is not None or self._reader is not None

    @contextmanager
    def sampling(
        self,
        kind: EngineKind,
        ref: ModelRef,
        *,
        max_model_len: int,
        log_dir: Path,
        progress: Progress,
        options: EngineOptions | None = None,
        setting: str = "engine",
    ) -> Iterator[SamplingEngine]:
        """Yield an engine that samples from ``ref``; arguments and errors as for ``open_sampling_engine``.

        Args:
            setting: the name that errors give to ``kind``.
        """
        options = options or EngineOptions()
        length = options.max_model_len or max_model_len
        with self._lending(), naming_engine(setting):
            sampler = self._kept_sampler(kind, ref, length, options, progress)
            if sampler is None:
                sampler = self._open_sampler(kind, ref, length, log_dir, options)
            yield sampler.engine

    @contextmanager
    def reading(
        self,
        kind: EngineKind,
        ref: ModelRef,
        *,
        longest: int,
        log_dir: Path,
        options: EngineOptions,
        dtype: str,
        batch_tokens: int,
        row_tokens: int,
        setting: str = "engine",
    ) -> Iterator[HiddenEngine]:
        """Yield an engine that gives the hidden states of ``ref``; arguments as for ``open_hidden_engine``.

        Args:
            setting: the name that errors give to ``kind``.
        """
        with self._lending(), naming_engine(setting):
            wanted = (resolve_engine(kind), ref, options, dtype, batch_tokens, row_tokens)
            reader = self._reader
            if reader is None or reader.wanted != wanted or reader.longest < longest:
                if reader is not None or not self._fits_beside(ref, options):
                    self.close()
                longest = self._with_room(longest, ref)
                engine = open_hidden_engine(
                    kind,
                    ref,
                    longest=longest,
                    log_dir=log_dir,
                    options=options,
                    dtype=dtype,
                    batch_tokens=batch_tokens,
                    row_tokens=row_tokens,
                )
                reader = self._reader = _Reader(engine, wanted, longest)
            yield reader.engine

    def close(self) -> None:
        """Release all memory. Later requests open new engines."""
        sampler, reader = self._sampler, self._reader
        self._sampler = self._reader = None
        if reader is not None:
            reader.engine.close()
        if sampler is not None:
            sampler.engine.close()

    @contextmanager
    def _lending(self) -> Iterator[None]:
        open_ = [held.engine.is_open for held in (self._sampler, self._reader) if held is not None]
        if not all(open_):
            self.close()  # one that somebody else opened here was closed, and ended ours with it
        try:
            yield
        except BaseException:
            self.close()
            raise
        if not self._keep:
            self.close()

    def _kept_sampler(
        self, kind: EngineKind, ref: ModelRef, length: int, options: EngineOptions, progress: Progress
    ) -> _Sampler | None:
        """Return the open engine, with the weights of ``ref``; None if no open engine can take them."""
        sampler = self._sampler
        if sampler is None:
            return None
        from eopd.stages.engines.probe import replace_weights, served

        ref = served(ref)
        if sampler.wanted != _wanted(kind, ref, length, options) or sampler.engine.max_tokens < length:
            return None
        if sampler.ref != ref:
            try:
                replace_weights(sampler.engine, sampler.ref, ref)
            except ValueError as error:
                progress.line(f"engine {sampler.engine.name} is opened anew: in-place weights failed: {error}")
                return None
            sampler.ref = ref
        return sampler

    def _open_sampler(
        self, kind: EngineKind, ref: ModelRef, length: int, log_dir: Path, options: EngineOptions
    ) -> _Sampler:
        from eopd.stages.engines.probe import served

        if self._sampler is not None or not self._fits_beside(ref, options):
            self.close()
        room = length if options.max_model_len else self._with_room(length, ref)
        engine = open_sampling_engine(kind, ref, max_model_len=room, log_dir=log_dir, options=options)
        ref = served(ref)
        self._sampler = _Sampler(engine, _wanted(kind, ref, room, options), ref)
        return self._sampler

    def _with_room(self, length: int, ref: ModelRef) -> int:
        if not self._keep:
            return length
        limit, boundary = longest_readable(_folder(ref)), length_boundary(_folder(ref))
        if boundary is not None and length <= boundary:
            limit = boundary  # an engine opened for more would scale the positions of all sequences otherwise
        roomy = -(-length // ROOM_TOKENS) * ROOM_TOKENS
        return roomy if limit is None else max(length, min(roomy, limit))

    def _fits_beside(self, ref: ModelRef, options: EngineOptions) -> bool:
        """True if an engine for ``ref`` fits into memory together with the other one."""
        if not self.any_open:
            return True
        import torch

        if torch.cuda.is_available() and options.device != "cpu":
            return False  # each takes the share of GPU memory that its options name, which is most of it
        needed = MEMORY_PER_WEIGHTS * weight_bytes(_folder(ref)) + options.cpu_kv_cache_gib * 2**30
        return needed < free_memory()


def _wanted(kind: EngineKind, ref: ModelRef, length: int, options: EngineOptions) -> tuple[object, ...]:
    from eopd.stages.engines.sampling_vllm import prefill_tokens

    shape = same_shape(_folder(ref)), ref.dtype, ref.trust_remote_code
    return (resolve_engine(kind), options, *shape, prefill_tokens(length))


def _folder(ref: ModelRef) -> Path:
    from eopd.stages.models.loading import model_folder

    return model_folder(ref.path, ref.revision)
