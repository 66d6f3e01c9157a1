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
    "storage/test_hub.py",
    "test_train_from_cache.py",
    "pipeline/test_hostile_stores.py",
    "pipeline/test_push.py",
    "pipeline/test_self_teacher.py",
    "pipeline/test_terminal.py::test_the_commands_end_in_one_line",
    "pipeline/test_inputs.py::test_what_a_config_is_refused_for_is_one_line_with_the_file",
    "pipeline/test_processes.py::test_children_end_with_their_worker",
    "pipeline/test_prompt_check.py::test_the_commands_refuse_before_work",
    "pipeline/test_store_cli.py::test_verify_and_repair_in_a_bucket",
    "stages/test_fake_cuda.py",
    "stages/test_grading_processes.py",
    "stages/test_generation_config.py::test_a_commit_that_fails_after_all_costs_no_step",
    "stages/test_gguf.py::test_a_kill_leaves_no_folder_and_the_next_prepares_it",
    "stages/test_intervals.py::test_coverage_with_thirty_problems",
    "stages/test_report_gather.py::test_alignments_of_different_things_are_named",
    "stages/test_report_page.py::test_a_page_is_whole_and_loads_nothing",
    "stages/test_sampling.py::test_logprobs_are_those_of_a_plain_forward",
    "stages/test_score_run.py::test_several_processes_on_one_artifact",
    "stages/test_score_run.py::test_scores_equal_the_model_alone",
    "stages/test_student_head_training.py::test_ddp_and_fsdp2_give_the_gradient_of_one_process",
    "stages/test_train_ema.py",
    "stages/test_train_lora.py",
    "stages/test_train_precision.py",
    "stages/test_train_sources.py",
    "stages/test_train_staleness.py",
    "stages/test_train_trackers.py",
    "stages/test_train_weights.py",
    "stages/test_verifiers.py::test_math_outlives_an_answer_that_hangs",
    "stages/test_verifiers.py::test_math_grades_every_pair_as_it_is_right",
    "stages/test_verifiers.py::test_math_reads_every_reference_of_the_papers_benchmarks",
    "stages/test_weight_files.py::test_a_lost_tensor_is_refused_before_work",
    "stages/test_weight_files.py::test_any_tensor_that_is_missing_or_has_another_shape_is_refused_by_name",
    "storage/test_sharing.py::test_eight_processes_fill_one_cache_while_three_are_killed",
    "storage/test_verification.py::test_verify_finds_any_flip_and_repair_queues_the_part_again",
)
"""Whole runs and installations, several processes, a browser, a server, every architecture, and whatever else
takes more than two seconds: `make test-fast` omits them."""
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
        name = f"{path}::{item.name}"
        if name.startswith(SLOW):
            item.add_marker("slow")
        if path in NUMERIC:
            item.add_marker("numeric")
        if name.startswith(LONG):
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
