"""`eopd doctor` on machines that are broken for real: no permission, no space, a package that does not import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from eopd.pipeline import doctor
from eopd.pipeline.config import CONFIG_FOLDER, parse_settings
from eopd.pipeline.doctor import compiling, known_versions, probe, worst
from eopd.pipeline.doctor_inputs import check_inputs
from eopd.pipeline.errors import Finding
from eopd.pipeline.store_check import check_store
from tests.stages.tiny_models import tiny_tokenizer
from tests.strangers import unprivileged


def states(store: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_store(store)}


def test_a_good_store_is_tried_out_and_left_as_it_was(tmp_path: Path) -> None:
    findings = states(tmp_path / "store")
    assert {name: finding.state for name, finding in findings.items()} == {"disk": "ok", "store": "ok", "claims": "ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_permission(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with unprivileged():
        finding = states(open_folder)["store"]
    assert finding.state == "broken"
    assert "Permission denied" in finding.text
    assert str(open_folder) in finding.text
    assert "chmod" in finding.remedy


def test_a_store_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="No space"):
            (disk / "filling").write_bytes(b"x" * (128 << 10))
        findings = states(disk)
        assert findings["disk"].state == "broken"
        assert findings["store"].state == "broken"
        assert "no space left" in findings["store"].text
        assert [path.name for path in disk.iterdir()] == ["filling"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    finding = states(tmp_path)["store"]
    assert finding.state == "broken"
    assert finding.text.startswith(f"no hard links in {tmp_path}")
    assert "ext4" in finding.remedy
    assert "space" not in finding.remedy


def test_a_package_that_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("import numpy\nraise ImportError('libfoo.so.3: cannot open')\n")
    (tmp_path / "dying_one.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    (tmp_path / "slow_one.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe("broken_one", "facts = {}") == "its import failed: ImportError: libfoo.so.3: cannot open"
    assert probe("dying_one", "facts = {}") == "its import killed by signal 11: it said nothing"
    assert probe("slow_one", "facts = {}", seconds=1.0) == "its import did not end within 1 s"
    assert probe("json", "facts = {'a': 1}") == {"a": 1}


def test_versions_known_to_work_are_those_pinned(tmp_path: Path) -> None:
    (tmp_path / "constraints-cpu.txt").write_text("torch==2.13.0+cpu\ntorchvision==9\nvllm-cpu==0.32.0 ; x == 'y'\n")
    (tmp_path / "constraints-gpu.txt").write_text("torch==2.13.0\nvllm==0.30.0\n")
    assert known_versions("torch", tmp_path) == {"2.13.0"}
    assert known_versions("vllm", tmp_path) == {"0.32.0", "0.30.0"}
    assert known_versions("torch", tmp_path / "nowhere") == set()
    assert known_versions("torch")


def test_kernels_need_a_compiler_and_python_s_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    neither = compiling(tmp_path)
    assert neither.state == "broken"
    assert "C compiler" in neither.text
    assert f"{tmp_path}/Python.h" in neither.text
    assert neither.remedy.startswith("apt install gcc python3")
    (tmp_path / "Python.h").touch()
    no_compiler = compiling(tmp_path)
    assert no_compiler.state == "broken"
    assert "Python.h" not in no_compiler.text
    (tmp_path / "gcc").touch(0o755)
    assert compiling(tmp_path).state == "ok"


def test_only_what_is_broken_fails() -> None:
    assert worst([Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "absent", "")]) == 0
    assert worst([Finding("a", "ok", ""), Finding("b", "broken", "")]) == 1


def test_findings_come_at_once_and_those_of_heavy_packages_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = threading.Event()

    def slow(package: str, code: str, seconds: float = 0.0) -> str:
        imported.wait(60)
        return "it is slow"

    monkeypatch.setattr(doctor, "probe", slow)
    findings = doctor.examine(tmp_path / "store")
    first = [next(findings).name for _ in range(4)]  # nothing is imported yet
    imported.set()
    names = [*first, *(finding.name for finding in findings)]
    assert names[:2] == ["Python", "packages"]
    assert names[-3:-1] == ["torch", "transformers"]
    assert names[-1] == "vllm"


def on_masked(package: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command where a package cannot be imported."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("raise ImportError('masked')\n")
    return subprocess.run(
        [sys.executable, "-m", "eopd.pipeline.cli", "doctor", "--no-engines", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_the_command_on_a_masked_package(tmp_path: Path) -> None:
    """transformers cannot be imported: the whole command still answers, names it, and ends with 1."""
    result = on_masked("transformers", tmp_path / "masked", "--json", "--store", tmp_path)
    assert result.returncode == 1, result.stderr
    values = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert values["transformers"]["state"] == "broken"
    assert "ImportError: masked" in values["transformers"]["text"]
    assert "make setup" in values["transformers"]["remedy"]
    assert values["torch"]["state"] == "ok"
    assert values["store"]["state"] == "ok"


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("numpy", "quickstart not looked at: masked"),
        ("safetensors", "what the config names not looked at: masked"),
        ("rich", "student"),
    ],
)
def test_the_command_needs_none_of_the_packages_that_it_reports_on(tmp_path: Path, package: str, words: str) -> None:
    result = on_masked(package, tmp_path / "masked", "quickstart", "--store", tmp_path)
    assert "Traceback" not in result.stderr
    assert words in " ".join(result.stdout.split())
    assert result.returncode == int(package != "rich")


def looked_at(**changes: Any) -> dict[str, Finding]:
    countdown = CONFIG_FOLDER.parent / "examples" / "countdown"
    raw: dict[str, Any] = {
        "name": "x",
        "student": {"path": str(countdown / "student")},
        "teacher": {"path": str(countdown / "teacher")},
        "prompts": {"path": str(countdown / "train.jsonl"), "columns": {"prompt": "problem"}, "template": "plain"},
        "evaluate": {"benchmarks": [{"name": "b", "path": str(countdown / "evaluate.jsonl")}]},
    }
    return {finding.name: finding for finding in check_inputs(parse_settings(raw | changes, "test"))}


def test_quick_checks_come_before_heavy_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(doctor, "probe", lambda package, _: imported.append(package) or f"{package} fails")
    findings = doctor.examine(tmp_path / "store")
    quick = [next(findings).name for _ in range(4)]
    assert quick[:2] == ["Python", "packages"]
    assert imported == []
    rest = [finding.name for finding in findings]
    assert rest[rest.index("claims") + 1 :] == ["torch", "transformers", "vllm"]
    assert sorted(imported) == ["torch", "transformers", "vllm"]


def test_what_a_config_names_is_there() -> None:
    findings = looked_at()
    assert {name: finding.state for name, finding in findings.items()} == dict.fromkeys(
        (
            *("student", "student.tokenizer", "teacher", "teacher.tokenizer"),
            *("student.weights", "teacher.weights", "tokens", "prompts"),
            *(f"memory of {stage}" for stage in ("evaluate", "rollout", "score", "train")),
            *("prompts (student)", "prompts (teacher)", "evaluate.benchmarks.0", "evaluate.benchmarks.0 (student)"),
            *("train", "launcher.kind: local"),
        ),
        "ok",
    )
    assert findings["prompts"].text.startswith("6,000 in ")


def test_a_lost_tensor_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIG_FOLDER.parent / "examples" / "countdown" / "teacher", tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors")
    findings = looked_at(teacher={"path": str(folder)})
    assert findings["student.weights"].state == "ok"
    assert findings["teacher.weights"].state == "broken"
    assert f"{lost} is missing" in findings["teacher.weights"].text


def test_a_teacher_of_other_tokens_is_found(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    student = CONFIG_FOLDER.parent / "examples" / "countdown" / "student"
    findings = looked_at(teacher={"path": str(student), "tokenizer": str(tmp_path)})["tokens"]
    assert findings.state == "broken"
    assert "the tokenizers of teacher and student differ at" in findings.text
    assert findings.remedy == "Use a teacher of the student's own token vocabulary."


def test_all_that_is_missing_of_what_a_config_names_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "other.jsonl").write_text('{"question": "1 + 1"}\n')
    findings = looked_at(
        student={"path": str(tmp_path / "student"), "tokenizer": str(tmp_path / "tokenizer")},
        teacher={"path": str(tmp_path / "teacher")},
        prompts={"path": str(tmp_path / "gone.jsonl")},
        evaluate={"benchmarks": [{"name": "b", "path": str(tmp_path / "other.jsonl")}]},
        read_only_stores=[str(tmp_path / "team")],
        launcher={"kind": "slurm"},
    )
    broken = {name: finding for name, finding in findings.items() if finding.state == "broken"}
    assert set(broken) == {
        *("student", "student.tokenizer", "teacher", "prompts", "evaluate.benchmarks.0", "read_only_stores"),
        "launcher.kind: slurm",
    }
    assert all(finding.remedy for finding in broken.values())
    assert broken["student"].text == f"student.path: there is no folder {tmp_path / 'student'}"
    assert "save_pretrained" in broken["teacher"].remedy
    assert "no column 'problem'" in broken["evaluate.benchmarks.0"].text
    assert "sbatch" in broken["launcher.kind: slurm"].text


def test_the_command_looks_at_what_its_config_names(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("name: x\nstudent: {path: ./none}\nteacher: {path: ./none}\nprompts: {path: ./none.jsonl}\n")
    result = subprocess.run(
        [sys.executable, "-m", "eopd.pipeline.cli", "doctor", str(config), "--no-engines"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 1, result.stderr
    for words in ("student.path: there is no folder", "teacher.path: there is no folder", "does not exist"):
        assert words in " ".join(result.stdout.split())
