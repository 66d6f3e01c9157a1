"""Whole scoring with vLLM against what vLLM offers for it, on a random 0.85M-parameter Qwen3 with 512 tokens.

Both sides start from the same token ids and end with arrays of the same tokens' figures: ids and log-probs of 64
entries a token on vLLM's side; on ours also the exact entropy, tail, rank, draws and stop log-probs.

A random model's distributions are nearly flat (6.2 nats), which no teacher's are, and the flatter they are the more
there is to store. So the model's final norm is scaled until the mean entropy is the 1.26 nats that a Qwen3-8B teacher
was seen to have (docs/format.md; on the tokens of the whole stage it is 0.92). That is measured on the flat one
as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence as SequenceOf
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import alternate
from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.engines.open import open_hidden_engine
from eopd.stages.engines.sampling import EngineOptions
from eopd.stages.engines.vllm_process import VLLMProcess
from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.loading import load_tokenizer
from eopd.stages.models.packing import Sequence
from eopd.stages.score.draws import row_keys
from eopd.stages.score.job import ScoreJob
from eopd.stages.score.run import Scorer
from eopd.stages.score.settings import ScoreSettings
from eopd.stages.score.statistics import StatisticsHead
from eopd.stages.score.token_batch import TokenBatch
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.rollouts import write_rollouts
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import HeadRule
from tests.stages.score_case import response_row
from tests.stages.tiny_models import tiny_tokenizer

K = 64
CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
SHARPNESS = 18.0
"""Scale of the final norm: mean entropy 1.3 nats over 512 ids."""
SEQUENCES, LENGTH = 64, 133
PARTS, RESPONSES = 12, 128
STOPS = (2, 3)


def engines(repeats: int) -> dict[str, Any]:
    """Tokens/s of every way, and the ratios the goals are about."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ref, flat = _save_model(folder / "model", SHARPNESS), _save_model(folder / "flat", 1.0)
        sequences = _sequences(SEQUENCES)
        tokens = sum(len(sequence.response_ids) for sequence in sequences)
        seconds = _prompt_logprobs(ref, sequences, folder, repeats)
        with closing(_open(ref, folder)) as engine:
            seconds |= _ours(engine, sequences, repeats)
            whole = {rule: _whole_stage(engine, ref, folder, rule, repeats) for rule in ("default", f"top_{K}")}
        with closing(_open(flat, folder)) as engine:
            whole["default_flat"] = _whole_stage(engine, flat, folder / "of-flat", "default", repeats)
    return {
        "engines_tokens_per_s": {name: round(tokens / value) for name, value in seconds.items()},
        "speedup_vs_prompt_logprobs": seconds["prompt_logprobs"] / seconds["statistics"],
        "speedup_vs_flat_logprobs": seconds["flat_logprobs"] / seconds["statistics"],
        "fraction_of_prefill": whole["default"]["fraction"],
        "fraction_of_prefill_flat": whole["default_flat"]["fraction"],
        f"fraction_of_prefill_top_{K}": whole[f"top_{K}"]["fraction"],
        "whole_stage": whole,
    }


def _save_model(folder: Path, sharpness: float) -> ModelRef:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    with torch.no_grad():
        model.model.norm.weight.mul_(sharpness)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return ModelRef(str(folder), dtype="float32", fingerprint="random")


def _sequences(count: int, seed: int = 0) -> list[Sequence]:
    ids = np.random.default_rng(seed).integers(4, 512, (count, LENGTH)).tolist()
    return [Sequence(row[:1], row[1:]) for row in ids]


def _open(ref: ModelRef, folder: Path) -> HiddenEngine:
    return open_hidden_engine("vllm", ref, longest=LENGTH, log_dir=folder)


# -- vLLM's own ways -------------------------------------------------------------------------------------------


def _prompt_logprobs(ref: ModelRef, sequences: SequenceOf[Sequence], folder: Path, repeats: int) -> dict[str, float]:
    from vllm import SamplingParams

    process = VLLMProcess(
        ref,
        log=folder / "generate.log",
        options=EngineOptions(),
        max_model_len=LENGTH + 1,
        max_num_batched_tokens=16384,
        max_num_seqs=256,
        max_logprobs=K,
    )
    prompts = [{"prompt_token_ids": [*s.context_ids, *s.response_ids]} for s in sequences]

    def ask(flat: bool) -> None:
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=K, flat_logprobs=flat, detokenize=False
        )
        with process.working():
            outputs = process.llm.generate(prompts, parameters, use_tqdm=False)
        collect = _flat_arrays if flat else _dict_arrays
        for output, sequence in zip(outputs, sequences, strict=True):
            ids, logprobs = collect(output.prompt_logprobs)
            assert ids.shape == logprobs.shape == (len(sequence.response_ids), K)

    with closing(process):
        return alternate({"prompt_logprobs": lambda: ask(False), "flat_logprobs": lambda: ask(True)}, repeats)


def _dict_arrays(found: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[T, K] of each. The sampled token comes first, outside the top K or in it: the last K are dropped or kept so."""
    ids = np.asarray([list(entries)[-K:] for entries in found[1:]], np.int32)
    logprobs = np.asarray([[entry.logprob for entry in entries.values()][-K:] for entries in found[1:]], np.float32)
    return ids, logprobs


def _flat_arrays(found: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[T, K] of each; the last K entries of a position."""
    ids, logprobs = np.asarray(found.token_ids, np.int32), np.asarray(found.logprobs, np.float32)
    places = np.asarray(found.end_indices[1:])[:, None] + np.arange(-K, 0)[None, :]
    return ids[places], logprobs[places]


# -- ours ------------------------------------------------------------------------------------------------------


def _ours(engine: HiddenEngine, sequences: SequenceOf[Sequence], repeats: int) -> dict[str, float]:
    head = StatisticsHead(engine.head, HeadRule(k_max=K, full_head_above=-1.0), stop_ids=STOPS)

    def statistics() -> None:
        for batch in engine.hidden(sequences):
            sampled = np.concatenate([np.asarray(sequences[number].response_ids) for number in batch.order])
            found = head(batch.hidden, TokenBatch(sampled, row_keys(0, (0,), np.arange(len(sampled)))))
            assert len(found.head_ids) == K * len(sampled)

    def hidden() -> None:
        for _ in engine.hidden(sequences):
            pass

    return alternate({"statistics": statistics, "hidden_states_alone": hidden}, repeats)


def _whole_stage(engine: HiddenEngine, ref: ModelRef, folder: Path, rule: str, repeats: int) -> dict[str, float]:
    """From rollouts in the store to committed Zarr parts, against the hidden-state pass over the same sequences."""
    store = folder / rule
    source = Artifact(store, Identity("rollouts", 1, PARTS))
    sequences = _sequences(PARTS * RESPONSES, seed=1)
    for part in range(PARTS):
        mine = sequences[part * RESPONSES : (part + 1) * RESPONSES]
        with source.write_part(part) as staging:
            rows = [response_row(n, s.response_ids, prompt=s.context_ids) for n, s in enumerate(mine)]
            write_rollouts(staging, rows)
    head = {} if rule == "default" else {"k_max": K, "full_head_above": -1.0}
    settings = ScoreSettings.model_validate({"head": head, "first_batch_check": False})
    tokenizer = load_tokenizer(ref)
    attempts: list[Artifact] = []

    def stage() -> None:
        attempts.append(Artifact(store, Identity("scores", 1, PARTS, {"attempt": len(attempts)})))
        job = ScoreJob(
            output=attempts[-1],
            parts=range(PARTS),
            settings=settings,
            progress=NullProgress(),
            log_dir=store,
            rollouts=source,
            teacher=ref,
            student_tokenizer=ref.path,
            stop_ids=STOPS,
            rollout_temperature=1.0,
        )
        Scorer(job, tokenizer, 1.0).score(list(job.parts), engine)

    def hidden() -> None:
        for part in range(PARTS):
            for _ in engine.hidden(sequences[part * RESPONSES : (part + 1) * RESPONSES]):
                pass

    seconds = alternate({"stage": stage, "hidden": hidden}, repeats)
    tokens = sum(len(sequence.response_ids) for sequence in sequences)
    stored = sum(attempts[-1].marker(part).bytes for part in range(PARTS))
    return {
        "tokens_per_s": round(tokens / seconds["stage"]),
        "hidden_tokens_per_s": round(tokens / seconds["hidden"]),
        "fraction": seconds["hidden"] / seconds["stage"],
        "bytes_per_token": stored / tokens,
        "entropy_mean_nats": _entropy(attempts[-1]),
    }


def _entropy(scores: Artifact) -> float:
    """Mean of the first part's stored entropies, nats."""
    rows = TeacherCache(scores).read_part(0)
    return float(rows.entropy.mean())
