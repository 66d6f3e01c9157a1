"""A tiny store of every kind of artifact, and what somebody else may have put into it: for tests and fuzzing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from eopd.storage import paths, student_topk
from eopd.storage import records as analyses
from eopd.storage import records as evaluations
from eopd.storage import records as rollouts
from eopd.storage.artifacts import Artifact
from eopd.storage.files import canonical_json, sha256_file, sha256_text
from eopd.storage.identity import Identity
from eopd.storage.markers import file_text
from eopd.storage.notes import Note, write_note
from eopd.storage.teacher_record import HeadRule
from tests.storage.making import scores

DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0.5,
    2**40,
    2**63,
    10**400,
    "",
    "../../x",
    "/etc/passwd",
    "\x1b[2J",
    "\ud800",
    [],
    [[]],
    {},
    {"": None},
    [2**63, -1],
    float("nan"),
]


def make_store(store: Path) -> Path:
    """One artifact of each kind, of parts of a few rows; and a note on a run."""
    sampled = Artifact(store, Identity("rollouts", 1, 2, {"seed": 0}))
    for part in range(2):
        with sampled.write_part(part, info={"responses": 1, "tokens": 2}) as folder:
            rollouts.write_rollouts(folder, [_rollout(part)])
    result, _ = scores(store, 2, HeadRule(), vocabulary=50, lengths=[2])
    top = Artifact(store, Identity("student_topk", 1, 1, {"k": 1}, {"rollouts": sampled.key}))
    with top.write_part(0) as folder:
        ids = np.asarray([[3], [4]], np.int32)
        student_topk.write_student_topk(
            folder, student_topk.StudentTopk(np.asarray([2], np.int32), ids, -np.ones((2, 1), np.float32))
        )
    checkpoint = Artifact(store, Identity("checkpoints", 1, 2, {}, {"rollouts": sampled.key, "scores": result.key}))
    with checkpoint.write_part(0) as folder:
        row = {"round": 0, "step": 0, "epoch": 0, "tokens": 4.0, "rkl": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with checkpoint.write_part(1) as folder:
        save_file({"entropy": np.full(4, 0.25, np.float32)}, folder / "round_start.safetensors")
    evaluation = Artifact(store, Identity("evaluations", 1, 1, {}, {"policy": checkpoint.key, "benchmark b": "0" * 20}))
    with evaluation.write_part(0, info={"responses": 1}) as folder:
        evaluations.SAMPLES.write(folder, [])
    summary = Artifact(store, Identity("evaluation_summaries", 1, 1, {}, {"evaluation": evaluation.key}))
    with summary.write_part(0) as folder:
        problem = {"benchmark": "b", "problem_id": "0", "samples": 2, "correct": 1, "distinct_correct": 1}
        evaluations.PROBLEMS.write(folder, [{**problem, "response_tokens": 2.0, "truncated": 0}])
        (folder / evaluations.RESULTS).write_text(json.dumps(_results()))
    aligned = Artifact(store, Identity("alignments", 1, 1, {}, {"own evaluation": evaluation.key}))
    with aligned.write_part(0) as folder:
        analyses.ALIGNMENT_SUMS.write(folder, [])
    compared = Artifact(store, Identity("alignment_summaries", 1, 1, {}, {"alignments": aligned.key}))
    with compared.write_part(0) as folder:
        (folder / analyses.ALIGNMENT_RESULTS).write_text(json.dumps(_alignment()))
    made = {(one.kind, one.key) for one in (sampled, result, top, checkpoint, evaluation, summary, aligned, compared)}
    config = store / "runs" / "x" / "config.yaml"
    write_note(store, Note(config, store, (store / "team",), made, {(checkpoint.key, 0)}))
    return store


def _rollout(index: int) -> dict[str, Any]:
    return {
        "prompt_id": str(index),
        "prompt_index": index,
        "sample": 0,
        "prompt_token_ids": [1],
        "response_token_ids": [1, 2],
        "logprobs": [-1.0, -1.0],
        "finish_reason": "stop",
        "seed": 0,
    }


def _results() -> dict[str, Any]:
    figures = dict.fromkeys(
        ("distinct_correct", "self_bleu", "distinct_4", "token_entropy", "truncation_rate", "stop_rate"), 0.5
    )
    one = {
        **figures,
        "problems": 1,
        "samples": 2,
        "skipped": [],
        "ungraded": 0,
        "avg_at_k": 0.5,
        "avg_interval": [0.0, 1.0],
        "pass_at_k": {"1": 0.5, "2": 1.0},
        "pass_interval": {"1": None},
        "response_tokens": {"mean": 2.0},
    }
    return {"benchmarks": {"b": one}, "mean": one, "settings": {"confidence": 0.95}, "verifiers": ["exact 1"]}


def _alignment() -> dict[str, Any]:
    names = ("fkl", "rkl", "agreement", "student_entropy", "teacher_entropy", "student_above", "share", "tokens")
    means = {**dict.fromkeys(names, 0.5), "tokens": 3, "intervals": {"fkl": [0.0, 1.0]}}
    own = {"edges": [0.0, 1.0], "bins": [means], "all": means, "above": means, "below": means}
    settings = {"tau": 0.8, "temperature": 1.0, "merge_stops": True, "limit": None}
    return {
        "responses": {"own": own},
        "settings": settings,
        "teacher_prompt": {"kind": "same"},
        "teacher": {"fingerprint": "0" * 20},
        "artifact": {"inputs": {}},
    }


# -- what may be in the place of a file ----------------------------------------------------------------------------


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _outside(path: Path) -> None:
    path.symlink_to("/etc/hostname" if path.suffix else "/etc")


IN_ITS_PLACE: dict[str, Callable[[Path], object]] = {
    "a folder": _folder,
    "a link loop": _loop,
    "a link out of the store": _outside,
    "a dangling link": lambda path: path.symlink_to("/nonexistent/x"),
    "a named pipe": lambda path: os.mkfifo(path),
    "nothing": lambda path: None,
    "no bytes": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00" * 7),
    "JSON of 100,000 levels": lambda path: path.write_bytes(DEEP),
    "null": lambda path: path.write_text("null"),
    "a huge number": lambda path: path.write_text(f'{{"schema": {10**400}}}'),
}


def replace(path: Path, by: str) -> None:
    _remove(path)
    IN_ITS_PLACE[by](path)


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file() and not path.is_symlink())


# -- seals that hold ----------------------------------------------------------------------------------------------


def reseal(marker: Path, content: dict[str, Any]) -> None:
    """Write a marker of this content with a valid seal: what a careful forger would do."""
    content = {name: value for name, value in content.items() if name != "seal"}
    try:
        content["checksum"] = sha256_text(canonical_json(content.get("files")))
        text = file_text({**content, "seal": sha256_text(canonical_json(content))})
    except ValueError:  # of NaN and surrogates: no seal is valid
        text = json.dumps({**content, "seal": "0" * 64})
    marker.write_text(text)


def reseal_file(path: Path, content: bytes) -> None:
    """Replace a file of a part, and have the part's marker agree."""
    path.write_bytes(content)
    data = next(above for above in path.parents if paths.data_part(above.name))
    marker = data.parent / f"{data.name.split('.')[0]}.json"
    result = _marker(marker)
    if result is not None:
        entry = {"size": len(content), "sha256": sha256_file(path)}
        reseal(marker, {**result, "files": {**result["files"], path.relative_to(data).as_posix(): entry}})


def _marker(path: Path) -> dict[str, Any] | None:
    """None where an earlier change left none."""
    try:
        result = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and isinstance(result.get("files"), dict) else None


def rekey(folder: Path, content: dict[str, Any]) -> None:
    """Give an artifact another identity and the folder that its hash names; its markers follow."""
    names = ("kind", "version", "parts", "settings", "inputs")
    try:
        key = sha256_text(canonical_json({name: content.get(name) for name in names}))[:20]
    except ValueError:
        key = "0" * 20
    fresh = folder.parent.parent / key / folder.name if folder.parent.parent.name == "scores" else folder.parent / key
    fresh.parent.mkdir(exist_ok=True)
    folder.rename(fresh)
    (fresh / paths.IDENTITY).write_text(json.dumps(content))
    for marker in fresh.glob("part-*.json"):
        result = _marker(marker)
        if result is not None:
            reseal(marker, {**result, "key": f"{key}/{fresh.name}" if fresh.name != key else key})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys and indices that lead to it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for name, each in inner for place in places(each, (*path, name)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at a place."""
    if not place:
        return new
    first, *rest = place
    if isinstance(value, dict):
        return {**value, first: put(value[first], tuple(rest), new)}
    return [put(each, tuple(rest), new) if number == first else each for number, each in enumerate(value)]
