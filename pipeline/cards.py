"""Cards (README.md) of what `eopd push` sends to the Hub: of a dataset that is a store, and of a student.

A card is front matter that the Hub reads, by huggingface_hub's own classes, and Markdown for people. Local folders are
named by their last part only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eopd.pipeline.export import Student, ends_of
from eopd.pipeline.run import Run
from eopd.stages.models.settings import ModelSettings, TeacherSettings
from eopd.storage.artifacts import Artifact
from eopd.storage.errors import DamagedPart
from eopd.storage.notes import notes
from eopd.storage.records import RESULTS
from eopd.storage.sources import filled_parts

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from eopd.storage.teacher_cache import TeacherCache

STATISTICS_PARTS = 16
"""Parts that a card's statistics are taken from: those of a large cache would take long."""
_SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("1M<n<10M", 1e7))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL_PATH = re.compile(r"(/|~|\.{1,2}/)\S*")
_RUN_KEYS = {"store", "read_only_stores", "runs", "launcher", "max_store_bytes", "sweep"}
"""Settings that say where a run works, and nothing about its student."""


def hub_id(path: str) -> str | None:
    """Return ``path`` if it names a model of the local hub cache, which is where runs load hub ids from."""
    from huggingface_hub import try_to_load_from_cache

    if not _HUB_ID.fullmatch(path) or Path(path).exists():
        return None
    return path if isinstance(try_to_load_from_cache(path, "config.json"), str) else None


def public_name(path: str) -> str:
    """Return a hub id unchanged, and the last part of any other path."""
    return hub_id(path) or Path(path).name


def without_folders(settings: Any) -> Any:
    """Return settings with the last part of every local path in its place."""
    if isinstance(settings, dict):
        return {name: public_name(value) if name == "path" and value else without_folders(value)
                for name, value in settings.items()}  # fmt: skip
    if isinstance(settings, list):
        return [without_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and _LOCAL_PATH.fullmatch(settings) else settings


def _table(rows: Sequence[Sequence[object]], header: Sequence[str] = ("", "")) -> str:
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, language: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n```{language}\n{text.strip()}\n```\n\n</details>"


# -- datasets ----------------------------------------------------------------------------------------------------------


def dataset_card(store: Path, artifacts: Sequence[Artifact], repo: str, licence: str) -> str:
    """Describe a dataset that is a store of ``artifacts``, the first of which is what it is about."""
    from huggingface_hub import DatasetCardData

    from eopd.storage.teacher_cache import TeacherCache

    main = artifacts[0]
    configs = [config for artifact in artifacts for config in _configs(artifact)]
    cache = TeacherCache(main) if main.kind == "scores" else None
    responses = _responses(artifacts, cache)
    data = DatasetCardData(
        license=licence,
        pretty_name=repo.split("/")[1],
        task_categories=["text-generation"],
        tags=["eopd", "distillation", *(["teacher-logits"] if cache else [])],
        size_categories=[next((name for name, most in _SIZES if responses < most), "10M<n<100M")],
        **({"configs": configs} if configs else {"viewer": False}),
    )
    names = _names(store, main)
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo.split('/')[1]}",
        _what_it_is(main, artifacts, cache, responses, names),
        *([_origin(cache, names), _statistics(cache), _recipe(cache, artifacts, repo)] if cache else []),
        *([] if cache else [_copying(main, repo)]),
        _viewing(configs, repo),
        *(_folded(f"What the key of {one.kind} hashes", "json", json.dumps(one.identity.to_json(), indent=1))
          for one in artifacts),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _configs(artifact: Artifact) -> Iterator[dict[str, str]]:
    """Name the Parquet files of an artifact, which `datasets` and the Hub's viewer read."""
    files = {name for part in filled_parts(artifact) for name in artifact.marker(part).files}
    tables = sorted(name for name in files if name.endswith(".parquet"))
    for name in tables:
        config = artifact.kind if len(tables) == 1 else f"{artifact.kind}_{Path(name).stem}"
        yield {"config_name": config, "data_files": f"{artifact.kind}/{artifact.key}/part-*/{name}"}


def _responses(artifacts: Sequence[Artifact], cache: TeacherCache | None) -> int:
    import pyarrow.parquet as pq

    if cache is not None:
        return sum(cache.response_count(part) for part in filled_parts(artifacts[0]))
    folders = [artifacts[0].part_folder(part) for part in filled_parts(artifacts[0])]
    return sum(pq.read_metadata(path).num_rows for folder in folders for path in folder.glob("*.parquet"))


def _names(store: Path, artifact: Artifact) -> dict[str, str]:
    """Name the models and prompts of an artifact by the config of a run that refers to it; empty if there is none."""
    for _, note in notes(store):
        if isinstance(note, DamagedPart) or (artifact.kind, artifact.key) not in note.artifacts:
            continue
        try:
            settings = yaml.safe_load(note.config.read_text(encoding="utf-8"))
            parts = {role: settings.get(role) or {} for role in ("teacher", "student", "prompts")}
            return {role: public_name(parts[role]["path"]) for role in parts if parts[role].get("path")}
        except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
            continue
    return {}


def _what_it_is(
    main: Artifact, artifacts: Sequence[Artifact], cache: TeacherCache | None, responses: int, names: Mapping[str, str]
) -> str:
    others = ", ".join(f"`{artifact.kind}`" for artifact in artifacts[1:])
    beside = f" The {others} that they belong to, with the prompts, are in the same repository." if others else ""
    if cache is None:
        return f"{responses:,} rows of `{main.kind}/{main.key}`, in the layout of an eopd store.{beside}"
    tokens = sum(int(cache.token_counts(part).sum()) for part in filled_parts(main))
    teacher = f"`{names['teacher']}`" if "teacher" in names else "a teacher"
    return (
        f"What {teacher} says about every token of {responses:,} responses ({tokens:,} tokens): its "
        "full-vocabulary entropy, its most probable tokens with their true log-probs, the mass of the rest and "
        "unbiased draws from it. A student can be distilled from that without the teacher, any number of times and "
        f"with any objective of eopd, which wrote it. The layout is that of an eopd store.{beside}"
    )


def _origin(cache: TeacherCache, names: Mapping[str, str]) -> str:
    header = cache.header(next(filled_parts(cache.artifact)))
    teacher = f"{names['teacher']}, " if "teacher" in names else ""
    estimated = [] if header.has_entropy else ["entropies"]
    estimated += [] if header.has_sampled else ["the sampled tokens' log-probs outside the heads"]
    rows: list[tuple[str, object]] = [
        ("teacher", f"{teacher}`{header.teacher}`"),
        ("what the teacher reads", f"`{header.teacher_context}`"),
        *((role, names[role]) for role in ("student", "prompts") if role in names),
        ("tokenizer", f"`{header.tokenizer}`, {header.vocab_size:,} ids"),
        ("temperature", f"{header.temperature:g}"),
        ("head rule", ", ".join(f"`{name}: {value}`" for name, value in asdict(header.head).items())),
        ("stop tokens", ", ".join(map(str, header.stop_ids)) or "none"),
        ("scored by", " ".join(filter(None, (header.engine, header.engine_version, header.dtype)))),
        *([("estimated, as the capture lacks them", ", ".join(estimated))] if estimated else []),
        ("key", f"`scores/{cache.artifact.key}`"),  # type: ignore[attr-defined]
    ]
    return f"## Where it comes from\n\n{_table(rows, ('what', 'value'))}"


def _statistics(cache: TeacherCache) -> str:
    from eopd.storage.statistics import stats

    parts = list(islice(filled_parts(cache.artifact), STATISTICS_PARTS))
    figures = stats(cache, parts)
    part = "" if len(parts) == len(list(filled_parts(cache.artifact))) else f" of the first {len(parts)} parts"
    rows = [
        ("bytes a token", f"{figures.bytes_per_token:.1f}"),
        ("teacher entropy, mean and median, nats", f"{figures.entropy_mean:.3f}, {figures.entropy_median:.3f}"),
        *((f"mass of the top {k}, at least", f"{mass:.4f}")
          for k, mass in figures.retained_mass.items()),
        *((f"tokens with entropy > {tau:g}", f"{share:.1%}") for tau, share in figures.gate_fraction.items()),
    ]  # fmt: skip
    return f"## Statistics{part}\n\n{_table(rows, ('what', 'value'))}"


_READ_SCORES = """\
from eopd.storage.listing import find
from eopd.storage.places import open_place
from eopd.storage.teacher_cache import TeacherCache

store = open_place("hf://datasets/{repo}")  # @REVISION behind it pins one; the folder of a copy works too
scores = find(store, "scores/{key}")
rows = TeacherCache(scores).read([({part}, {row})])  # (part, row) pairs in any order; only their chunks are fetched
print(rows.token_ids, rows.entropy, rows.sampled_logprob)

head = slice(*rows.head_offsets[:2])  # of the first token, most probable first
print(rows.head_ids[head], rows.head_logprobs[head], rows.tail_logmass[0])
"""
_READ_PROMPTS = """
from pathlib import Path

from eopd.storage.stacked import open_files
from eopd.storage.records import read_rollouts

rollouts = open_files(store, "rollouts", scores.identity.inputs["rollouts"], Path("fetched"))
table = read_rollouts(rollouts.part_folder({part}), ["prompt_id", "prompt_token_ids"])
print(table["prompt_id"][{row}], table["prompt_token_ids"][{row}])
"""


def _recipe(cache: TeacherCache, artifacts: Sequence[Artifact], repo: str) -> str:
    main = artifacts[0]
    lengths = ((part, cache.token_counts(part)) for part in filled_parts(main))
    part, row = next(((part, int(of.argmax())) for part, of in lengths if of.any()), (0, 0))
    code = _READ_SCORES
    if any(artifact.kind == "rollouts" for artifact in artifacts):
        code += _READ_PROMPTS
    code = code.format(repo=repo, key=main.key, part=part, row=row)
    return f"## How to read it\n\n```python\n{code}```\n\n{_copying(main, repo)}"


def _copying(main: Artifact, repo: str) -> str:
    return (
        f"`eopd store copy {main.kind}/{main.key} store --inputs --store hf://datasets/{repo}` copies it into the "
        f"folder `store` and checks every byte. In a config, `store: [store, hf://datasets/{repo}]` reads it in place. "
        "`docs/format.md` of eopd describes the bytes for readers without it."
    )


def _viewing(configs: Sequence[Mapping[str, str]], repo: str) -> str:
    if not configs:
        return ""
    calls = "\n".join(f'load_dataset("{repo}", "{config["config_name"]}")' for config in configs)
    return f"The tables are also read by `datasets`:\n\n```python\nfrom datasets import load_dataset\n\n{calls}\n```"


# -- students ----------------------------------------------------------------------------------------------------------


def student_card(run: Run, student: Student, repo: str, licence: str) -> str:
    """Describe a student: what it was trained from and how, and what its evaluations measured."""
    from huggingface_hub import ModelCardData

    settings, name = run.settings, repo.split("/")[1]
    results = _results(run, student.round)
    first = _results(run, 0) if student.round else {}
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=hub_id(settings.student.path) if settings.student.path else None,
        tags=["eopd", "distillation"],
        **({"model_name": name, "eval_results": list(_eval_results(results))} if results else {}),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"A student of the run `{settings.name}`, distilled with eopd ({student}). The teacher read the responses "
        "once, and the student was trained on what was stored.",
        f"## Lineage\n\n{_table(_lineage(run, student), ('what', 'value'))}",
        _measured(run, results, first),
        _use(run, student, repo),
        *([_folded("What it was trained on", "text", _trained_on(run, student))] if student.round else []),
        _folded("Settings", "yaml", yaml.safe_dump(_published(settings.model_dump(mode="json")), sort_keys=False)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _published(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: without_folders(value) for name, value in settings.items() if name not in _RUN_KEYS}


def _lineage(run: Run, student: Student) -> list[tuple[str, object]]:
    settings, facts = run.settings, run.facts
    objective, optimizer = settings.train.objective, settings.train.optimizer

    rows: list[tuple[str, object]] = [
        ("first student", f"{_named(settings.student)}, `{facts.student.fingerprint}`"),
        *(
            (f"teacher {name}".strip(), _teacher(teacher, facts.teacher_models[name].fingerprint))
            for name, teacher in settings.teachers.items()
        ),
        ("prompts", f"{public_name(settings.prompts.path)}, {facts.prompt_count:,} rows"),
        ("rounds of training", f"{student.round} of {settings.rounds}"),
        ("objective", f"`{objective.name}`"),
        ("learning rate, seed", f"{optimizer.lr:g}, {settings.seed}"),
    ]
    return rows


def _trained_on(run: Run, student: Student) -> str:
    """List the artifacts that a student was trained on, by round."""
    made = [
        job for job in run.plan.jobs if job.round < student.round and job.stage.name in ("rollout", "score", "train")
    ]
    return "\n".join(f"round {job.round}  {job.output.kind}/{job.output.key}" for job in made)


def _teacher(settings: TeacherSettings, fingerprint: str) -> str:
    if settings.student is not None:
        return f"the student itself (`teacher.student: {settings.student}`)"
    if settings.capture is not None:
        return f"the capture {public_name(settings.capture.path)}, `{fingerprint}`"
    return f"{_named(settings)}, `{fingerprint}`"


def _named(model: ModelSettings) -> str:
    if model.path is not None:
        return public_name(model.path)
    return f"a student of the run {model.run}"


def _results(run: Run, round_: int) -> dict[str, dict[str, Any]]:
    """Return the figures of a student by benchmark; empty if it was not evaluated."""
    job = run.plan.find("evaluation_summary", round_)
    if job is None or not run.is_made(job):
        return {}
    content = json.loads((run.artifact(job.output).part_folder(0) / RESULTS).read_text(encoding="utf-8"))
    benchmarks: dict[str, dict[str, Any]] = content["benchmarks"]
    return benchmarks


def _figures(result: Mapping[str, Any]) -> list[tuple[str, float, list[float]]]:
    """Return (name, value, interval) of what a card shows of a benchmark."""
    k = str(max(map(int, result["pass_at_k"])))
    return [
        (f"Avg@{result['samples']}", result["avg_at_k"], result["avg_interval"]),
        (f"Pass@{k}", result["pass_at_k"][k], result["pass_interval"][k]),
    ]


def _eval_results(results: Mapping[str, Mapping[str, Any]]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for benchmark, result in results.items():
        for metric, value, _ in _figures(result):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=benchmark,
                dataset_name=benchmark,
                metric_type=metric.split("@")[0].lower() + "_at_k",
                metric_name=metric,
                metric_value=round(value, 6),
            )


def _measured(run: Run, results: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    evaluate = run.settings.evaluate
    if not results or evaluate is None:
        return "## Results\n\nThis student was not evaluated by its run."
    rows = []
    for benchmark, result in results.items():
        before = {metric: value for metric, value, _ in _figures(first[benchmark])} if benchmark in first else {}
        for metric, value, (low, high) in _figures(result):
            start = f"{before[metric]:.3f}" if metric in before else ""
            rows.append((benchmark, metric, f"{value:.3f} [{low:.3f}, {high:.3f}]", start, result["problems"]))
    table = _table(rows, ("benchmark", "figure", "this student", "before training", "problems"))
    return (
        f"## Results\n\n{table}\n\nIntervals ({evaluate.confidence:.0%}) are over problems; they say nothing about "
        "other seeds. Avg@k is the share of right samples, Pass@k the probability that one of k is right."
    )


def _use(run: Run, student: Student, repo: str) -> str:
    prompts = run.settings.prompts
    prompted = (
        "Prompts went through the tokenizer's chat template."
        if prompts.template == "chat"
        else "Prompts were plain text, without a chat template."
    )
    suffix = f" Each ended with {prompts.suffix!r}." if prompts.suffix else ""
    return (
        f'## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nname = "{repo}"\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)\n```\n\n"
        f"{prompted}{suffix} The {ends_of(run, student).split(', but ')[0]}."
    )
