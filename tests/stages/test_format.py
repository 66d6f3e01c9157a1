"""Quantities and untrusted text as people read them."""

from __future__ import annotations

import math

import pytest

from eopd.stages.format import decimal, duration, listed, number, printable, size


@pytest.mark.parametrize(
    ("text", "value", "form"),
    [
        ("0.221", 0.2214, ".3f"),
        ("−0.050", -0.05, ".3f"),
        ("0.0417", 0.04172, "#.3g"),
        ("12.3", 12.345, "#.3g"),
        ("123", 123.4, "#.3g"),
        ("2,048", 2048.0, "#.3g"),
        ("1.23e-06", 1.23e-6, "#.3g"),
        ("0.00", 0.0, "#.3g"),
        ("4.2%", 0.0417, ".1%"),
        ("–", None, ".3f"),
        ("–", math.nan, ".3f"),
        ("–", -math.inf, "#.3g"),
    ],
)
def test_decimals(text: str, value: float | None, form: str) -> None:
    assert decimal(value, form) == text


def test_changes_have_a_sign_unless_they_round_to_zero() -> None:
    assert [decimal(value, ".3f", signed=True) for value in (0.2111, -0.2, -0.0001)] == ["+0.211", "−0.200", "0.000"]


def test_sizes_counts_durations_and_lists() -> None:
    assert [size(999), size(1_234_000)] == ["999 B", "1.2 MB"]
    assert [number(950), number(12_345), number(4_560_000)] == ["950", "12.3k", "4.56M"]
    assert [duration(42), duration(250), duration(12_000)] == ["42 s", "4 min 10 s", "3 h 20 min"]
    assert [listed([]), listed([1]), listed([1, 2]), listed(["a", "b", "c"])] == ["", "1", "1 and 2", "a, b and c"]


def test_untrusted_text_is_printable() -> None:
    assert printable("a\x00b\u202ec\ud800\x7f\x1b[31m") == "a␀b⟨U+202E⟩c\ufffd␡␛[31m"
    assert printable("abcdef", 4) == "abc…"
