"""Upper bound on the bytes of a scores artifact for any teacher, from the head rule and the codec.

Letters: T tokens, S responses, P parts.
"""

from __future__ import annotations

import math

from eopd.storage.codec import CODE_EXTRA, COLUMNS, ID_EXTRA, MAX_ID, RAW_PLANES, STOP_EXTRA
from eopd.storage.quantise import ENTROPY_STEPS_PER_NAT, MAX_CODE
from eopd.storage.teacher_record import HeadRule

TOKEN_CHUNK, ENTRY_CHUNK = 4_096, 16_384  # of storage.zarr_part, which imports zarr; a test compares them
_MOST_ENTROPY = 25 * ENTROPY_STEPS_PER_NAT  # `quantise.encode_entropy` refuses more
_CHUNK_OVERHEAD = 2 * (16 + 4 + 16)  # Blosc's header, CRC32C and an entry of the shard's index, which has spare ones
_METADATA = 24_000  # four zarr.json files, 5 kB in practice


def most_bytes(
    head: HeadRule, *, stops: int, vocabulary: int, extra_k: int, tokens: int, responses: int, parts: int
) -> int:
    """Return a bound on the bytes of scores with so many tokens, responses and parts.

    Args:
        stops: stop ids.
        vocabulary: ids of the teacher; 0 if it is not known.
        extra_k: ids of the student's own top-k, a token.
    """
    columns, entries = _token(head, stops, min(vocabulary or MAX_ID, MAX_ID), extra_k)
    # a response's entries are rounded up; the bound is concave in T and S, so equal parts are the worst case
    t, s = tokens / parts, responses / parts
    planes = columns * _padded(t, TOKEN_CHUNK) + (2 + RAW_PLANES) * _padded(entries * t + s, ENTRY_CHUNK)
    chunks = 3 + t / TOKEN_CHUNK + (entries * t + s) / ENTRY_CHUNK
    return math.ceil(parts * (planes + 8 * s + _CHUNK_OVERHEAD * chunks + _METADATA + 200 * stops))


def _padded(length: float, chunk: int) -> float:
    """Bound the padded length: the last of several chunks is filled with zeros; a single one has at least 128."""
    return length + 128 + min(length, chunk)


def _token(head: HeadRule, stops: int, vocabulary: int, extra_k: int) -> tuple[int, float]:
    """Return bytes per token in ``tokens``, and entries per token: as many as its ids, or as its raw bits need."""
    k = min(head.k_max, vocabulary)
    draws = {"none": 0, "full": head.n_draws, "beyond_head": _most_draws(k, vocabulary, head.min_prob)}[head.draws]
    largest = {
        "head_size": k,
        "sampled": k,
        "draws": 2 * draws,
        "extras": extra_k,
        "entropy": _MOST_ENTROPY,
        "top": MAX_CODE,
        "tail": 2 * MAX_CODE + 1,
    }
    bits = sum(_raw_bits(largest[name], extra) for name, extra in COLUMNS)
    bits += stops * _raw_bits(MAX_CODE + 1, STOP_EXTRA)
    ids = k + 2 + draws + extra_k  # a sampled token outside the head stores its id and its rank
    codes = k - 1 + 1 + extra_k
    bits += ids * _raw_bits(vocabulary - 1, ID_EXTRA) + codes * _raw_bits(MAX_CODE, CODE_EXTRA)
    return len(COLUMNS) + stops, max(ids, bits / (8 * RAW_PLANES))


def _most_draws(k: int, vocabulary: int, weight: float) -> int:
    """Return the most systematic draws of ``weight`` beyond a head of at most ``k`` ids; repeats are stored.

    Beyond a head of k ids lies the mass of the V - k least probable ones: at most 1 - k/V. A shorter head holds every
    id of probability ``weight``, so each of the others makes less than one draw.
    """
    beyond_whole_head = (1.0 - k / vocabulary) / weight
    beyond_shorter_head = min(vocabulary - 1, 1.0 / weight) if k > 1 else 0.0
    # the rest is for rounding: one draw more by the place of the first, and sums of float32
    return math.floor(1.001 * max(beyond_whole_head, beyond_shorter_head)) + 2


def _raw_bits(largest: int, extra: int) -> int:
    """Return the raw bits of a number up to ``largest`` (``storage.symbols``)."""
    return max(largest.bit_length() - 1 - extra, 0)
