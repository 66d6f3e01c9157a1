"""The attribute jobs: a score for every document, by bergson in a process of its own, and the table of bins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eopd.stages.attribute import trackstar
from eopd.stages.attribute.documents import (
    Bin,
    Text,
    check_bins,
    check_texts,
    read_bins,
    read_documents,
    read_queries,
    read_rollout_documents,
)
from eopd.stages.attribute.settings import AttributeSettings, bergson_version, lacking_bergson
from eopd.stages.engines.kept import Engines
from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.intervals import bootstrap
from eopd.stages.job import ModelRef, Progress
from eopd.stages.models.model_config import longest_readable
from eopd.stages.models.prompts import PromptSettings
from eopd.stages.problems import Problems
from eopd.storage import records as analyses
from eopd.storage.artifacts import Artifact
from eopd.storage.claims import claimed_parts
from eopd.storage.errors import InputError, UserError

RESULTS_VERSION = 1
LAST_LINES = 3
"""Lines of bergson's log in the message of a failure."""


@dataclass(frozen=True)
class AttributeJob:
    """Scores of all documents for one query set, in one part."""

    output: Artifact
    query: str  # its name
    settings: AttributeSettings
    evaluation: Artifact
    evaluate: EvaluateSettings
    rollouts: Artifact | None  # the documents, unless they are a file
    prompts: PromptSettings  # how documents with prompts are rendered, and where bins of rollouts stand
    stop_ids: tuple[int, ...]
    policy: ModelRef
    seed: int
    log: Path  # of bergson
    progress: Progress
    engines: Engines = field(default_factory=Engines)  # of this process: closed before a GPU is used


@dataclass(frozen=True)
class AttributionSummaryJob:
    """Table of the bins of all query sets, in one part."""

    output: Artifact
    scores: Mapping[str, Artifact]  # by query set
    settings: AttributeSettings
    evaluate: EvaluateSettings  # whose resamples and confidence intervals have
    rollouts: Artifact | None
    prompts: PromptSettings
    seed: int
    progress: Progress


def run(job: AttributeJob) -> None:
    """Score every document.

    Raises:
        ValueError: bergson is not installed; a query set without samples; a document or sample, by its id, that has no
            gradient or is too long; bins too small for `contrasts`.
        RuntimeError: bergson failed; has the end of its log.
    """
    for _ in claimed_parts(job.output, [0], job.progress.line):
        lacking = lacking_bergson()
        if lacking is not None:
            raise lacking
        documents, queries, token_batch = _texts(job)
        tokens = sum(len(text.ids) for text in documents)
        job.progress.start(f"attribute to {job.query}", 0)
        try:
            with TemporaryDirectory(prefix="attribute-") as folder:
                scores, result = _compute(job, Path(folder), documents, queries, token_batch)
        finally:
            job.progress.close()
        info = {"responses": len(documents), "tokens": tokens, "queries": len(queries), "bergson": bergson_version()}
        rows = [
            {"document": text.name, "query_set": job.query, "score": score}
            for text, score in zip(documents, scores.tolist(), strict=True)
        ]
        with job.output.write_part(0, info={**info, **result}) as part:
            analyses.ATTRIBUTION_SCORES.write(part, rows)
        job.progress.line(f"attribute: {len(documents):,} documents for {len(queries):,} samples of {job.query}")


def _texts(job: AttributeJob) -> tuple[list[Text], list[Text], int]:
    """Return documents and samples, checked, and the tokens of a batch."""
    from eopd.stages.models.loading import load_tokenizer

    bins = [bin_ for _, bin_ in read_bins(job.settings, job.prompts, job.rollouts)]
    check_bins(job.settings, bins)
    tokenizer = load_tokenizer(job.policy)
    longest = min(
        job.settings.token_batch,
        longest_readable(Path(job.policy.path)) or job.settings.token_batch,
        int(tokenizer.model_max_length),
    )
    source = job.settings.documents
    if source is not None:
        documents = list(read_documents(source.source(job.prompts), tokenizer, job.stop_ids))
    else:
        assert job.rollouts is not None
        documents = list(read_rollout_documents(job.rollouts))
    check_texts("attribute.documents" if source is not None else "attribute.rollouts", documents, longest)
    query = job.settings.queries[job.query]
    queries = list(read_queries(job.evaluation, query, Problems(job.evaluate, tokenizer)))
    if not queries:
        which = "" if query.samples == "any" else f" that is {query.samples}"
        raise InputError(
            f"attribute.queries.{job.query}: the benchmark {query.benchmark} has no sample{which}",
            setting=f"attribute.queries.{job.query}",
            remedy="change samples, or raise evaluate.samples",
        )
    check_texts(f"attribute.queries.{job.query}", queries, longest)
    return documents, queries, longest


def _compute(
    job: AttributeJob, folder: Path, documents: list[Text], queries: list[Text], token_batch: int
) -> tuple[Floats, dict[str, Any]]:
    """Return the scores [documents] in their order, and what else the process reports."""
    import torch

    from eopd.stages.models.memory import give_back_gpu_memory

    order = np.argsort(np.random.PCG64(job.seed).random_raw(len(documents)), kind="stable")  # statistics read the first
    write_texts(folder / trackstar.DOCUMENTS, (documents[place] for place in order))
    write_texts(folder / trackstar.QUERIES, queries)
    task = trackstar.Task(
        model=job.policy.path,
        tokenizer=job.policy.tokenizer_path,
        trust_remote_code=job.policy.trust_remote_code,
        projection_dim=job.settings.projection_dim,
        downweight=job.settings.downweight,
        statistics=job.settings.statistics,
        token_batch=token_batch,
        seed=job.seed,
        cpu_threads=job.settings.cpu_threads,
    )
    (folder / trackstar.TASK).write_text(json.dumps(asdict(task)), encoding="utf-8")
    if torch.cuda.is_available():
        job.engines.close()
        give_back_gpu_memory()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        command = [sys.executable, "-m", trackstar.__name__, str(folder)]
        environment = trackstar.environment(folder)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
        problem = f"bergson ended with exit code {done.returncode}; {job.log} ends: {' | '.join(lines)}"
        raise UserError(problem, file=job.log)
    shuffled = np.load(folder / trackstar.SCORES, allow_pickle=False)
    if shuffled.shape != (len(documents),) or not np.isfinite(shuffled).all():
        problem = f"bergson gave scores that are no numbers, or not {len(documents):,} of them"
        raise UserError(problem, file=job.log, remedy=f"see {job.log}")
    scores = np.empty(len(documents), dtype=np.float64)
    scores[order] = shuffled
    result: dict[str, Any] = json.loads((folder / trackstar.RESULT).read_text(encoding="utf-8"))
    return scores, result


def write_texts(path: Path, texts: Iterable[Text]) -> None:
    """Write token ids and labels as bergson reads them."""
    schema = pa.schema([pa.field(name, pa.list_(pa.int64())) for name in ("input_ids", "labels")])
    rows = [{"input_ids": text.ids, "labels": text.labels} for text in texts]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


# -- the table of bins ------------------------------------------------------------------------------------------------


def summarise(job: AttributionSummaryJob) -> None:
    """Compute the table of bins from the scores of every query set.

    Raises:
        ValueError: the documents are no longer those that were scored.
    """
    for _ in claimed_parts(job.output, [0], job.progress.line):
        _write_summary(job)


def _write_summary(job: AttributionSummaryJob) -> None:
    settings, evaluate = job.settings, job.evaluate
    named = read_bins(settings, job.prompts, job.rollouts)
    bins = [bin_ for _, bin_ in named]
    check_bins(settings, bins)
    scores = {name: _scores(artifact, [document for document, _ in named]) for name, artifact in job.scores.items()}
    queries, markers = {}, {name: artifact.marker(0) for name, artifact in job.scores.items()}
    for name, values in scores.items():
        queries[name] = {
            **settings.queries[name].model_dump(mode="json"),
            "count": markers[name].info["queries"],
            "bins": bin_table(values, bins),
            "permutation": permutation_test(values, bins, settings.permutations, job.seed),
        }
    contrasts = [
        {
            "of": list(pair),
            "bins": contrast(
                scores[pair[0]], scores[pair[1]], bins, resamples=evaluate.resamples, confidence=evaluate.confidence
            ),
        }
        for pair in settings.contrasts
    ]
    results = {
        "record": "attribution_results",
        "version": RESULTS_VERSION,
        "documents": len(named),
        "columns": list(settings.bins),
        "queries": queries,
        "contrasts": contrasts,
        "confidence": evaluate.confidence,
        "bergson": sorted({str(marker.info["bergson"]) for marker in markers.values()}),
        "settings": settings.model_dump(mode="json"),
        "artifact": {"key": job.output.key, "inputs": dict(job.output.identity.inputs)},
    }
    with job.output.write_part(0, info={"responses": len(named)}) as folder:
        text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False)
        (folder / analyses.ATTRIBUTION_RESULTS).write_text(text, encoding="utf-8")
    for name, query in queries.items():
        top = max(query["bins"], key=lambda row: row["mean"])
        job.progress.line(
            f"attribute: {name}: the bin {' / '.join(top['bin'])} has the highest mean of {len(query['bins'])} bins "
            f"(permutation test of the bins: p = {query['permutation']['p']:.4f})"
        )


def _scores(artifact: Artifact, documents: list[str]) -> Floats:
    table = analyses.ATTRIBUTION_SCORES.read(artifact.part_folder(0))
    if table.column("document").to_pylist() != documents:
        raise InputError(
            f"the documents of {artifact} are not those that attribute.documents or attribute.rollouts hold now: "
            "they changed since they were scored",
            setting="attribute.documents",
            **artifact.place(),
            remedy="plan the run again",
        )
    return np.asarray(table.column("score").to_numpy(), dtype=np.float64)


# -- means, z-scores and contrasts ------------------------------------------------------------------------------------

# Figures of scores by bin: means and z-scores, a permutation test, contrasts of query sets.
#
# Letters: D documents, K bins.


Floats = NDArray[np.float64]


def bin_table(scores: Floats, bins: Sequence[Bin]) -> list[dict[str, Any]]:
    """Return n, mean, sd and z of the scores [D] in each bin, in order of the bins' values.

    z is the bin's mean minus the mean of the K means, over the standard deviation of the K means (K - 1 in the
    denominator). A standard deviation of fewer than two values is None, and so is z if all means are equal.
    """
    names, places = _grouped(bins)
    of_bin = [scores[places == number] for number in range(len(names))]
    means = np.array([values.mean() for values in of_bin])
    spread = float(means.std(ddof=1)) if len(means) > 1 and np.ptp(means) else 0.0
    return [
        {
            "bin": list(name),
            "n": len(values),
            "mean": float(mean),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            "z": float((mean - means.mean()) / spread) if spread else None,
        }
        for name, values, mean in zip(names, of_bin, means, strict=True)
    ]


def permutation_test(scores: Floats, bins: Sequence[Bin], permutations: int, seed: int) -> dict[str, Any]:
    """Test whether bins differ more than random bins of their sizes.

    Returns:
        ``between``: share of the scores' variance that lies between bins. ``p``: share of the permutations, the one
        that was observed among them, in which it is at least as large.
    """
    names, places = _grouped(bins)
    sizes = np.bincount(places)
    centred = scores - scores.mean()
    total = float((centred**2).sum())

    def between(values: Floats) -> float:
        return float((np.bincount(places, weights=values, minlength=len(names)) ** 2 / sizes).sum())

    observed = between(centred)
    rng = np.random.default_rng(seed)
    # sums of the same numbers in another order differ in their last digits
    as_large = sum(between(rng.permutation(centred)) >= observed * (1 - 1e-9) for _ in range(permutations))
    return {
        "between": observed / total if total else 0.0,
        "p": (1 + as_large) / (1 + permutations),
        "permutations": permutations,
    }


def contrast(
    first: Floats, second: Floats, bins: Sequence[Bin], *, resamples: int, confidence: float
) -> list[dict[str, Any]]:
    """Return for each bin the mean difference of two query sets' scores [D], with a bootstrap interval over documents.

    Each set's scores are first standardised over all documents (mean 0, standard deviation 1), since their scale
    depends on how much the set's own samples agree.
    """
    names, places = _grouped(bins)
    difference = _standardised(first) - _standardised(second)
    rows = []
    for number, name in enumerate(names):
        values = difference[places == number]
        interval = bootstrap(values[:, None], resamples=resamples, confidence=confidence)[0]
        bounds = None if interval is None else [interval.low, interval.high]
        rows.append({"bin": list(name), "n": len(values), "mean": float(values.mean()), "interval": bounds})
    return rows


def _standardised(scores: Floats) -> Floats:
    spread = float(scores.std())
    return (scores - scores.mean()) / spread if spread else np.zeros_like(scores)


def _grouped(bins: Sequence[Bin]) -> tuple[list[Bin], NDArray[np.int64]]:
    """Return the bins in order of their values, and the number of each document's bin [D]."""
    names = sorted(set(bins))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[bin_] for bin_ in bins], dtype=np.int64)
