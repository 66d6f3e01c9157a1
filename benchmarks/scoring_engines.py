"""The score stage on a real language model, against the model's own forward pass and against vLLM's log-probs.

Everything reads the same tokens of plain text (``benchmarks/real_model.py``) in float32 and is done in turn:

* ``forward``: the model's own forward pass with its logits, over rows of equal length and without padding;
* ``hidden/ENGINE``: the hidden states alone;
* ``stage/ENGINE``: the whole score stage, from rollouts in a store to committed Zarr parts: exact entropy, head,
  draws, tail, rank and stops of every token;
* ``prompt_logprobs``, ``flat_logprobs``: vLLM's ``prompt_logprobs=64`` until ids and log-probs are arrays: no entropy,
  no tail, nothing stored.

Ratios are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.machine import take_turns
from eopd.stages.engines.hidden import HiddenEngine
from eopd.stages.engines.kept import open_hidden_engine
from eopd.stages.engines.sampling import EngineOptions
from eopd.stages.engines.vllm_process import VLLMProcess
from eopd.stages.job import ModelRef, NullProgress
from eopd.stages.models.loading import load_model, load_tokenizer
from eopd.stages.models.packing import Sequence
from eopd.stages.models.tokenizers import vocabulary_fingerprint
from eopd.stages.score.responses import ScoreJob
from eopd.stages.score.run import Scorer
from eopd.stages.score.settings import ScoreSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.identity import Identity
from eopd.storage.records import write_rollouts
from eopd.storage.teacher_cache import TeacherCache
from tests.stages.score_case import response_row
from tests.stages.tiny_models import tiny_tokenizer

K = 64
PARTS = 2
ROWS = 4  # of the model's own forward pass at a time: its logits take 4 * 256 * V floats
QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SHARPNESS = 3.0
"""Scale of the random model's final norm, so that its distributions are not flat, as no teacher's are."""


def measure(
    ref: ModelRef, sequences: SequenceOf[Sequence], stops: tuple[int, ...], repeats: int, clock: str
) -> dict[str, Any]:
    """Tokens/s of every way, and the ratios the goals are about."""
    tokens = sum(len(sequence.response_ids) for sequence in sequences)
    kinds = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    longest = max(len(sequence.context_ids) + len(sequence.response_ids) for sequence in sequences)
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        tasks: dict[str, Callable[[], Any]] = {"forward": _forward(ref, sequences)}
        stages = {}
        for kind in kinds:
            engine = opened.enter_context(closing(open_hidden_engine(kind, ref, longest=longest, log_dir=folder)))
            tasks[f"hidden/{kind}"] = _hidden(engine, sequences)
            stages[kind] = _Stage(engine, ref, sequences, stops, folder / kind)
            tasks[f"stage/{kind}"] = stages[kind]
        if "vllm" in kinds:
            process = opened.enter_context(closing(_generating(ref, longest, folder)))
            tasks["prompt_logprobs"] = _prompt_logprobs(process, sequences, flat=False)
            tasks["flat_logprobs"] = _prompt_logprobs(process, sequences, flat=True)
        rounds = take_turns(tasks, repeats, {"wall": time.perf_counter, "cpu": time.process_time}[clock])
        result = stages[kinds[0]].figures()

    def ratio(slow: str, fast: str) -> float:
        return round(median(a / b for a, b in zip(rounds[slow], rounds[fast], strict=True)), 4)

    best = max(kinds, key=lambda kind: ratio("forward", f"stage/{kind}"))
    document = {
        "tokens": tokens,
        "tokens_per_s": {name: round(tokens / median(seconds), 1) for name, seconds in rounds.items()},
        "seconds": {name: [round(value, 3) for value in seconds] for name, seconds in rounds.items()},
        "fraction_of_forward": ratio("forward", f"stage/{best}"),
        "fraction_of_forward_by_engine": {kind: ratio("forward", f"stage/{kind}") for kind in kinds},
        "fraction_of_hidden_states": {kind: ratio(f"hidden/{kind}", f"stage/{kind}") for kind in kinds},
        "fastest_engine": best,
        **result,
    }
    if "vllm" in kinds:
        document["speedup_vs_prompt_logprobs"] = ratio("prompt_logprobs", f"stage/{best}")
        document["speedup_vs_flat_logprobs"] = ratio("flat_logprobs", f"stage/{best}")
    return document


def random_qwen3(folder: Path) -> ModelRef:
    """Random weights of Qwen3-0.6B's shape, V = 151,936, with a tokenizer that nothing is encoded with."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_0_6B))
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return ModelRef(str(folder), dtype="float32", fingerprint="random")


def random_sequences(count: int, length: int) -> list[Sequence]:
    ids = np.random.default_rng(0).integers(4, QWEN3_0_6B["vocab_size"], (count, length)).tolist()
    return [Sequence(row[:1], row[1:]) for row in ids]


# -- the model's own way ---------------------------------------------------------------------------------------


def _forward(ref: ModelRef, sequences: SequenceOf[Sequence]) -> Callable[[], None]:
    model: Any = load_model(ref)
    rows = torch.tensor([[*sequence.context_ids, *sequence.response_ids[:-1]] for sequence in sequences])

    @torch.inference_mode()
    def forward() -> None:
        for start in range(0, len(rows), ROWS):
            logits = model(input_ids=rows[start : start + ROWS], use_cache=False).logits
            assert logits.shape[-1] == model.config.vocab_size

    return forward


# -- vLLM's own ways -------------------------------------------------------------------------------------------


def _generating(ref: ModelRef, longest: int, folder: Path) -> VLLMProcess:
    return VLLMProcess(
        ref,
        log=folder / "generate.log",
        options=EngineOptions(),
        max_model_len=longest + 1,
        max_num_batched_tokens=4096,
        max_num_seqs=64,
        max_logprobs=K,
    )


def _prompt_logprobs(process: VLLMProcess, sequences: SequenceOf[Sequence], *, flat: bool) -> Callable[[], None]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [*s.context_ids, *s.response_ids]} for s in sequences]
    parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=K, flat_logprobs=flat, detokenize=False)
    collect = _flat_arrays if flat else _dict_arrays

    def ask() -> None:
        with process.working():
            outputs = process.llm.generate(prompts, parameters, use_tqdm=False)
        for output, sequence in zip(outputs, sequences, strict=True):
            ids, logprobs = collect(output.prompt_logprobs)
            assert ids.shape == logprobs.shape == (len(sequence.context_ids) + len(sequence.response_ids) - 1, K)

    return ask


def _dict_arrays(result: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[T, K] of each. The sampled token comes first, outside the top K or in it: the last K are dropped or kept so."""
    ids = np.asarray([list(entries)[-K:] for entries in result[1:]], np.int32)
    logprobs = np.asarray([[entry.logprob for entry in entries.values()][-K:] for entries in result[1:]], np.float32)
    return ids, logprobs


def _flat_arrays(result: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[T, K] of each; the last K entries of a position."""
    ids, logprobs = np.asarray(result.token_ids, np.int32), np.asarray(result.logprobs, np.float32)
    places = np.asarray(result.end_indices[1:])[:, None] + np.arange(-K, 0)[None, :]
    return ids[places], logprobs[places]


# -- ours ------------------------------------------------------------------------------------------------------


def _hidden(engine: HiddenEngine, sequences: SequenceOf[Sequence]) -> Callable[[], None]:
    def hidden() -> None:
        for _ in engine.hidden(sequences):
            pass

    return hidden


class _Stage:
    """The score stage; every call makes a new artifact. The tokenizer's fingerprint (a second for 49,152 ids), which a
    worker takes once for any number of tokens, is taken beforehand."""

    def __init__(
        self,
        engine: HiddenEngine,
        ref: ModelRef,
        sequences: SequenceOf[Sequence],
        stops: tuple[int, ...],
        store: Path,
    ) -> None:
        self._engine, self._ref, self._stops, self._store = engine, ref, stops, store
        self._tokenizer = load_tokenizer(ref)
        self._vocabulary = vocabulary_fingerprint(self._tokenizer)
        self._source = Artifact(store, Identity("rollouts", 1, PARTS))
        self._made: list[Artifact] = []
        for part in range(PARTS):
            rows = [
                response_row(number, sequence.response_ids, prompt=sequence.context_ids)
                for number, sequence in enumerate(sequences[part::PARTS])
            ]
            with self._source.write_part(part) as staging:
                write_rollouts(staging, rows)

    def __call__(self) -> None:
        self._made.append(Artifact(self._store, Identity("scores", 1, PARTS, {"attempt": len(self._made)})))
        job = ScoreJob(
            output=self._made[-1],
            parts=range(PARTS),
            settings=ScoreSettings.model_validate({"first_batch_check": False}),
            progress=NullProgress(),
            log_dir=self._store,
            rollouts=self._source,
            teacher=self._ref,
            student_tokenizer=self._ref.path,
            stop_ids=self._stops,
            rollout_temperature=1.0,
        )
        scorer = Scorer(job, self._tokenizer, 1.0)
        scorer._vocabulary = self._vocabulary
        scorer.score(list(job.parts), self._engine)

    def figures(self) -> dict[str, float]:
        scores = self._made[-1]
        rows = [TeacherCache(scores).read_part(part) for part in range(PARTS)]
        stored = sum(scores.marker(part).bytes for part in range(PARTS))
        return {
            "bytes_per_token": round(stored / sum(one.tokens for one in rows), 2),
            "entropy_mean_nats": round(float(np.concatenate([one.entropy for one in rows]).mean()), 3),
        }
