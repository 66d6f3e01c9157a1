"""The dependency direction (pipeline -> stages -> storage) and what importing costs, read from the source and run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "numba", "vllm", "transformers", "accelerate", "datasets", "math_verify", "matplotlib"}
SHARED = {f"eopd.stages.{name}" for name in ("models", "engines", "settings", "format", "job", "intervals", "output")}
# what `pipeline` may import at module level: settings and pure functions that need no torch
LIGHT = (
    "settings",
    "eopd.stages.format",
    "eopd.stages.job",
    "eopd.stages.models.chat_templates",
    "eopd.stages.models.generation",
    "eopd.stages.models.prompts",
    "eopd.stages.models.teacher_prompts",
    "eopd.stages.models.weight_files",
    "eopd.stages.train.schedule",
)


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield f"eopd.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}", ast.parse(path.read_text())


def imports(tree: ast.AST, *, top_level: bool) -> set[str]:
    """Modules that are imported; with ``top_level`` only where importing the module runs the import."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            found |= imports(node, top_level=top_level)
    return found


def starts_with(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_storage_knows_nothing_above_it_and_no_torch() -> None:
    for name, tree in modules("storage"):
        for imported in imports(tree, top_level=False):
            assert not starts_with(imported, "eopd.stages"), f"{name} imports {imported}"
            assert not starts_with(imported, "eopd.pipeline"), f"{name} imports {imported}"
            assert imported.split(".")[0] not in HEAVY - {"datasets", "numba"}, f"{name} imports {imported}"


def test_stages_do_not_know_the_pipeline_nor_each_other() -> None:
    for name, tree in modules("stages"):
        own = ".".join(name.split(".")[:3])
        for imported in imports(tree, top_level=False):
            assert not starts_with(imported, "eopd.pipeline"), f"{name} imports {imported}"
            if not starts_with(imported, "eopd.stages") or imported == "eopd.stages":
                continue
            theirs = ".".join(imported.split(".")[:3])
            assert theirs == own or theirs in SHARED, f"{name} imports {imported}"


def test_the_pipeline_imports_no_stage_and_nothing_heavy_at_module_level() -> None:
    for name, tree in modules("pipeline"):
        for imported in imports(tree, top_level=True):
            assert imported.split(".")[0] not in HEAVY, f"{name} imports {imported}"
            if starts_with(imported, "eopd.stages") and imported.count(".") > 1:
                light = any(word in imported for word in LIGHT) or imported.startswith("eopd.stages.engines.sampling")
                assert light, f"{name} imports {imported} at module level"


@pytest.mark.parametrize(
    "module", ["eopd.pipeline.cli", "eopd.pipeline.config", "eopd.pipeline.plan", "eopd.storage.teacher_cache"]
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_loads_what_draws_it_and_nothing_else() -> None:
    """So that it answers at once: reading settings alone would take ten times as long."""
    large = HEAVY | {"numpy", "pyarrow", "pydantic", "rich", "yaml"}
    code = (
        "import atexit, sys; from eopd.pipeline.cli import main; sys.argv = ['eopd', '--help'];"
        f"atexit.register(lambda: print(sorted({large!r} & set(sys.modules)))); main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rollout" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"
