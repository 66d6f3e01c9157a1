"""Isolation of a vLLM engine: quiet, offline, and without side effects after it is closed.

vLLM writes to stdout, sets environment variables, replaces ``torch.set_num_threads``, seeds the global generators
and keeps process groups. All of that holds only while the engine works, so that training can follow in the same
process with the engine still open. Several can be open at once, but they share process groups: closing one ends all.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from eopd.stages.engines.sampling import EngineOptions
from eopd.stages.job import ModelRef
from eopd.stages.models.loading import check_weights, model_folder
from eopd.stages.models.memory import give_back_gpu_memory
from eopd.stages.models.model_config import resolve_dtype
from eopd.stages.models.threads import set_threads
from eopd.stages.output import output_to
from eopd.storage.errors import InputError


class VLLMProcess:
    """One loaded ``vllm.LLM``. ``llm`` is used by the sampling and hidden-state engines; ``close`` ends it.

    Args:
        threads: number of threads on a CPU; None: ``options.cpu_threads``.
        arguments: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: its weights are refused by ``check_weights``; or vLLM cannot serve the model, with its reason and
            the path of its log.
    """

    _open: ClassVar[list[VLLMProcess]] = []

    def __init__(
        self,
        ref: ModelRef,
        *,
        log: Path,
        options: EngineOptions,
        threads: int | None = None,
        **arguments: Any,
    ) -> None:
        check_weights(ref)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.llm: Any = None
        self._threads = options.cpu_threads if threads is None else threads
        self._kept = _ProcessState()
        with output_to(log):
            import vllm
            from vllm.platforms import current_platform

            self.version = str(vllm.__version__)
            self.on_cpu = bool(current_platform.is_cpu())
            chosen = options.enforce_eager
            self._eager = self.on_cpu if chosen is None else chosen
            self._kept.remember_environment()
            self._handlers = _log_to(log)
            VLLMProcess._open.append(self)
            try:
                self._set_environment()
                if self.on_cpu:
                    self._set_threads()
                give_back_gpu_memory()  # of jobs before, those that failed too
                ours = nullcontext() if self.on_cpu else children_deaf_to_ctrl_c()
                warm_up = _without_warnings("vllm.renderers.base")  # of a chat template: engines get ids, no tokenizer
                with ours, self._eagerly(), _out_of_sight("llvmlite.binding.ffi"), warm_up:
                    _import_engine()
                    self.llm = vllm.LLM(**(self._arguments(ref, options) | arguments))
                if self.on_cpu:
                    _check_head_size(self.llm.llm_engine.model_config)
                _log_back([])
                _log_to(log)  # once more: making an engine sets vLLM's own handlers again
                self._inside = _ProcessState()
                self._kept.restore()
            except (ValueError, NotImplementedError, RuntimeError, OSError) as error:
                self._end_all()
                raise InputError(
                    f"vLLM {self.version} cannot serve {ref.path}: {_first_line(error)} (its log: {log})",
                    setting="engine",
                    file=ref.path,
                    remedy="Where this is a limit of vLLM and not of the model, set engine: transformers.",
                ) from error
            except BaseException:
                self._end_all()
                raise

    @contextmanager
    def working(self) -> Iterator[None]:
        """Wrap every use of ``llm``: inside, threads, environment and global generators are as they were when the
        engine was made, every time; outside, as its host left them."""
        outside = _ProcessState()
        self._inside.restore()
        if self.on_cpu:
            self._set_threads()
        try:
            with self._eagerly():
                yield
        finally:
            outside.restore()

    def _set_threads(self) -> None:
        if self._threads is not None:
            set_threads(self._threads)

    @contextmanager
    def _eagerly(self) -> Iterator[None]:
        """Disable vLLM's own small ``torch.compile`` calls in eager mode: they need a C++ compiler and seconds, and
        gain nothing there."""
        if not self._eager:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def load(self, ref: ModelRef) -> None:
        """Load the weights of ``ref``, a model of the same shape, in place. The caller must probe what is served then.

        Raises:
            ValueError: vLLM would not; the engine is of no more use.
        """
        check_weights(ref)
        folder = model_folder(ref.path, ref.revision)
        with output_to(self.log), self.working():
            try:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                if self.on_cpu:
                    self.llm.apply_model(_repack_head)
            except Exception as error:  # another process returns a plain Exception for any failure
                raise ValueError(f"vLLM {self.version} could not take the weights of {ref.path}: {error}") from error

    def close(self) -> None:
        """Free weights and KV cache and put the process back as it was; every other open engine ends with this one.

        Closing twice does no harm.
        """
        if self.llm is None:
            return
        with output_to(self.log):
            self._end_all()

    @classmethod
    def _end_all(cls) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        ended = list(reversed(cls._open))
        with _one_collection() if all(process.on_cpu for process in ended) else nullcontext():
            for process in ended:
                if process.llm is not None:
                    process.llm.llm_engine.engine_core.shutdown()
                process.llm = None
            cleanup_dist_env_and_memory()  # collects garbage, too
        for process in ended:
            process._kept.restore()
            _log_back(process._handlers)
        cls._open.clear()

    def _set_environment(self) -> None:
        # every file is local by now; a hub that cannot be reached must not cost minutes of retries
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.on_cpu:
            # a second process would cost its own import (10 to 30 s) and a tiny model half of its speed
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        else:
            # a fork of a process that has run torch on several threads hangs as soon as it does so itself
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
            # Triton would multiply float32 as tf32, in attention; half precision is not touched
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

    def _arguments(self, ref: ModelRef, options: EngineOptions) -> dict[str, Any]:
        folder = model_folder(ref.path, ref.revision)
        shared = {
            "model": str(folder),
            "dtype": resolve_dtype(folder, ref.dtype),
            "trust_remote_code": ref.trust_remote_code,
            "load_format": "safetensors",  # other formats can run code
            "config_format": "hf",  # not params.json, which comes with other weights
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # not the model folder's own sampling defaults
            "enable_prefix_caching": False,
            "enforce_eager": self._eager,
            "tensor_parallel_size": options.tensor_parallel,
            "disable_log_stats": True,
            "seed": 0,
        }
        if self.on_cpu:
            # with chunked prefill, per-request seeds crash on this backend
            memory = {"kv_cache_memory_bytes": int(options.cpu_kv_cache_gib * 2**30)}
            return shared | memory | {"enable_chunked_prefill": False}
        return shared | {"gpu_memory_utilization": options.gpu_memory_utilization}


def _import_engine() -> None:
    """Import what ``vllm.LLM`` needs, and exempt all objects so far from garbage collections until an engine is closed.

    vLLM collects several times while it starts, and would look through 700,000 objects each time.
    """
    if "vllm.entrypoints.llm" not in sys.modules:
        gc.collect()  # what is garbage now would stay
        importlib.import_module("vllm.entrypoints.llm")
        gc.freeze()


@contextmanager
def _one_collection() -> Iterator[None]:
    """Collect garbage once, at the end, in place of all collections inside. On a GPU each is followed by a release of
    what it has freed."""
    collect = gc.collect
    gc.collect = lambda *_, **__: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.collect()


@contextmanager
def children_deaf_to_ctrl_c() -> Iterator[None]:
    """Start child processes that ignore SIGINT, which a terminal sends to its whole foreground: vLLM's would end before
    we have finished the current part. SIGTERM ends them as before."""
    resource_tracker.ensure_running()  # its start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _out_of_sight(module: str) -> Iterator[None]:
    """Take ``module`` out of ``sys.modules``. On a CPU vLLM 0.32 looks through every loaded module for kernels to
    replace, and fails at the one of Numba's whose ``lib`` answers to any attribute, ``__dict__`` too."""
    hidden = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if hidden is not None:
            sys.modules[module] = hidden


@contextmanager
def _without_warnings(logger: str) -> Iterator[None]:
    """Let only errors of a module of vLLM through."""
    one = logging.getLogger(logger)
    level = one.level
    one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        one.setLevel(level)


def _repack_head(model: Any) -> None:
    """The CPU backend multiplies by repacked copies of the weights. Reloading renews them layer by layer, but a head
    that shares its weight with the embedding is loaded as the embedding, and would go on with its old copy."""
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(head, "quant_method", None) is not None:
        head.quant_method.process_weights_after_loading(head)


def _check_head_size(config: Any) -> None:
    """Check the head size, which vLLM on a CPU would refuse only at its first attention, in the middle of the work."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if not config.use_mla and size not in sizes:
        raise ValueError(f"head size {size} is none that its CPU attention has ({', '.join(map(str, sizes))})")


class _ProcessState:
    """The state of the host process that vLLM changes."""

    def __init__(self) -> None:
        self._set_num_threads = torch.set_num_threads
        self._threads = torch.get_num_threads()
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._affinity = os.sched_getaffinity(0)
        self._environment = dict(os.environ)

    def remember_environment(self) -> None:
        """Remember the environment, after the import of vLLM: what that sets, it sets only once."""
        self._environment = dict(os.environ)

    def restore(self) -> None:
        torch.set_num_threads = self._set_num_threads
        set_threads(self._threads)  # vLLM's function would leave the number as it is
        python, numpy, torch_state = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # a thread may end while we look
                os.sched_setaffinity(int(thread), self._affinity)


def _log_to(path: Path) -> list[logging.Handler]:
    """Send vLLM's logger to ``path``; returns the handlers it had."""
    logger = logging.getLogger("vllm")
    before = list(logger.handlers)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
    logger.handlers[:] = [handler]
    return before


def _log_back(handlers: list[logging.Handler]) -> None:
    logger = logging.getLogger("vllm")
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    logger.handlers[:] = handlers


def _first_line(error: BaseException) -> str:
    """Return the first line of an error; pydantic puts the reason on a line of its own, after "Value error, "."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    return lines[0]
