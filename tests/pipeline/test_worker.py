"""How a worker tells what it ended with; refusals are errors that no second attempt would change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest

from eopd.pipeline import worker
from eopd.pipeline.config import load_config
from eopd.pipeline.errors import EXIT_CODES, Outcome, RunError
from eopd.pipeline.processes import worker_command
from eopd.pipeline.progress import EventProgress, Replay, read_outcome
from eopd.pipeline.tasks import Task
from eopd.pipeline.worker import do, do_text, is_refusal, outcome_of
from eopd.stages.job import NullProgress
from eopd.stages.models.chat_templates import Conversation, parse_conversation, write_conversation
from eopd.stages.models.loading import load_tokenizer_at
from eopd.stages.models.prompts import PromptSettings, load_prompts
from eopd.storage.errors import DamagedPart, StoreFull, UserError
from tests.pipeline.plan_case import make_run


def raised(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        action()
    return caught.value


def of_a_template(_: Conversation) -> str:
    return jinja2.Environment().from_string("{{ messages.x.y }}").render()


def test_refusals_of_our_own_checks(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "bad.yaml").write_text("{")
    talk = parse_conversation("x")
    for action in (
        lambda: parse_conversation([]),
        lambda: load_prompts(PromptSettings(path=str(tmp_path / "bad.jsonl"))),
        lambda: load_config(str(tmp_path / "bad.yaml")),
        lambda: write_conversation(talk, of_a_template),
    ):
        error = raised(action)
        assert is_refusal(error), error
        outcome = outcome_of(error)
        assert outcome == Outcome("refused", str(error), error.fields() if isinstance(error, UserError) else {})
        events = EventProgress(tmp_path / "events.jsonl")
        events.end(outcome)
        replay = Replay(tmp_path / "events.jsonl", NullProgress())
        replay.close()
        assert replay.outcome == outcome


def test_the_fields_of_an_error_reach_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{')
    error = raised(lambda: load_prompts(PromptSettings(path=str(tmp_path / "bad.jsonl"))))
    EventProgress(tmp_path / "events.jsonl").end(outcome_of(error))
    outcome = read_outcome(tmp_path / "events.jsonl")
    assert outcome is not None
    assert (outcome.fields["file"], outcome.fields["line"]) == (str(tmp_path / "bad.jsonl"), 2)


def test_exit_codes() -> None:
    for kind in ("done", "failed", "refused", "full"):
        assert Outcome.from_exit(EXIT_CODES[kind], "").kind == kind
    assert Outcome.from_exit(EXIT_CODES["interrupted"], "").kind == "lost"  # somebody else ended it
    assert Outcome.from_exit(-9, "").kind == "lost"


def test_errors_that_may_go_away(tmp_path: Path) -> None:
    def out_of_space() -> None:
        raise OSError(5, "Input/output error")

    for error in (
        raised(lambda: json.loads("{")),  # raised by another package: who knows why
        raised(out_of_space),
        raised(lambda: load_tokenizer_at(str(tmp_path))),  # in place of an OSError
        RunError("parts are missing"),
        DamagedPart("part 3"),
        RuntimeError("CUDA error"),
    ):
        assert not is_refusal(error), error
        assert outcome_of(error).kind == "failed", error


def test_a_task_whose_line_in_the_log_finds_no_space_still_ends_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(worker, "execute", full)
    monkeypatch.setattr(worker, "log_task", full)
    run = make_run(tmp_path)
    assert do(Task(run, run.plan.job("rollout", 0), (0,))).kind == "full"


def test_a_run_that_cannot_be_opened_here_may_be_opened_elsewhere(tmp_path: Path) -> None:
    """Another machine may see the folder that is missing: the parts are not to blame."""
    config = {"name": "x", "student": {"path": str(tmp_path / "s")}, "teacher": {"path": "t"}, "prompts": {"path": "p"}}
    (tmp_path / "x.yaml").write_text(json.dumps(config))
    task = {"config": str(tmp_path / "x.yaml"), "stage": "rollout", "round": 0, "parts": [0]}
    outcome = do_text(json.dumps({**task, "events": None, "log": None}))
    assert outcome.kind == "failed"
    assert str(tmp_path / "s") in outcome.message


@pytest.mark.parametrize(("processes", "meeting"), [(1, ["--nnodes=2"]), (2, None), (2, ["--nnodes=2"])])
def test_processes_that_train_together_go_through_torchrun(processes: int, meeting: list[str] | None) -> None:
    command = worker_command(processes, "TASK", torchrun=meeting)
    assert "torch.distributed.run" in command
    assert set(meeting or ["--standalone"]) <= set(command)
    assert worker_command(1, "TASK") == ["-m", "eopd.pipeline.worker", "TASK"]
