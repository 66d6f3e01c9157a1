"""The dependency direction (pipeline -> stages -> storage) and what importing costs, read from the source and run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "numba", "vllm", "transformers", "accelerate", "datasets", "math_verify", "matplotlib"}
SHARED = {
    f"eopd.stages.{name}"
    for name in (
        *("engines", "experiment", "experiment_settings", "format", "intervals", "job"),
        *("memory", "models", "output", "problems", "settings", "stage", "verifiers"),
    )
}
# what `pipeline` may import at module level, beside every `settings` and `stage`: it needs no torch
LIGHT = (
    "eopd.stages.engines.sampling",
    "eopd.stages.experiment",
    "eopd.stages.experiment_settings",
    "eopd.stages.format",
    "eopd.stages.job",
    "eopd.stages.memory",
    "eopd.stages.models.chat_templates",
    "eopd.stages.models.model_config",
    "eopd.stages.models.gguf",
    "eopd.stages.models.memory",
    "eopd.stages.models.prompts",
    "eopd.stages.models.teacher_prompts",
    "eopd.stages.models.weight_files",
    "eopd.stages.table",
    "eopd.stages.train.stage",
    "eopd.stages.train.settings",
)


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield f"eopd.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}", ast.parse(path.read_text())


def imports(tree: ast.AST, *, top_level: bool) -> set[str]:
    """Modules that are imported; with ``top_level`` only where importing the module runs the import."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            names |= imports(node, top_level=top_level)
    return names


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_light(imported: str) -> bool:
    named = {"settings", "stage"} & set(imported.split(".")[2:])
    return bool(named) or any(starts_with(imported, name) for name in LIGHT)


def test_storage_knows_nothing_above_it_and_no_torch() -> None:
    for name, tree in modules("storage"):
        for imported in imports(tree, top_level=False):
            assert not starts_with(imported, "eopd.stages"), f"{name} imports {imported}"
            assert not starts_with(imported, "eopd.pipeline"), f"{name} imports {imported}"
            assert imported.split(".")[0] not in HEAVY - {"datasets", "numba"}, f"{name} imports {imported}"


def test_stages_do_not_know_the_pipeline() -> None:
    for name, tree in modules("stages"):
        for imported in imports(tree, top_level=False):
            assert not starts_with(imported, "eopd.pipeline"), f"{name} imports {imported}"


def test_a_stage_knows_of_others_only_their_settings() -> None:
    """An experiment and the table put the stages together: it has the settings of all, and the table lists them."""
    for name, tree in modules("stages"):
        own = ".".join(name.split(".")[:3])
        for imported in imports(tree, top_level=False):
            theirs = ".".join(imported.split(".")[:3])
            if not starts_with(imported, "eopd.stages") or theirs in {"eopd.stages", own, *SHARED}:
                continue
            allowed = imported.split(".")[3:4]
            match name:
                case "eopd.stages.table":
                    assert allowed == ["stage"], f"{name} imports {imported}"
                case "eopd.stages.experiment" | "eopd.stages.experiment_settings":
                    assert allowed in (["settings"], ["schedule"]), f"{name} imports {imported}"
                case _:
                    assert allowed == ["settings"], f"{name} imports {imported}"


def test_the_pipeline_imports_no_stage_and_nothing_heavy_at_module_level() -> None:
    for name, tree in modules("pipeline"):
        for imported in imports(tree, top_level=True):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            if starts_with(imported, "eopd.stages") and imported.count(".") > 1:
                assert is_light(imported), f"{name} imports {imported} at module level"


def loaded_by(imported: str, suspects: set[str]) -> str:
    """Those of ``suspects`` that importing some modules loads, as text."""
    code = f"import sys, {imported}; print(sorted({suspects!r} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_what_the_pipeline_may_import_of_stages_loads_nothing_heavy() -> None:
    light = [name.removesuffix(".__init__") for name, _ in modules("stages") if is_light(name)]
    assert len(light) > len(LIGHT)
    assert loaded_by(", ".join(light), HEAVY) == "[]"


@pytest.mark.parametrize(
    "module",
    ["eopd.pipeline.cli.main", "eopd.pipeline.config", "eopd.pipeline.run", "eopd.storage.teacher_cache"],
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module, HEAVY) == "[]"


def test_help_loads_what_draws_it_and_nothing_else() -> None:
    """So that it answers at once: reading settings alone would take ten times as long."""
    large = HEAVY | {"numpy", "pyarrow", "pydantic", "rich", "yaml"}
    code = (
        "import atexit, sys; from eopd.pipeline.cli.main import main; sys.argv = ['eopd', '--help'];"
        f"atexit.register(lambda: print(sorted({large!r} & set(sys.modules)))); main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rollout" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_module_imports_in_a_circle_and_few_places_name_a_stage() -> None:
    audit = subprocess.run(
        [sys.executable, "-m", "scripts.audit"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    figures = json.loads(audit.stdout.splitlines()[-1])
    assert figures["import_cycles"] == 0
    assert figures["stage_name_comparisons"] <= 10
