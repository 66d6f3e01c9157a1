"""A teacher and a weaker student that know some GSM8K: small language models trained on its problems and solutions.

    python -m examples.gsm8k.pair --data data/gsm8k --out runs/gsm8k-pair    # about 10 minutes on 2 cores
    python -m examples.gsm8k.pair --data data/gsm8k --out runs/gsm8k-pair --only measure

Run again after an interruption, it goes on. Everything is drawn from ``--seed``; equal seeds, versions, processors and
thread counts give equal bytes. Both models read "problem, new line" and write "solution, <|endoftext|>".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from eopd.examples.gsm8k.make import END_OF_TEXT, read_problems, train_tokenizer
from eopd.examples.gsm8k.training import STUDENT, TEACHER, Recipe, mean_losses, train

MODELS = {"teacher": TEACHER, "student": STUDENT}
STEPS = (*MODELS, "measure")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k-pair"), help="folder to write to")
    parser.add_argument("--only", choices=STEPS, action="append", help="do this step only (may be repeated)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="of torch; part of what makes bytes equal")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the tokenizer")
    parser.add_argument("--teacher-steps", type=int, default=TEACHER.steps)
    parser.add_argument("--student-steps", type=int, default=STUDENT.steps)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    problems = read_problems(args.data / "train.jsonl")
    tokenizer = train_tokenizer([row["problem"] + "\n" + row["solution"] for row in problems], args.vocabulary)
    texts, _ = encode(tokenizer, problems)
    say(f"{len(texts)} texts, {sum(map(len, texts)):,} tokens of {tokenizer.get_vocab_size()} kinds")
    for name, steps in (("teacher", args.teacher_steps), ("student", args.student_steps)):
        if args.only is None or name in args.only:
            make_model(name, dataclasses.replace(MODELS[name], steps=steps), tokenizer, texts, args.out, args.seed)
    if args.only is None or "measure" in args.only:
        show(args.out, tokenizer, read_problems(args.data / "test.jsonl"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def encode(tokenizer: Tokenizer, problems: list[dict[str, str]]) -> tuple[list[list[int]], list[int]]:
    """Token ids of each problem, its solution and the stop token; and how many of them are the prompt."""
    stop = tokenizer.token_to_id(END_OF_TEXT)
    prompts = [encoded.ids for encoded in tokenizer.encode_batch([row["problem"] + "\n" for row in problems])]
    solutions = [encoded.ids for encoded in tokenizer.encode_batch([row["solution"] for row in problems])]
    texts = [prompt + solution + [stop] for prompt, solution in zip(prompts, solutions, strict=True)]
    return texts, [len(prompt) for prompt in prompts]


def make_model(name: str, recipe: Recipe, tokenizer: Tokenizer, texts: list[list[int]], out: Path, seed: int) -> None:
    """Train one of the two models and write its folder; one that is there is left as it is."""
    folder = out / name
    if (folder / "model.safetensors").exists():
        say(f"{folder}: there already")
        return
    out.mkdir(parents=True, exist_ok=True)
    state = out / f"{name}.state"
    stop = tokenizer.token_to_id(END_OF_TEXT)
    rows = tokenizer.get_vocab_size()
    model = train(recipe, texts, rows, stop, seed, state, lambda line: say(f"{name}: {line}"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    wrapped.save_pretrained(folder)
    model.save_pretrained(folder)
    state.unlink()
    say(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def show(out: Path, tokenizer: Tokenizer, held_out: list[dict[str, str]]) -> None:
    """Print the README's table: cross-entropy a token on held-out problems and their solutions."""
    texts, prompts = encode(tokenizer, held_out)
    say("| model | parameters | problems, nats a token | solutions, nats a token |\n|---|---|---|---|")
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype="float32", use_safetensors=True)
        problem, solution = mean_losses(model, texts, prompts)
        say(f"| {name} | {sum(p.numel() for p in model.parameters()):,} | {problem:.3f} | {solution:.3f} |")


if __name__ == "__main__":
    main()
