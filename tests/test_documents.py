"""What the documents say of the code, as far as a machine can tell."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from eopd.pipeline.config import parse_settings
from eopd.stages.train.objectives.registry import make_objective
from eopd.stages.train.objectives.settings import ObjectiveSettings
from eopd.storage.coverage import EntropyNeed
from tests.test_train_from_cache import VOCABULARY, make_store

ROOT = Path(__file__).resolve().parent.parent
PAGES = [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "build", "runs", "store"} & set(path.parts)]
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]+)\)")
ANCHOR = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
NAME = re.compile(r"\beopd\.(?:pipeline|stages|storage|examples)\b(?:\.[A-Za-z_]\w*)+")
CONFIG = re.compile(r"```yaml\n(# mine\.yaml\n.*?)```", re.DOTALL)


def test_the_page_of_settings_is_what_the_settings_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "settings_reference.py"), "--check"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    """Anchors of headings as GitHub makes them."""
    missing = []
    for link, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        headings = HEADING.findall(target.read_text(encoding="utf-8"))
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if anchor not in anchors:
            missing.append(f"{link}#{anchor}")
    assert missing == []


def test_names_of_modules_in_documents_can_be_imported() -> None:
    """In the notebook too, which only ``make docs`` executes."""
    pages = [*PAGES, *sorted((ROOT / "docs").glob("*.ipynb")), ROOT / "scripts" / "site.py", ROOT / "Makefile"]
    names = {name for page in pages for name in NAME.findall(page.read_text(encoding="utf-8"))}
    assert "eopd.storage.records" in names
    assert [name for name in sorted(names) if not _resolves(name)] == []


def _resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_map_of_the_code_names_every_module() -> None:
    folder, mapped = "", set()
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"### `(.+/)`", line):
            folder = heading[1]
        elif folder and (row := re.match(r"\| `(\w+\.py)` \| \S", line)):
            mapped.add(folder + row[1])
    paths = (path for package in ("pipeline", "stages", "storage") for path in (ROOT / package).rglob("*.py"))
    modules = {path.relative_to(ROOT).as_posix() for path in paths if path.name not in ("__init__.py", "__main__.py")}
    assert modules - mapped == set(), "not in the map"
    assert mapped - modules == set(), "gone from the code"


def test_messages_are_quoted_as_the_code_says_them() -> None:
    messages = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("\n## Messages\n")[2]
    cells = [row.split("|")[1] for row in messages.splitlines() if row.startswith("| ") and "(vLLM)" not in row]
    quoted = [
        piece.strip(" ;") for cell in cells for words in re.findall(r"`([^`]+)`", cell) for piece in words.split("…")
    ]
    said = " ".join(_texts())
    pieces = [piece for piece in quoted if piece]
    assert len(pieces) > 10
    assert [piece for piece in pieces if piece not in said] == []


def _texts() -> Iterator[str]:
    """Every text in the code, and the text of every setting's name."""
    for package in ("pipeline", "stages", "storage"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@pytest.mark.parametrize("page", ["README.md", "docs/your-own.md"])
def test_the_config_to_start_from_is_valid(page: str) -> None:
    (text,) = CONFIG.findall((ROOT / page).read_text(encoding="utf-8"))
    settings = parse_settings(yaml.safe_load(text), page)
    assert settings.evaluate is not None
    assert settings.score.teacher_prompt.suffix == settings.prompts.suffix, "the teacher reads the same instruction"


def test_the_first_page_trains_from_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, **shape)
    Qwen3ForCausalLM(student).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    (code,) = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(code.replace("max_steps=100", "max_steps=30, learning_rate=1e-2, logging_steps=1"), names)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 950


def test_the_cache_is_read_as_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    (code,) = SNIPPET.findall((ROOT / "docs" / "your-own.md").read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    exec(code, result)
    assert result["table"]["prompt_id"][3].as_py() == "3"
    assert result["rows"].response_offsets.tolist() == [0, 5, 17]  # of 5 and of 12 tokens, in the order asked for
    assert result["rows"].head_logprobs[result["head"]].tolist() == sorted(
        result["rows"].head_logprobs[result["head"]].tolist(), reverse=True
    )


def test_the_objective_of_ones_own_is_one(tmp_path: Path) -> None:
    (code,) = SNIPPET.findall((ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"))
    (tmp_path / "sure.py").write_text(code, encoding="utf-8")
    objective = make_objective(ObjectiveSettings(name=f"{tmp_path / 'sure.py'}:make", options={"limit": 0.8}))
    assert EntropyNeed() in objective.needs
    assert objective.plan.head_k == 16
