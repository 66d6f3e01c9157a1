"""Settings: typed, with errors that name the key and the nearest right one; every committed config loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from eopd.pipeline.config import CONFIG_FOLDER, ConfigError, find_config, load_config, parse_settings, read_list
from eopd.pipeline.launchers.settings import RayResources, RaySettings, SlurmResources, SlurmSettings
from eopd.stages.settings import Settings
from tests.raises import raises

MINIMAL = """
name: x
student: {path: ./student}
teacher: {path: some/teacher}
prompts: {path: ../prompts.jsonl}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(MINIMAL)
    return path


COMMITTED = sorted(path for path in CONFIG_FOLDER.rglob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_committed_config_loads(path: Path) -> None:
    settings = load_config(str(path))
    assert settings.name
    assert settings.rounds >= 1


def test_there_are_committed_configs() -> None:
    names = {path.relative_to(CONFIG_FOLDER).with_suffix("").as_posix() for path in COMMITTED}
    assert {"quickstart", "gsm8k-demo", "paper/qwen3-0.6b", "paper/qwen3-1.7b", "paper/qwen3-4b"} <= names
    assert {"clusters/gpus", "clusters/ray", "clusters/slurm"} <= names
    assert find_config("quickstart").name == "quickstart.yaml"


def test_the_paper_presets_are_the_papers() -> None:
    for size in ("0.6b", "1.7b", "4b"):
        settings = load_config(f"paper/qwen3-{size}")
        objective, optimizer = settings.train.objective, settings.train.optimizer
        assert (objective.name, objective.tau, objective.alpha, objective.k) == ("eopd", 0.8, 1.0, 16)
        assert (objective.advantage, objective.ratio, objective.clip_eps) == ("old", "ppo", 0.2)
        assert (objective.support, objective.rkl, objective.stops) == ("renormalised", "sampled", "remap")
        assert (optimizer.lr, optimizer.schedule, optimizer.max_grad_norm) == (3e-6, "cosine", 1.0)
        assert (settings.rollout.prompts_per_round, settings.train.batch_responses) == (128, 32)
        assert settings.teacher.path == "Qwen/Qwen3-8B"
        assert settings.evaluate is not None
        assert (settings.evaluate.every, settings.train.keep_checkpoints) == (25, 2)


@pytest.mark.parametrize(("size", "longest"), [("1.7b", 2048), ("4b", 1024)])
def test_the_opsd_presets_are_the_papers(size: str, longest: int) -> None:
    settings = load_config(f"paper/opsd-qwen3-{size}")
    rollout, objective, lora = settings.rollout, settings.train.objective, settings.train.lora
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens) == (1.1, 0.95, 20, longest)
    assert (objective.name, objective.beta, settings.train.optimizer.lr) == ("jsd", 0.5, 2e-4)
    assert lora is not None
    assert (lora.rank, lora.alpha) == (64, 128)
    assert settings.teacher.student == "initial"
    assert settings.score.teacher_prompt.used == ("solution",)


def test_the_sd_zero_presets_are_three_phases_of_one_student() -> None:
    first, second, third = (load_config(f"paper/sd-zero-{phase}-qwen3-4b") for phase in (1, 2, 3))
    assert [one.student.run for one in (first, second, third)] == [None, first.name, second.name]
    assert [one.trained_tokens for one in (first, second, third)] == ["all", "after_text", "own"]
    assert (first.rollout.source, second.rollout.source, third.rollout.source) == ("revise", "revise", "student")
    shown = third.score.teacher_prompt
    assert shown.verdicts is not None
    assert shown.verdicts.wrong == first.rollout.revise.phrases.wrong
    assert (third.train.optimizer.lr, third.train.epochs, third.train.objective.k) == (5e-6, 5, 64)


def test_the_mixsd_preset_has_the_values_of_the_paper_s_code() -> None:
    settings = load_config("paper/mixsd-qwen3-1.7b")
    rollout, optimizer = settings.rollout, settings.train.optimizer
    assert rollout.attempts is not None
    assert (rollout.mixed.student_share, rollout.mixed.temperature, rollout.attempts.most) == (0.5, 0, 10)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-5, (0.9, 0.95), 0.01)
    assert (settings.train.epochs, settings.train.batch_responses) == (30, 16)


def test_paths_are_relative_to_the_file_that_states_them(minimal: Path, tmp_path: Path) -> None:
    settings = load_config(str(minimal))
    assert settings.student.path == str(tmp_path / "student")
    assert settings.prompts.path == str(tmp_path.parent / "prompts.jsonl")
    assert settings.teacher.path == "some/teacher"


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "home.yaml"
    config.write_text(MINIMAL.replace("../prompts.jsonl", "~/prompts.jsonl") + "store: [~/store, ~/team]\n")
    settings = load_config(str(config), ["runs=~/runs"])
    assert settings.prompts.path == str(tmp_path / "prompts.jsonl")
    assert (settings.store, settings.read_only_stores) == (str(tmp_path / "store"), [str(tmp_path / "team")])
    assert settings.runs == str(tmp_path / "runs")


def test_a_key_that_stands_twice_is_refused(minimal: Path, tmp_path: Path) -> None:
    """YAML would take the last one without a word: half of a `train:` that was written twice would be lost."""
    minimal.write_text(MINIMAL + "train: {epochs: 2}\nseed: 1\ntrain: {batch_responses: 8}\n")
    with raises(ConfigError, "line 6", file=minimal, line=8):
        load_config(str(minimal))
    shared = "one: &one {epochs: 2}\nsweep: [{name: a, train: {<<: *one, epochs: 3}}]\n"
    (tmp_path / "sweep.yaml").write_text(shared)
    assert read_list(tmp_path / "sweep.yaml", "sweep") == [{"name": "a", "train": {"epochs": 3}}]


def test_what_is_merged_is_merged_twice_and_not_given_twice(tmp_path: Path) -> None:
    """YAML's `<<`, of a group that merges another itself."""
    text = "b: &b {a: 1, k: 1}\nsweep: [{inner: &x {<<: *b, k: 2}}, {<<: *x}, {<<: *x, a: 3}]\n"
    (tmp_path / "sweep.yaml").write_text(text)
    assert read_list(tmp_path / "sweep.yaml", "sweep") == [
        {"inner": {"a": 1, "k": 2}},
        {"a": 1, "k": 2},
        {"a": 3, "k": 2},
    ]
    (tmp_path / "sweep.yaml").write_text(text.replace("k: 2", "k: 2, k: 3"))
    with raises(ConfigError, "'k'", file="sweep.yaml", line=2):
        read_list(tmp_path / "sweep.yaml", "sweep")


def test_overrides(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_config(str(minimal), ["train.optimizer.lr=1e-5", "rounds=3", "student.path=./elsewhere", "seed=7"])
    assert settings.train.optimizer.lr == 1e-5
    assert settings.rounds == 3
    assert settings.student.path == str(tmp_path / "elsewhere")


def test_extends_merges_group_by_group(minimal: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: ./x.yaml\nname: child\nstudent: {dtype: bfloat16}\n")
    settings = load_config(str(child))
    assert settings.name == "child"
    assert settings.student.path == str(tmp_path / "student")
    assert settings.student.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("override", "setting", "remedy"),
    [
        ("train.optimizer.lrr=1", "train.optimizer.lrr", "Did you mean train.optimizer.lr?"),
        ("rollout.temprature=1", "rollout.temprature", "Did you mean rollout.temperature?"),
        ("tran.epochs=2", "tran", "Did you mean train?"),
        ("train.epochs=many", "train.epochs", ""),
        ("train.epochs=0", "train.epochs", ""),
        ("train.objective.name=eopdd", "train.objective.name", ""),
        ("train.objective.name=mc_opd", "train.objective.name", ""),
        ("name=../x", "name", ""),
        ("rollout.engine_options.dtype=bfloat16", "rollout.engine_options.dtype", "set student.dtype"),
        (
            "evaluate={benchmarks: [{name: b, path: b}], engine_options: {dtype: float16}}",
            "evaluate.engine_options.dtype",
            "set student.dtype",
        ),
        ("rounds", "rounds", ""),
        ("train={epochs: 2, epochs: 3}", "train", "keep one"),
        ("prompts.verifier=maths", "prompts.verifier", ""),
        ("prompts={path: p, template: plain, system: s}", "prompts.system", "template: plain"),
        ("name.deeper=1", "name.deeper", ""),
    ],
)
def test_wrong_settings_are_named(minimal: Path, override: str, setting: str, remedy: str) -> None:
    with raises(ConfigError, setting=setting, remedy=remedy):
        load_config(str(minimal), [override])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with raises(ConfigError, remedy="Did you mean quickstart"):
        load_config("quikstart")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with raises(ConfigError, file=broken, line=1):
        load_config(str(broken))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Gauß".encode("latin-1"))
    with raises(ConfigError, "byte 9", file=latin, remedy="UTF-8"):
        load_config(str(latin))
    loop = tmp_path / "loop.yaml"
    loop.write_text("extends: ./loop.yaml\n")
    with raises(ConfigError, file=loop, setting="extends"):
        load_config(str(loop))
    orphan = tmp_path / "orphan.yaml"
    orphan.write_text("extends: ./gone.yaml\n")
    with raises(ConfigError, "does not exist", file=orphan, setting="extends"):
        load_config(str(orphan))


def settings_classes(base: type[Settings]) -> set[type[Settings]]:
    names = set(base.__subclasses__())
    return names.union(*(settings_classes(kind) for kind in names))


def test_every_setting_is_documented() -> None:
    for kind in settings_classes(Settings):
        assert issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name} has no description"


def numbers(annotation: Any, metadata: Sequence[Any]) -> Iterator[tuple[type, set[str]]]:
    """(int or float, names of its bounds) for every number in a field's type."""
    if get_origin(annotation) is Annotated:
        annotation, *own = get_args(annotation)
        metadata = [bound for item in own for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
    if annotation in (int, float):
        yield annotation, {type(bound).__name__ for bound in metadata}
    inside = [] if get_origin(annotation) in (tuple, list, dict) else metadata
    for inner in get_args(annotation):
        yield from numbers(inner, inside)


def test_every_number_has_two_bounds_and_is_finite() -> None:
    """So that a typo such as 1e12 is refused by its setting's name, and not by the machine that runs out of memory."""
    seen = 0
    for kind in settings_classes(Settings):
        assert kind.model_config["allow_inf_nan"] is False
        for name, field in kind.model_fields.items():
            for _, bounds in numbers(field.annotation, field.metadata):
                seen += 1
                assert bounds & {"Ge", "Gt"}, f"{kind.__name__}.{name} has no lower bound"
                assert bounds & {"Le", "Lt"}, f"{kind.__name__}.{name} has no upper bound"
    assert seen > 90


@pytest.mark.parametrize(
    "override",
    [
        "rollout.samples_per_prompt=1000000000000",
        "rollout.max_new_tokens=1000000000000",
        "rounds=100000000",
        "seed=-1",
        "seed=99999999999999999999",
        "score.head.seed=-1",
        "score.head.min_prob=5e-324",
        "score.head.min_prob=1.0e-7",
        "train.optimizer.lr=.nan",
        "train.optimizer.lr=.inf",
        "train.optimizer.lr=0",
        "train.optimizer.betas=[0.9, 1.0]",
        "train.optimizer.betas=[-0.1, 0.9]",
        "train.objective.tau=.nan",
        "train.cpu_threads=10000000",
        "train.head_chunk_tokens=0",
        "launcher.workers=1000000000",
        "launcher.gpus=[-1]",
        "launcher.slurm.tasks_at_once=0",
        "rollout.engine_options.cpu_threads=0",
        "max_store_bytes=1" + "0" * 400,
        "prompts.template_arguments.budget=.nan",
        "prompts.template_arguments.day=2024-01-01",
        "prompts.template_arguments.set=!!set {a, b}",
        'prompts.suffix="\\0"',
        'prompts.suffix="\\ud800"',
    ],
)
def test_numbers_and_values_that_cannot_be_are_named(minimal: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(str(minimal), [override])
    assert str(caught.value.setting).startswith(override.partition("=")[0])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: &a [*a]\n", "alias of itself"),
        ("name: &a {b: *a}\n", "alias of itself"),
        (BOMB, "aliases stand for more than"),
        (MERGED, "aliases stand for more than"),
        ("name: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("extends: 3\n", "`extends` must be the path"),
        ("extends: [a.yaml]\n", "`extends` must be the path"),
        ("extends: {a: b}\n", "`extends` must be the path"),
        ("extends: ''\n", "`extends` must be the path"),
        ("extends: ./\n", "`extends` names .*no file"),
        ("extends: /dev/null\n", "`extends` names /dev/null"),
        ("extends: ./gone.yaml\n", r"`extends` names .*gone\.yaml"),
        ("name: !!int x\n", "is not YAML"),
        ("name: !!bool x\n", "is not YAML"),
        ("name: !!timestamp x\n", "is not YAML"),
        ("name: !!python/object:os.system {}\n", "is not YAML"),
        ("name: 2024-13-45\n", "is not YAML"),
        ("name: " + "9" * 5000 + "\n", "is not YAML"),
        ("name: {? [a, b] : c}\n", "is not YAML"),
        ("--- a\n--- b\n", "is not YAML"),
        ("name: \x01\n", "is not YAML"),
        ("1: x\n", "1 in the settings must be text"),
        ("", "found NoneType"),
        ("- a\n", "found list"),
    ],
    ids=lambda text: text[:20],
)
def test_hostile_yaml_is_one_line_that_names_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with raises(ConfigError, words, file=path) as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 800


def test_anchors_that_are_shared_are_no_bomb(tmp_path: Path) -> None:
    shared = "base: &base {k: [1, 2]}\nsweep:\n" + "".join(f"- {{name: n{n}, train: *base}}\n" for n in range(1000))
    (tmp_path / "sweep.yaml").write_text(shared)
    assert len(read_list(tmp_path / "sweep.yaml", "sweep")) == 1000


def test_a_name_that_is_too_long_for_a_path_is_one_line() -> None:
    with pytest.raises(ConfigError, match="no config file 'x"):
        load_config("x" * 5000)


def test_where_and_how_fast_are_not_keyed(minimal: Path) -> None:
    one = load_config(str(minimal))
    other = load_config(str(minimal), ["train.micro_batch_tokens=128", "store=elsewhere", "name=y", "train.device=cpu"])
    changed = load_config(str(minimal), ["train.epochs=2"])
    assert one.train.semantic() == other.train.semantic()
    assert one.train.semantic() != changed.train.semantic()


def test_a_command_without_resources_of_its_own_has_the_general_ones() -> None:
    slurm = SlurmSettings(resources=SlurmResources(partition="all"), score=SlurmResources(gpus=2))
    assert (slurm.of("score").gpus, slurm.of("score").partition) == (2, "all")
    ray = RaySettings(resources=RayResources(cpus=3), score=RayResources(gpus=2))
    assert (ray.of("score").gpus, ray.of("score").cpus) == (2, 1)
    for command in ("token_counts", "resources", "workers", "setup", "of"):
        assert slurm.of(command) == slurm.resources
        assert ray.of(command) == ray.resources


def test_a_list_of_stores_is_one_to_write_and_others_to_read() -> None:
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    settings = parse_settings({**raw, "store": ["mine", "/team", "s3://team/x"]}, "test")
    assert (settings.store, settings.read_only_stores) == ("mine", ["/team", "s3://team/x"])
    assert parse_settings(settings.model_dump(mode="json"), "resolved") == settings
    assert parse_settings(raw, "test").semantic() == settings.semantic()
    for wrong, setting in (
        ({"store": []}, "store"),
        ({"store": ["a", "b"], "read_only_stores": ["c"]}, "read_only_stores"),
        ({"store": ["s3://x/y", "b"]}, "store"),
    ):
        with raises(ConfigError, setting=setting):
            parse_settings({**raw, **wrong}, "test")


def test_scoring_at_another_temperature_than_sampling_is_refused_at_once() -> None:
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    with raises(ConfigError, setting="score.temperature", remedy="score.allow_other_temperature"):
        parse_settings({**raw, "score": {"temperature": 0.5}}, "test")
    parse_settings({**raw, "score": {"temperature": 0.5, "allow_other_temperature": True}}, "test")
    parse_settings({**raw, "score": {"temperature": 0.7}, "rollout": {"temperature": 0.7}}, "test")


def test_a_length_of_an_engine_that_reads_is_refused() -> None:
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    length = {"engine_options": {"max_model_len": 64}}
    parse_settings({**raw, "rollout": length}, "test")
    benchmarks = [{"name": "b", "path": "b.jsonl"}]
    for reader, group in (
        ({"score": length}, "score"),
        ({"evaluate": {"benchmarks": benchmarks, "alignment": length}}, "evaluate.alignment"),
    ):
        with raises(ConfigError, setting=f"{group}.engine_options.max_model_len"):
            parse_settings({**raw, **reader}, "test")


PLAIN = {"path": "p", "template": "plain", "suffix": "\nAnswer:"}
CHAT = {"path": "p", "system": "Be brief.", "template_arguments": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("prompts", "asked", "result"),
    [
        (PLAIN, {}, ("plain", "\nAnswer:", None, {}, 512)),
        (CHAT, {}, ("chat", "", "Be brief.", {"enable_thinking": False}, 512)),
        (PLAIN, {"suffix": "", "max_new_tokens": 8192}, ("plain", "", None, {}, 8192)),
        (PLAIN, {"template": "chat"}, ("chat", "\nAnswer:", None, {}, 512)),
        (CHAT, {"template": "plain", "suffix": "?"}, ("plain", "?", None, {}, 512)),
        (CHAT, {"template": "chat"}, ("chat", "", None, {}, 512)),
        (CHAT, {"system": "Think."}, ("chat", "", "Think.", {"enable_thinking": False}, 512)),
    ],
)
def test_a_student_is_measured_on_prompts_as_it_is_trained_on_them(
    prompts: dict[str, object], asked: dict[str, object], result: tuple[object, ...]
) -> None:
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": prompts}
    benchmarks = [{"name": "b", "path": "b"}]
    raw |= {"rollout": {"max_new_tokens": 512}, "evaluate": {"benchmarks": benchmarks, **asked}}
    settings = parse_settings(raw, "test")
    evaluate = settings.evaluate
    assert evaluate is not None
    own = (evaluate.template, evaluate.suffix, evaluate.system, evaluate.template_arguments, evaluate.max_new_tokens)
    assert own == result
    assert parse_settings(settings.model_dump(mode="json"), "resolved") == settings
    names = ("template", "suffix", "system", "template_arguments", "max_new_tokens")
    stated = parse_settings({**raw, "evaluate": {"benchmarks": benchmarks, **dict(zip(names, own, strict=True))}}, "s")
    assert stated.semantic() == settings.semantic()


def test_a_format_that_does_not_fit_what_it_follows_is_refused() -> None:
    raw = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": PLAIN}
    with raises(ConfigError, setting="evaluate.template"):
        parse_settings({**raw, "evaluate": {"benchmarks": [{"name": "b", "path": "b"}], "system": "Be brief."}}, "test")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"store": []}, "test: `store` is an empty list; its first entry is the folder that is written to"),
        (
            {"prompts": {"path": "p", "template": "plain", "system": "s"}},
            "test: setting 'prompts.system': system and template",
        ),
        ({"train": {"objective": {"name": "jsd", "rkl": "topk"}}}, "test: setting 'train.objective.rkl': jsd does not"),
        ({"prompts": 3}, "test: setting 'prompts' is 3: "),
        ({"name": {"a": "b"}}, "test: setting 'name' is {'a': 'b'}: Input should be a valid string"),
    ],
)
def test_what_a_group_is_refused_for_is_said_without_the_group(raw: dict[str, object], message: str) -> None:
    rest = {"name": "x", "student": {"path": "s"}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    with pytest.raises(ConfigError) as caught:
        parse_settings({**rest, **raw}, "test")
    assert str(caught.value).startswith(message)
    assert ("{" in str(caught.value)) == ("{" in message or "{name: jsd}" in str(caught.value))


def test_a_list_is_not_said_to_be_short_because_an_item_is_refused(minimal: Path) -> None:
    change = "evaluate={benchmarks: [{name: x, path: y, columns: {answer: null}}]}"
    with pytest.raises(ConfigError) as refused:
        load_config(minimal, [change])
    assert refused.value.setting == "evaluate.benchmarks.0.columns.answer"
    assert "Tuple" not in str(refused.value)


def test_a_bare_word_is_an_objective_with_its_own_defaults(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "train: {objective: {name: eopd, alpha: 0.3, rkl: topk}}\n")
    word = load_config(str(minimal), ["train.objective=jsd"])
    assert word.train.objective == load_config(str(minimal), ["train.objective={name: jsd}"]).train.objective
    assert (word.train.objective.name, word.train.objective.beta) == ("jsd", 0.5)
    with raises(ConfigError, "nearest: 'jsd'", setting="train.objective.name"):
        load_config(str(minimal), ["train.objective=jsdd"])
    with raises(ConfigError, setting="train.objective.alpha", remedy="--set 'train.objective={name: jsd}'"):
        load_config(str(minimal), ["train.objective.name=jsd"])
