"""Records of the analyses of a student: alignment, routing and attribution.

Each is one Parquet file a part. The figures computed from them are a JSON file (``*_RESULTS``) of an artifact of their
own, which ``stages.report`` reads; those of routing lie beside the choices.
"""

from __future__ import annotations

import pyarrow as pa

from eopd.storage.records import RowRecord, named

ALIGNMENT_RESULTS = "alignment.json"
ATTRIBUTION_RESULTS = "attribution.json"
ROUTING_RESULTS = "routing.json"

_RESPONSE = [
    pa.field("benchmark", pa.string(), nullable=False),
    pa.field("problem_id", pa.string(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
]

ALIGNMENT_SUMS = RowRecord(
    "sums.parquet",
    pa.schema(
        [
            *_RESPONSE,
            pa.field("bin", pa.int32(), nullable=False),  # of teacher entropy, from 0
            pa.field("tokens", pa.float64(), nullable=False),
            # sums over these tokens; divergences and entropies in nats
            pa.field("fkl", pa.float64(), nullable=False),
            pa.field("rkl", pa.float64(), nullable=False),
            pa.field("agreement", pa.float64(), nullable=False),  # tokens whose most probable id is the same
            pa.field("teacher_entropy", pa.float64(), nullable=False),
            pa.field("student_entropy", pa.float64(), nullable=False),
            pa.field("student_above", pa.float64(), nullable=False),  # tokens whose student entropy exceeds tau
            pa.field("teacher_outside", pa.float64(), nullable=False),  # probability on ids the student lacks
            pa.field("student_outside", pa.float64(), nullable=False),
        ],
        metadata=named("alignment_sums"),
    ),
)
"""Sums over the tokens of one response in one bin of teacher entropy, without rows for empty bins. The part's marker
names the bins' edges."""

ENTROPIES = RowRecord(
    "entropies.parquet",
    pa.schema(
        [
            *_RESPONSE,
            # of the distribution before each of the first tokens, at temperature 1 over the full vocabulary, nats
            pa.field("entropy", pa.list_(pa.float32()), nullable=False),
        ],
        metadata=named("entropies"),
    ),
)
"""A model's entropies at the first tokens of one of its samples."""

ROUTING_CHOICES = RowRecord(
    "choices.parquet",
    pa.schema(
        [
            *_RESPONSE,
            pa.field("calibration", pa.bool_(), nullable=False),  # the rule was fitted to it, and no figure has it
            pa.field("mode", pa.string(), nullable=False),  # chosen
            pa.field("oracle", pa.string()),  # the right mode with the fewest tokens; null if none is right
            # null where the response is too short
            pa.field("entropy", pa.float64()),  # sum, nats
            pa.field("trend", pa.float64()),
            pa.field("roughness", pa.float64()),
        ],
        metadata=named("routing_choices"),
    ),
)
"""The mode chosen for a response by those entropies."""

ATTRIBUTION_SCORES = RowRecord(
    "scores.parquet",
    pa.schema(
        [
            pa.field("document", pa.string(), nullable=False),  # its id; of a rollout "prompt id/sample"
            pa.field("query_set", pa.string(), nullable=False),
            # inner product of the document's gradient, preconditioned and of unit length, with the query set's mean
            pa.field("score", pa.float32(), nullable=False),
        ],
        metadata=named("attribution_scores"),
    ),
)
"""The score of one document for a query set, in the documents' order."""
