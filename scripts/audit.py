"""Figures of the code's shape; the last line is one JSON object.

    python -m scripts.audit [--list]

``stage_name_comparisons`` counts places in pipeline/ that compare with, or look up, a stage's or an artifact kind's
name: what a new stage would have to be added to. ``single_importer_modules`` are modules that exactly one other module
imports. ``import_cycles`` counts groups of modules that import each other, imports inside functions and for type
checking included.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages", "storage")


def module_name(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return f"eopd.{name.removesuffix('.__init__')}"


def read_modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module that is not empty, by its name."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {module_name(path): (path, ast.parse(path.read_text("utf-8"))) for path in paths if path.stat().st_size}


def imported_by(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Modules of the project that ``tree`` imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in modules:
                yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in modules
            )


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules each of which can be reached from each other (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            place = stack.index(module)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                groups.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for module in sorted(imports):
        if module not in index:
            visit(module)
    return groups


def stage_words() -> set[str]:
    """Names, commands and artifact kinds of all stages."""
    from eopd.stages.table import STAGES

    return {word for stage in STAGES for word in (stage.name, stage.command, stage.kind)}


def comparisons(tree: ast.Module, words: set[str]) -> Iterator[int]:
    """Line numbers at which a stage's or kind's name is compared with, matched, or used as a dictionary's key."""

    def names(node: ast.AST | None) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(map(names, node.elts))
        return isinstance(node, ast.Constant) and node.value in words

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            matches = any(map(names, (node.left, *node.comparators)))
        elif isinstance(node, ast.Dict):
            matches = any(map(names, node.keys))
        else:
            matches = isinstance(node, ast.MatchValue) and names(node.value)
        if matches:
            yield node.lineno


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the cycles, comparisons and single-importer modules")
    arguments = parser.parse_args()
    modules = read_modules()
    imports = {name: set(imported_by(tree, set(modules))) - {name} for name, (_, tree) in modules.items()}
    importers = {name: [other for other, used in imports.items() if name in used] for name in modules}
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, (path, _) in modules.items()}
    groups, words = cycles(imports), stage_words()
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for name, (path, tree) in modules.items()
        if name.startswith("eopd.pipeline.")
        for line in comparisons(tree, words)
    ]
    single = sorted(name for name, outcome in importers.items() if len(outcome) == 1)
    if arguments.list:
        for group in groups:
            sys.stdout.write(f"cycle: {', '.join(group)}\n")
        for place in places:
            sys.stdout.write(f"stage name: {place}\n")
        for name in single:
            sys.stdout.write(f"single importer: {name} ({lines[name]} lines) by {importers[name][0]}\n")
    largest = max(lines, key=lambda name: lines[name])
    result = {
        "modules": len(modules),
        "lines": sum(lines.values()),
        "median_lines": statistics.median(lines.values()),
        "largest_file": {"module": largest, "lines": lines[largest]},
        "import_cycles": len(groups),
        "single_importer_modules": len(single),
        "stage_name_comparisons": len(places),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
