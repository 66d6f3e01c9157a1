"""Wheels that `scripts/gpu.sh` needs beside torch and transformers, for a machine without a network.

    python scripts/gpu_wheels.py fetch FOLDER [--python 3.12]    # with a network: download them
    python scripts/gpu_wheels.py unpack FOLDER TARGET            # on the machine: unpack those that are not installed

Versions are those of scripts/constraints-gpu.txt. Wheels of compiled packages are for Linux on x86-64 and the Python of
``--python``. Only the standard library is used, because nothing else may be installed yet.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "accelerate",
    "annotated-types",
    "donfig",
    "google-crc32c",
    "iniconfig",
    "liger-kernel",
    "llvmlite",
    "numba",
    "numcodecs",
    "pluggy",
    "psutil",
    "pydantic",
    "pydantic-core",
    "pygments",
    "pytest",
    "typing-inspection",
    "zarr",
)
LIMIT = 60 * 10**6
"""Bytes of all wheels together."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux_2_12_x86_64", "manylinux2014_x86_64")


def fetch(folder: Path, python: str) -> None:
    """Download the wheels into an empty folder, and compress the largest ones better until they fit ``LIMIT``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    constraints = Path(__file__).parent / "constraints-gpu.txt"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, *(f"--platform={platform}" for platform in PLATFORMS)]
    subprocess.run([*command, "--constraint", constraints, "--dest", folder, *PACKAGES], check=True)
    by_size = sorted(folder.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    for wheel in by_size:
        if total(folder) <= LIMIT:
            break
        compress(wheel)
    sys.stdout.write(f"{len(by_size)} wheels, {total(folder) / 1e6:.1f} MB in {folder}\n")
    if total(folder) > LIMIT:
        raise SystemExit(f"{folder} holds more than {LIMIT // 10**6} MB")


def total(folder: Path) -> int:
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def compress(wheel: Path) -> None:
    """Rewrite a wheel with LZMA, which takes minutes for the largest and saves about a third."""
    smaller = wheel.with_suffix(".lzma")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    smaller.replace(wheel)


def unpack(folder: Path, target: Path) -> list[str]:
    """Unpack the wheels whose packages this interpreter lacks into ``target``, and return their file names.

    Raises:
        SystemExit: a package is missing and its wheel is for another Python.
    """
    shutil.rmtree(target, ignore_errors=True)
    missing = [wheel for wheel in sorted(folder.glob("*.whl")) if not installed(wheel.name.split("-")[0])]
    for wheel in missing:
        python, abi = wheel.stem.split("-")[-3:-1]
        if abi.startswith("cp") and python != f"cp{sys.version_info.major}{sys.version_info.minor}":
            wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(f"{wheel} is for another Python; fetch the wheels again with --python {wanted}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in missing]


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch")
    fetching.add_argument("folder", type=Path)
    fetching.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.command == "fetch":
        fetch(options.folder, options.python)
    else:
        unpack(options.folder, options.target)


if __name__ == "__main__":
    main()
