"""Packing: nothing lost, nothing twice, rows bounded, the right positions predicted from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eopd.stages.models.packing import Sequence, final_hidden, next_width, pack
from eopd.storage.errors import InputError
from tests.bounds import forward_rounding
from tests.raises import raises
from tests.stages.tiny_models import tiny_model

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=0, max_size=40)


def _sequences(lengths: list[tuple[int, int]]) -> list[Sequence]:
    return [
        Sequence([1000 * n + i for i in range(c)], [1000 * n + 500 + i for i in range(r)])
        for n, (c, r) in enumerate(lengths)
    ]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 96), st.integers(1, 400), st.booleans())
def test_every_response_token_is_predicted_once_from_the_token_before_it(
    lengths: list[tuple[int, int]], row_tokens: int, budget: int, few_widths: bool
) -> None:
    sequences = _sequences(lengths)
    batches = pack(sequences, row_tokens, budget, few_widths=few_widths)
    seen: list[int] = []
    for packed in batches:
        rows, width = packed.input_ids.shape
        assert rows == 1 or rows * width <= budget
        longest = max(row_tokens, max(s.input_length for s in sequences))
        assert width <= (next_width(longest) if few_widths else longest)
        flat, positions = packed.input_ids.flatten(), packed.position_ids.flatten()
        at = 0
        for number, length in zip(packed.order, packed.lengths, strict=True):
            sequence = sequences[number]
            index = packed.predict_index[at : at + length]
            before = [*sequence.context_ids, *sequence.response_ids][len(sequence.context_ids) - 1 : -1]
            assert flat[index].tolist() == before
            assert packed.target_ids[at : at + length].tolist() == list(sequence.response_ids)
            assert positions[index].tolist() == list(range(len(sequence.context_ids) - 1, sequence.input_length))
            at += length
            seen.append(number)
        assert at == packed.tokens
    assert sorted(seen) == [n for n, s in enumerate(sequences) if s.response_ids]
    again = pack(sequences, row_tokens, budget, few_widths=few_widths)
    assert [b.order for b in again] == [b.order for b in batches]


def test_padding_is_small_on_ordinary_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 200, (500,), generator=generator).tolist()
    sequences = _sequences([(4, length) for length in lengths])
    batches = pack(sequences, 512, 4096)
    cells = sum(b.input_ids.numel() for b in batches)
    assert sum(s.input_length for s in sequences) / cells > 0.97


def test_few_widths_are_little_more() -> None:
    widths = [next_width(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= width <= tokens * 1.125 for tokens, width in enumerate(widths, 1))
    assert len(set(widths)) < 90


@pytest.mark.parametrize("few_widths", [False, True])
def test_packed_equals_separate_over_ten_rows(few_widths: bool) -> None:
    model = tiny_model("qwen3")
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for number in range(40):
        ids = torch.randint(3, 300, (6 + number,), generator=generator).tolist()
        sequences.append(Sequence(ids[:4], ids[4:]))
    batches = pack(sequences, 96, 10 * 96, few_widths=few_widths)
    assert max(len(b.input_ids) for b in batches) >= 3
    with torch.no_grad():
        for packed in batches:
            parts = final_hidden(model, packed).split(packed.lengths)
            for number, part in zip(packed.order, parts, strict=True):
                [alone] = pack([sequences[number]], 96)
                expected = final_hidden(model, alone)
                error = 2 * forward_rounding(float(expected.abs().max()))  # of both
                torch.testing.assert_close(part, expected, atol=error, rtol=0)


def test_empty_context_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="sequence 1 has an empty context"):
        pack([Sequence([1], [2]), Sequence([], [3])], 8)


def test_unknown_attention_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    [packed] = pack([Sequence([1], [2])], 8)
    with raises(InputError, "LlamaForCausalLM.*flash_attention_2", remedy="sdpa"):
        final_hidden(model, packed)


def test_attention_that_leaves_out_soft_capping_is_refused() -> None:
    model = tiny_model("gemma2")
    model.set_attn_implementation("sdpa")
    [packed] = pack([Sequence([1], [2])], 8)
    with raises(InputError, "Gemma2ForCausalLM.*soft-capping", remedy="eager"):
        final_hidden(model, packed)
