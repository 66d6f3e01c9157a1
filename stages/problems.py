"""The problems of an evaluation as the student read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eopd.stages.evaluate.settings import EvaluateSettings
from eopd.stages.models.prompts import Prompt, PromptTable, load_prompts, render_prompt
from eopd.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Problems:
    """The problems of every benchmark, each rendered once."""

    def __init__(self, settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self.sources = {one.name: settings.prompts_of(one) for one in settings.benchmarks}
        self._tokenizer = tokenizer
        self._tables: dict[str, PromptTable] = {}
        self._ids: dict[tuple[str, str], list[int]] = {}

    def table(self, benchmark: str) -> PromptTable:
        """Return all problems of a benchmark."""
        if benchmark not in self._tables:
            self._tables[benchmark] = load_prompts(self.sources[benchmark])
        return self._tables[benchmark]

    def prompt(self, benchmark: str, problem: str, index: int) -> Prompt:
        """Return a problem. Raises InputError if it is no longer in its benchmark, with its id."""
        (prompt,) = self.table(benchmark).rows([index])
        if prompt.id != problem:
            raise InputError(
                f"benchmark {benchmark}, problem {problem!r} is now {prompt.id!r}: the benchmark changed since "
                "it was evaluated",
                setting="evaluate.benchmarks",
                file=self.sources[benchmark].path,
                prompt=problem,
                remedy="plan the run again",
            )
        return prompt

    def ids(self, benchmark: str, problem: str, index: int) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            InputError: the problem, by id, is no longer in its benchmark, or has no tokens.
        """
        if (benchmark, problem) not in self._ids:
            prompt = self.prompt(benchmark, problem, index)
            self._ids[benchmark, problem] = render_prompt(self._tokenizer, prompt, self.sources[benchmark])
        return self._ids[benchmark, problem]
