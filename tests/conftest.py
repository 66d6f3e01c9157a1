"""What tests of several folders start from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW = (
    "end_to_end/",
    "study/",
    "test_packaging.py",
    "test_setup.py",
    "stages/test_architectures.py",
    "stages/test_report_browser.py",
    "stages/test_train_processes.py",
    "pipeline/test_doctor.py",
    "storage/test_remote.py",
)
"""Whole runs and installations, a browser, a server, every architecture; `make test-fast` omits them."""
LONG = (
    "end_to_end/test_slurm.py::test_a_run_through_interruptions_of_every_kind",
    "end_to_end/test_slurm.py::test_a_part_that_fails_for_good_is_named_and_set_aside",
    "end_to_end/test_faults.py::test_kills_of_workers_and_of_the_runner_cost_nothing_that_was_committed",
    "end_to_end/test_ray.py::test_what_a_lost_node_was_at_is_done_elsewhere",
    "end_to_end/test_ray.py::test_two_nodes_train_together",
    "end_to_end/test_ray.py::test_no_node_is_large_enough",
    "end_to_end/test_faults.py::test_a_second_interruption_stops_at_once",
    "end_to_end/test_processes.py::test_two_processes_give_the_single_process_loss_curve",
    "end_to_end/test_pruning.py::test_a_pruned_run_equals_an_unpruned_one",
    "end_to_end/test_self_teacher.py::test_scoring_with_a_trained_self_teacher_is_killed_and_ends_the_same",
    "end_to_end/test_warm.py::test_two_warm_workers_make_what_a_process_a_stage_makes",
    "stages/test_kept_engines.py::test_two_rounds_on_one_engine_are_those_of_two_engines[vllm]",
    "end_to_end/test_smollm2.py::test_one_scoring_serves_every_objective",
    "end_to_end/test_several_teachers.py::test_a_prompt_of_an_unknown_teacher_is_refused_before_work",
    "end_to_end/test_sources.py::test_a_guide_and_its_rollouts_survive_kills",
    "end_to_end/test_processes.py::test_ranks_end_with_a_killed_agent_or_command_and_let_go_of_their_claim",
    "end_to_end/test_gsm8k.py",
    "test_packaging.py::test_the_base_reads_stores_and_plans_without_torch",
    "test_packaging.py::test_every_extra_installs",
    "test_packaging.py::test_with_the_stages_the_wheel_runs_its_main_job",
)
"""The longest tests, up to several minutes each: skipped unless EOPD_LONG is set, as .ci/run does."""
NUMERIC = (
    "stages/test_align.py",
    "stages/test_alignment.py",
    "stages/test_lm_head.py",
    "stages/test_objectives.py",
    "stages/test_packing.py",
    "stages/test_sampling.py",
    "stages/test_score_run.py",
    "stages/test_statistics.py",
    "stages/test_stops.py",
    "stages/test_student_head.py",
    "stages/test_student_head_training.py",
    "stages/test_train_precision.py",
    "stages/test_train_processes.py",
    "stages/test_train_staleness.py",
)
"""Comparisons of rounded numbers: ``.ci/run`` repeats them with the arithmetic of another processor."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(TESTS).as_posix()
        if path.startswith(SLOW):
            item.add_marker("slow")
        if path in NUMERIC:
            item.add_marker("numeric")
        if f"{path}::{item.name}".startswith(LONG):
            item.add_marker("long")
            if "EOPD_LONG" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="takes a minute or so; .ci/run sets EOPD_LONG"))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder below which every user may look; pytest's are for one user only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)
