"""Hidden states from vLLM's pooling runner: paged, parallel and quantised models at prefill speed.

The runner drops the LM head, so its weights are read from the model folder. Letters: T scored tokens, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eopd.stages.engines.hidden import HiddenBatch, OwnLogits, reloaded_logits
from eopd.stages.engines.sampling import EngineOptions
from eopd.stages.engines.vllm_process import VLLMProcess
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import LMHead, stored_lm_head
from eopd.stages.models.loading import check_weights, model_folder
from eopd.stages.models.model_config import refuse_crossing, refuse_dynamic_positions, resolve_dtype
from eopd.stages.models.packing import Sequence
from eopd.storage.errors import InputError

TRANSFORMERS = "Set engine (in evaluate.alignment: teacher_engine): transformers"

# Architectures whose hidden states were seen to equal transformers' to 1e-6 (float32, CPU, vLLM 0.32). Of others,
# Cohere2 and GPT-NeoX differ by about the largest logit and Apertus by 1e-3; Olmo2, Phi and SmolLM3 do not start as
# pooling models. What vLLM serves through transformers' own classes (GLM, OLMo, OLMo 3, Seed-OSS, ...) is left out: on
# a CPU it changes those classes in this process, and the check against the full model can no longer load one.
KNOWN = frozenset(
    {
        "CohereForCausalLM",
        "Ernie4_5ForCausalLM",
        "Exaone4ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "LlamaForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "StableLmForCausalLM",
    }
)
MOST_AT_ONCE = 256


class VLLMHiddenEngine:
    """A ``HiddenEngine`` on vLLM, in this process on a CPU."""

    name = "vllm"
    note = ""
    checked = False

    def __init__(
        self, ref: ModelRef, *, longest: int, log_dir: Path, options: EngineOptions, batch_tokens: int
    ) -> None:
        folder = model_folder(ref.path, ref.revision)
        _refuse_unknown(folder)
        _refuse_other_positions(folder, ref.path, longest)
        self.dtype = resolve_dtype(folder, ref.dtype)
        self._ref, self._log, self._batch_tokens = (
            replace(ref, dtype=self.dtype),
            log_dir / "vllm-score.log",
            batch_tokens,
        )
        check_weights(ref)
        head = stored_lm_head(folder, self.dtype, trust_remote_code=ref.trust_remote_code)  # refuses before vLLM loads
        from vllm.config import PoolerConfig

        at_once = options.max_batch or MOST_AT_ONCE
        self._process = VLLMProcess(
            ref,
            log=self._log,
            options=options,
            # text is never seen, but the pooling runner insists on a tokenizer
            skip_tokenizer_init=False,
            tokenizer=str(model_folder(ref.tokenizer_path, ref.tokenizer_revision)),
            runner="pooling",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            # else half precision would leave the engine's process as float32, twice the bytes of the same numbers
            hf_overrides={"head_dtype": "model"},
            max_model_len=longest,
            max_num_batched_tokens=max(longest, batch_tokens, at_once),
            max_num_seqs=at_once,
            # a prompt read in pieces would be pooled in pieces
            enable_chunked_prefill=False,
        )
        self.version = self._process.version
        self._device = "cpu" if self._process.on_cpu else "cuda"
        self.head: LMHead = head.to(self._device)

    @property
    def is_open(self) -> bool:
        return self._process.llm is not None

    def hidden(self, sequences: SequenceOf[Sequence]) -> Iterator[HiddenBatch]:
        assert self._process.llm is not None, "the engine is closed"
        for numbers in _batches(sequences, self._batch_tokens):
            states = self._read([sequences[number] for number in numbers])
            hidden = torch.cat(states)
            yield HiddenBatch(hidden, tuple(numbers), tuple(len(state) for state in states))

    def _read(self, sequences: SequenceOf[Sequence]) -> list[Tensor]:
        prompts = [{"prompt_token_ids": [*s.context_ids, *s.response_ids[:-1]]} for s in sequences]
        with self._process.working():
            outputs = self._process.llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        states = []
        for sequence, output in zip(sequences, outputs, strict=True):
            state: Tensor = output.outputs.data
            assert state.shape[0] == sequence.input_length, (state.shape, sequence.input_length)
            states.append(state[len(sequence.context_ids) - 1 :])
        return states

    def own_logits(self, sequences: SequenceOf[Sequence]) -> OwnLogits | None:
        return reloaded_logits(self._ref, sequences)

    def close(self) -> None:
        self._process.close()
        del self.head


def is_known(folder: Path, longest: int) -> bool:
    """True if vLLM is known to read sequences of up to ``longest`` tokens as transformers does."""
    if _architecture(folder) not in KNOWN:
        return False
    try:
        _refuse_other_positions(folder, "", longest)
    except ValueError:
        return False
    return True


def _refuse_other_positions(folder: Path, name: str, longest: int) -> None:
    refuse_dynamic_positions(folder, name)
    refuse_crossing(
        folder,
        name,
        longest,
        "vLLM would read all of them with the scaling of the longest",
        TRANSFORMERS,
        "engine",
    )


def _architecture(folder: Path) -> str:
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")
    return str((names or ["none"])[0])


def _refuse_unknown(folder: Path) -> None:
    if _architecture(folder) not in KNOWN:
        raise InputError(
            f"architecture {_architecture(folder)!r} is refused with engine vllm, because its hidden states from "
            f"vLLM's pooling runner are not known to be right. Known: {', '.join(sorted(KNOWN))}",
            setting="engine",
            file=folder / "config.json",
            remedy=TRANSFORMERS,
        )


def _batches(sequences: SequenceOf[Sequence], batch_tokens: int) -> Iterator[list[int]]:
    """Yield numbers of consecutive sequences with a response, up to ``batch_tokens`` (at least one sequence) per
    batch."""
    numbers: list[int] = []
    tokens = 0
    for number, sequence in enumerate(sequences):
        if not len(sequence.response_ids):
            continue
        if numbers and tokens + sequence.input_length > batch_tokens:
            yield numbers
            numbers, tokens = [], 0
        numbers.append(number)
        tokens += sequence.input_length
    if numbers:
        yield numbers
