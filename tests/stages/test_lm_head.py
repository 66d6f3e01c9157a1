"""The LM head's traits against each architecture's own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eopd.stages.engines.hidden import full_model_logits
from eopd.stages.models.lm_head import STORED_ARCHITECTURES, LMHead, head_traits, lm_head_of
from eopd.stages.models.packing import Sequence, final_hidden, pack
from eopd.storage.errors import InputError
from tests.bounds import forward_rounding, rounding
from tests.raises import raises
from tests.stages.tiny_models import CONFIGS, REQUIRED, tiny_model
from tests.stages.tiny_zoo import PACKED, SERVED_BY_VLLM, UNPACKED


def test_every_architecture_whose_head_is_read_from_its_folder_has_a_tiny_model() -> None:
    built = {type(tiny_model(name)).__name__ for name in CONFIGS}
    built |= {f"{(PACKED | UNPACKED)[name][0]}ForCausalLM" for name in SERVED_BY_VLLM}
    assert built == set(STORED_ARCHITECTURES)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_packing_equal_the_model(name: str) -> None:
    model = tiny_model(name)
    generator = torch.Generator().manual_seed(1)
    sequences = []
    for context, response in [(5, 9), (12, 1), (1, 20), (30, 14), (3, 3), (2, 0)]:
        ids = torch.randint(3, 300, (context + response,), generator=generator).tolist()
        sequences.append(Sequence(ids[:context], ids[context:]))
    head = lm_head_of(model)
    seen = []
    with torch.no_grad():
        for packed in pack(sequences, row_tokens=48, token_budget=96):
            logits = head.logits(final_hidden(model, packed))
            parts = logits.split(packed.lengths)
            for number, part in zip(packed.order, parts, strict=True):
                sequence = sequences[number]
                ids = torch.tensor([[*sequence.context_ids, *sequence.response_ids]])
                own = model(ids).logits[0, len(sequence.context_ids) - 1 : -1].float()
                error = 2 * forward_rounding(max(1.0, float(own.abs().max())))  # of both
                torch.testing.assert_close(part, own, atol=error, rtol=0)
                assert own.std() > 0.05, "flat logits would hide a forgotten trait"
                seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "phi"])
def test_a_forgotten_trait_would_be_seen(name: str) -> None:
    model = tiny_model(name)
    head = lm_head_of(model)
    [packed] = pack([Sequence([5, 6], [7, 8, 9])], 16)
    with torch.no_grad():
        hidden = final_hidden(model, packed)
        bare = replace(head, scale=1.0, softcap=None, bias=None)
        assert (head.logits(hidden) - bare.logits(hidden)).abs().max() > 0.05


def test_gradients_reach_hidden_and_weight() -> None:
    model = tiny_model("gemma2")
    head = lm_head_of(model)
    hidden = torch.randn(3, 64, requires_grad=True)
    head.logits(hidden).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert torch.isfinite(head.weight.grad).all()


def test_bfloat16_is_accumulated_in_float32() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 256).bfloat16()
    hidden = torch.randn(4, 256).bfloat16()
    logits = LMHead(weight, None, 1.0, None, 50).logits(hidden)
    exact = hidden.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert ((logits - exact).abs() <= rounding(256, hidden.double().abs() @ weight.double().abs().T)).all()


def test_an_unknown_architecture_s_head_is_not_read_from_its_folder() -> None:
    with raises(InputError, "StrangeForCausalLM", setting="score.engine", file="folder", remedy="transformers"):
        head_traits("StrangeForCausalLM", Path("folder"))


def test_an_output_layer_that_is_not_linear_is_refused() -> None:
    model = tiny_model("llama")
    model.name_or_path = "folder"
    model.set_output_embeddings(nn.Sequential(model.get_output_embeddings()))
    with raises(InputError, "^folder: LlamaForCausalLM: .*Sequential", file="folder", remedy="quantisation"):
        lm_head_of(model)


@pytest.mark.parametrize("problem", ["read text alone", "do not come from its LM head"])
def test_a_model_whose_logits_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    model = tiny_model("llama")

    def forward(**_: Any) -> SimpleNamespace:
        if problem == "read text alone":
            raise TypeError("pixel_values are missing")
        return SimpleNamespace(logits=torch.zeros(1, 6, 320))

    monkeypatch.setattr(model, "forward", forward)
    with raises(InputError, f"LlamaForCausalLM.*{problem}"):
        lm_head_of(model)


def test_rows_that_are_not_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="64 rows"):
        LMHead(torch.zeros(64, 8), None, 1.0, None, 60)


@pytest.mark.parametrize("name", REQUIRED)
def test_the_check_s_own_logits_are_of_the_response_alone(name: str) -> None:
    model = tiny_model(name)
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda layer, given, out: widths.append(out.shape[1]))
    ids = torch.randint(3, 300, (44,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logits = full_model_logits(model, Sequence(ids[:40], ids[40:]), "cpu")
        expected = model(torch.tensor([ids])).logits[0, 39:-1]
    assert widths[0] == len(logits) == 4
    torch.testing.assert_close(logits, expected, atol=2 * forward_rounding(float(expected.abs().max())), rtol=0)
