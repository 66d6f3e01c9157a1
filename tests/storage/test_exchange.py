"""Tables that other trainers read, and captures with their columns: by stand-ins that know the columns alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from eopd.pipeline.cli.store import app
from eopd.storage.artifacts import Artifact
from eopd.storage.captures import AXOLOTL, DISTILLKIT, CaptureColumns, Wanted, columns_of, read_capture
from eopd.storage.errors import InputError
from eopd.storage.exchange import export_sequences
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts
from eopd.storage.teacher_cache import TeacherCache, write_part
from eopd.storage.teacher_record import HeadRule, TeacherRows
from tests.raises import raises

from .making import capture, dense, header, rows_of, scores

VOCABULARY = 60
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12]]
LENGTHS = [4, 9, 0, 3]  # of the third response nothing is scored


def scored(store: Path) -> tuple[Artifact, Artifact, TeacherRows]:
    """Scores of four responses, their rollouts, and the teacher's rows."""
    rows = rows_of(dense(1, LENGTHS, VOCABULARY, sharpness=1.5), HeadRule(k_max=12))
    rollouts = Artifact(store, Identity("rollouts", 1, 1, {"test": 1}))
    records: list[dict[str, Any]] = []
    for number, prompt in enumerate(PROMPTS):
        response = rows.token_ids[slice(*rows.response_offsets[number : number + 2])].tolist()
        records.append(
            {
                "prompt_id": str(number),
                "prompt_index": number,
                "sample": 0,
                "prompt_token_ids": prompt,
                "response_token_ids": response or [13],
                "finish_reason": "length",
                "seed": 0,
            }
        )
    with rollouts.write_part(0) as folder:
        write_rollouts(folder, records)
    artifact = Artifact(store, Identity("scores", 1, 1, {"test": 1}, {"rollouts": rollouts.key}, {"head": "test"}))
    with artifact.write_part(0) as folder:
        write_part(folder, rows, header(HeadRule(k_max=12), VOCABULARY))
    return artifact, rollouts, rows


@dataclass
class Batch:
    """A padded batch: ids and labels [S, L], and the teacher's lists [S, L, K]."""

    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    target_token_ids: np.ndarray[Any, Any]
    target_logprobs: np.ndarray[Any, Any]
    target_mask: np.ndarray[Any, Any]


def collated(path: Path) -> Batch:
    """Read pre-tokenised rows with top-k lists, as axolotl documents its columns for its KD plugin."""
    rows = pq.read_table(path).to_pylist()
    longest = max(len(row["input_ids"]) for row in rows)
    widest = max(len(entries) for row in rows for entries in row["target_logprobs"])

    def padded(name: str, filler: float, depth: int) -> np.ndarray[Any, Any]:
        out = np.full((len(rows), longest, widest)[: depth + 1], filler)
        for number, row in enumerate(rows):
            for place, value in enumerate(row[name]):
                if depth == 1:
                    out[number, place] = value
                else:
                    out[number, place, : len(value)] = value
        return out

    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)
    return Batch(
        padded("input_ids", 0, 1).astype(int),
        padded("labels", -100, 1).astype(int),
        padded("target_token_ids", 0, 2).astype(int),
        padded("target_logprobs", -1e9, 2),
        padded("target_mask", 0, 2).astype(bool),
    )


def test_sequences_are_read_by_a_trainer_that_knows_the_columns_alone(tmp_path: Path) -> None:
    artifact, rollouts, rows = scored(tmp_path)
    assert export_sequences(TeacherCache(artifact), rollouts, tmp_path / "kd.parquet") == (3, 16)
    batch = collated(tmp_path / "kd.parquet")
    student = dense(7, [batch.input_ids.size], VOCABULARY).logprobs.reshape(*batch.input_ids.shape, VOCABULARY)
    at_targets = np.take_along_axis(student, batch.target_token_ids, axis=2)
    divergence = np.where(
        batch.target_mask, np.exp(batch.target_logprobs) * (batch.target_logprobs - at_targets), 0.0
    ).sum(axis=2)
    for number, (response, prompt) in enumerate((i, PROMPTS[i]) for i in (0, 1, 3)):
        first, last = rows.response_offsets[response : response + 2]
        ids = rows.token_ids[first:last].tolist()
        length = len(prompt) + len(ids)
        assert batch.input_ids[number, :length].tolist() == prompt + ids
        assert batch.labels[number, :length].tolist() == [-100] * len(prompt) + ids
        scores_next = batch.target_mask[number].any(axis=1)
        assert scores_next.tolist() == [*(batch.labels[number, 1:] != -100), False]  # position j is of token j + 1
        for offset, token in enumerate(range(first, last)):
            entries = slice(*rows.head_offsets[token : token + 2])
            p, logp = np.exp(rows.head_logprobs[entries]), rows.head_logprobs[entries]
            q = student[number, len(prompt) - 1 + offset, rows.head_ids[entries]]
            expected = (p * (logp - q)).sum()
            assert divergence[number, len(prompt) - 1 + offset] == pytest.approx(expected, abs=0.05)
    assert np.isfinite(batch.target_logprobs).all()


def test_completion_masks_mark_what_the_labels_do(tmp_path: Path) -> None:
    """TRL's collator reads ids, and either labels or a completion mask."""
    artifact, rollouts, _ = scored(tmp_path)
    export_sequences(TeacherCache(artifact), rollouts, tmp_path / "kd.parquet")
    for row in pq.read_table(tmp_path / "kd.parquet").to_pylist():
        masked = [token if keep else -100 for token, keep in zip(row["input_ids"], row["completion_mask"], strict=True)]
        assert masked == row["labels"]


def test_an_export_that_is_imported_holds_the_same_heads(tmp_path: Path) -> None:
    artifact, rollouts, _ = scored(tmp_path)
    cache = TeacherCache(artifact)
    export_sequences(cache, rollouts, tmp_path / "kd.parquet")
    assert columns_of(tmp_path / "kd.parquet") == AXOLOTL
    rows, stored = read_capture(tmp_path / "kd.parquet", AXOLOTL, vocab_size=VOCABULARY).rows, cache.read_part(0)
    for name in ("token_ids", "head_offsets", "head_ids"):
        assert getattr(rows, name).tolist() == getattr(stored, name).tolist()
    np.testing.assert_allclose(rows.head_logprobs, stored.head_logprobs, atol=1e-6)
    assert np.diff(rows.response_offsets).tolist() == [length for length in LENGTHS if length]


def test_the_commands_export_and_import_the_columns(tmp_path: Path) -> None:
    artifact, _, _ = scored(tmp_path)
    said = invoke("export", artifact.key, tmp_path / "kd.parquet", "--format", "axolotl", "--store", tmp_path)
    assert "3 sequences, 16 tokens with log-probs at temperature 1" in said
    said = invoke(
        *("import", tmp_path / "kd.parquet", "--teacher", "t", "--tokenizer", "t", "--vocab-size", VOCABULARY),
        *("--store", tmp_path / "other"),
    )
    assert "16 tokens in 3 sequences" in said
    imported, _ = said.split(":", 1)
    with raises(InputError, "imported"):
        invoke("export", imported, tmp_path / "x.parquet", "--format", "axolotl", "--store", tmp_path / "other")
    alone, _ = scores(tmp_path / "alone", parts=1)
    with pytest.raises(ValueError, match="rollouts"):
        invoke("export", alone.key, tmp_path / "x.parquet", "--format", "axolotl", "--store", tmp_path / "alone")
    assert not (tmp_path / "x.parquet").exists()


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


ROW: dict[str, Any] = {
    "input_ids": [[5, 1, 2, 3]],
    "target_token_ids": [[[0, 0], [2, 0], [3, 1], [0, 0]]],
    "target_logprobs": [[[-1e9] * 2, [-0.2, -2.0], [-0.2, -1e9], [-1e9] * 2]],
    "target_mask": [[[0, 0], [1, 1], [1, 0], [0, 0]]],
}


def test_masked_positions_and_entries_are_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table(ROW), path := tmp_path / "kd.parquet")
    rows = read_capture(path, AXOLOTL, vocab_size=VOCABULARY).rows
    assert rows.token_ids.tolist() == [2, 3]
    assert rows.head_ids.tolist() == [2, 0, 3]
    assert np.diff(rows.head_offsets).tolist() == [2, 1]
    pq.write_table(pa.table({**ROW, "target_mask": [[[0, 0]] * 4]}), path)
    assert read_capture(path, AXOLOTL, vocab_size=VOCABULARY).rows.tokens == 0


@pytest.mark.parametrize(
    ("mask", "problem", "fields"),
    [
        ([[[1, 1], [0, 0], [1, 0], [0, 0]]], "position 1: masked", {"row": 0, "remedy": "split"}),
        ([[[0, 0], [1, 1], [1], [0, 0]]], "target_mask", {"row": 0}),
        ([[0, 1, 1, 0]], "column 'target_mask'", {"row": None}),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    tmp_path: Path, mask: list[Any], problem: str, fields: dict[str, Any]
) -> None:
    pq.write_table(pa.table({**ROW, "target_mask": mask}), path := tmp_path / "kd.parquet")
    with raises(InputError, problem, file=path, **fields):
        read_capture(path, AXOLOTL, vocab_size=VOCABULARY)


def test_columns_are_known_by_their_names(tmp_path: Path) -> None:
    capture(tmp_path / "distillkit.parquet", shifted=True)
    assert columns_of(tmp_path / "distillkit.parquet") == DISTILLKIT
    pq.write_table(pa.table({name: column for name, column in ROW.items() if name != "target_mask"}), tmp_path / "x")
    assert columns_of(tmp_path / "x") == CaptureColumns(top_ids="target_token_ids", top_logprobs="target_logprobs")


@pytest.mark.parametrize("shifted", [True, False])
def test_wanted_responses_come_in_their_order(tmp_path: Path, shifted: bool) -> None:
    table, _ = capture(path := tmp_path / "capture.parquet", shifted)
    whole = read_capture(path, shifted=shifted).rows
    ids = table["input_ids"].to_pylist()
    wanted = [Wanted(row, f"p{row}", ids[row][:cut], ids[row][cut:]) for row, cut in ((1, 3), (0, 2), (1, 3))]
    rows = read_capture(path, shifted=shifted, wanted=wanted).rows
    assert np.diff(rows.response_offsets).tolist() == [len(one.response) for one in wanted]
    starts = [whole.response_offsets[one.row] + len(one.prompt) - shifted for one in wanted]
    tokens = np.concatenate([np.arange(s, s + len(one.response)) for s, one in zip(starts, wanted, strict=True)])
    assert rows.token_ids.tolist() == whole.token_ids[tokens].tolist()
    assert rows.entropy.tolist() == whole.entropy[tokens].tolist()


@pytest.mark.parametrize(
    ("wanted", "problem", "fields"),
    [
        (Wanted(0, "p", [5, 1], [2, 4]), "other tokens.*number 3", {"row": 0, "prompt": "p"}),
        (Wanted(0, "p", [5, 1], [2, 3, 4]), "other tokens", {"row": 0, "prompt": "p"}),
        (Wanted(0, "p", [5], [1, 2, 3]), "token 1", {"row": 0, "prompt": "p"}),
        (Wanted(3, "p", [5], [1]), "1 rows, and row 3", {}),
    ],
)
def test_a_response_that_a_capture_does_not_hold_is_refused(
    tmp_path: Path, wanted: Wanted, problem: str, fields: dict[str, Any]
) -> None:
    pq.write_table(pa.table(ROW), path := tmp_path / "kd.parquet")
    with raises(InputError, problem, file=path, **fields):
        read_capture(path, AXOLOTL, vocab_size=VOCABULARY, wanted=[wanted])
