"""The vLLM engine: hidden states equal transformers' on tiny models, refusals, and a whole run."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from eopd.stages.engines.kept import Engines, open_hidden_engine
from eopd.stages.job import ModelRef
from eopd.stages.models.lm_head import stored_lm_head
from eopd.stages.models.loading import load_model
from eopd.stages.models.packing import Sequence, final_hidden, pack
from eopd.stages.score.run import run
from eopd.storage.errors import InputError
from eopd.storage.teacher_cache import TeacherCache
from eopd.storage.teacher_record import TeacherRows
from tests.bounds import forward_rounding, unit
from tests.raises import raises
from tests.stages.score_case import random_responses, response_row, rollouts, score_job
from tests.stages.tiny_models import CONFIGS, REQUIRED, save_teacher, tiny_model, tiny_tokenizer
from tests.stages.tiny_zoo import SERVED_BY_VLLM, zoo_model

pytestmark = pytest.mark.vllm

LENGTHS = [(5, 9), (12, 1), (1, 20), (30, 14), (3, 0), (3, 3)]
OTHERS = ("gemma", "gemma3", "granitemoe", "mixtral", "phi3", "qwen2_moe")


ALL_ENGINES = pytest.mark.skipif(
    "EOPD_ALL_ENGINES" not in os.environ, reason="opens 10 more engines; .ci/run sets EOPD_ALL_ENGINES"
)


def _save(name: str, folder: Path) -> PreTrainedModel:
    if name in CONFIGS:
        return save_teacher(name, folder)
    model = zoo_model(name)
    if model is None:
        pytest.skip("the installed transformers lacks it")
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model


def _sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for context, response in LENGTHS:
        ids = torch.randint(3, 300, (context + response,), generator=generator).tolist()
        sequences.append(Sequence(ids[:context], ids[context:]))
    return sequences


@pytest.mark.parametrize(
    "name",
    [
        *REQUIRED,
        *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
        *(pytest.param(name, marks=[pytest.mark.slow, ALL_ENGINES]) for name in SERVED_BY_VLLM),
    ],
)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    _save(name, tmp_path)
    sequences = _sequences()
    engine = open_hidden_engine("vllm", ModelRef(str(tmp_path)), longest=64, log_dir=tmp_path, batch_tokens=50)
    seen = []
    for batch in engine.hidden(sequences):
        for number, hidden in zip(batch.order, batch.hidden.split(batch.lengths), strict=True):
            reference = engine.own_logits([sequences[number]])
            assert reference is not None
            [own] = reference.logits
            logits = engine.head.logits(hidden)
            error = 2 * forward_rounding(max(1.0, float(own.abs().max())))  # of both
            torch.testing.assert_close(logits, own, atol=error, rtol=0)
            seen.append(number)
    engine.close()
    assert sorted(seen) == [0, 1, 2, 3, 5]


@pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ and torch.cpu._is_amx_tile_supported(),
    reason="vLLM uses AMX wherever the processor has it, and ends the process where oneDNN may not",
)
@pytest.mark.usefixtures("attention_in_half_precision")
def test_half_precision_comes_as_such_and_is_as_near_to_exact_as_its_rounding(tmp_path: Path) -> None:
    """On the way to a hidden state each of two layers rounds about 15 vectors, relative to their size, and the last
    norm once: 31 independent errors."""
    save_teacher("qwen3", tmp_path)
    ref, sequences = ModelRef(str(tmp_path), dtype="bfloat16"), _sequences()
    wide = load_model(ref).double()
    for kind in ("vllm", "transformers"):
        engine = open_hidden_engine(kind, ref, longest=64, log_dir=tmp_path, batch_tokens=500)  # type: ignore[arg-type]
        [batch] = engine.hidden(sequences)
        assert batch.hidden.dtype == torch.bfloat16
        for number, hidden in zip(batch.order, batch.hidden.double().split(batch.lengths), strict=True):
            with torch.no_grad():
                exact = final_hidden(wide, *pack([sequences[number]], 64))
            assert (hidden - exact).norm() <= math.sqrt(31) * unit(torch.bfloat16) * exact.norm()
        engine.close()


@pytest.mark.parametrize("name", ["cohere2", "phi"])
def test_what_is_not_known_to_be_right_is_refused_by_name(name: str, tmp_path: Path) -> None:
    save_teacher(name, tmp_path)
    architecture = type(tiny_model(name)).__name__
    with raises(InputError, architecture, setting="engine", file=tmp_path / "config.json", remedy="transformers"):
        open_hidden_engine("vllm", ModelRef(str(tmp_path)), longest=64, log_dir=tmp_path)
    assert open_hidden_engine("auto", ModelRef(str(tmp_path)), longest=64, log_dir=tmp_path).name == "transformers"


def rows_that_differ(a: TeacherRows, b: TeacherRows, kind: str) -> list[tuple[set[int], set[int]]]:
    """Ids of the heads or draws of every token in which ``a`` and ``b`` are not the same."""
    collected = []
    for rows in (a, b):
        ids, offsets = getattr(rows, f"{kind}_ids"), getattr(rows, f"{kind}_offsets")
        collected.append([tuple(ids[i:j].tolist()) for i, j in itertools.pairwise(offsets.tolist())])
    return [(set(one), set(other)) for one, other in zip(*collected, strict=True) if one != other]


def test_a_run_equals_the_transformers_engines(tmp_path: Path) -> None:
    save_teacher("qwen3", tmp_path / "teacher")
    data = [*random_responses(9), response_row(9, []), response_row(10, [2])]
    source = rollouts(tmp_path, [data[:5], data[5:]])
    by_vllm = score_job(tmp_path, tmp_path / "teacher", source, name="v", engine="vllm", batch_tokens=64)
    run(by_vllm)
    assert (tmp_path / "logs" / "vllm-score.log").stat().st_size > 0
    assert "checked against" in by_vllm.progress.lines[0]  # type: ignore[attr-defined]
    by_transformers = score_job(tmp_path, tmp_path / "teacher", source, name="t")
    run(by_transformers)
    one, other = (TeacherCache(job.output) for job in (by_vllm, by_transformers))
    assert one.header(0).engine == "vllm"
    for part in (0, 1):
        a, b = one.read_part(part), other.read_part(part)
        np.testing.assert_array_equal(a.response_offsets, b.response_offsets)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        # A stored value is at most a step of its quantiser off, and rounding may take either model to the next one.
        np.testing.assert_allclose(a.entropy, b.entropy, atol=4e-4)
        np.testing.assert_allclose(a.sampled_logprob, b.sampled_logprob, atol=1 / 128)
        # So it may where the head ends, between two entries that are nearly equal, and at a draw's border. All that
        # depends on the 6 decimals in which the engines differ, for one row in some thousands.
        other_heads, other_draws = (rows_that_differ(a, b, kind) for kind in ("head", "draw"))
        assert len(other_heads) <= 1
        assert len(other_draws) <= 1
        for ids, others in other_draws:
            assert len(ids ^ others) <= 2, "one draw fell to a neighbour"


@pytest.mark.parametrize("name", [*CONFIGS, *SERVED_BY_VLLM])
def test_the_stored_head_is_the_models(name: str, tmp_path: Path) -> None:
    from eopd.stages.models.lm_head import lm_head_of

    model = _save(name, tmp_path)
    stored, own = stored_lm_head(tmp_path, "float32"), lm_head_of(model)
    assert (stored.scale, stored.softcap, stored.vocab_size) == (own.scale, own.softcap, own.vocab_size)
    assert torch.equal(stored.weight, own.weight)
    assert (stored.bias is None) == (own.bias is None)
    assert stored.bias is None or torch.equal(stored.bias, own.bias)  # type: ignore[arg-type]


def test_a_sequence_as_long_as_the_teacher_reads_is_scored(tmp_path: Path) -> None:
    save_teacher("qwen3", tmp_path / "teacher")
    data = [response_row(0, np.random.default_rng(0).integers(3, 300, 254).tolist())]  # 256 tokens to read
    engines = Engines(keep=True)
    job = score_job(
        tmp_path, tmp_path / "teacher", rollouts(tmp_path, [data]), engine="vllm", batch_tokens=64, engines=engines
    )
    run(job)
    engines.close()
    assert TeacherCache(job.output).token_counts(0).tolist() == [254]
