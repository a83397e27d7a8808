"""Training and serving under DistributedModelParallel, on one rank and on two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import rank_checks as checks
import rank_checks_cuda as cuda_checks
import rank_checks_das as das
import rank_checks_metrics as metrics_checks
import rank_checks_pipelines as pipelines
import rank_checks_resume as resume
import rank_checks_serving as serving
import rank_checks_store as store_checks
import rank_checks_towers as towers
from models import students
from rank_models import SHARDINGS
from ranks import Ranks, check_name

LACKING = ("one task", "both tasks", "whole batches", "one rank", "weights", "labels and weights")
CHECKS: list[tuple[Any, ...]] = [
    (checks.check_weight_zero_is_plain, "dlrm", False),
    (checks.check_weight_zero_is_plain, "dlrm", True),
    (checks.check_weight_zero_is_plain, "hand_written", True),
    (checks.check_weight_zero_is_plain, "dlrm", False, True),
    (checks.check_pipelined_equals_plain, "heads", "table_wise"),
    (checks.check_pipelined_equals_plain, "adapted", "table_wise"),
    (checks.check_pipelined_equals_plain, "adapted", "mixed"),
    (checks.check_pipelined_equals_plain, "serving", "table_wise"),
    (checks.check_pipelined_equals_plain, "serving_alone", "table_wise"),
    (checks.check_pipelined_equals_plain, "margins", "table_wise"),
    (checks.check_pipelined_equals_plain, "margin_without_adapter", "table_wise"),
    (checks.check_pipelined_equals_plain, "ranking", "table_wise"),
    *((checks.check_ranks_agree_with_one, sharding, "SGD", "adapted") for sharding in SHARDINGS),
    (checks.check_ranks_agree_with_one, "table_wise", "SGD", "heads"),
    (checks.check_ranks_agree_with_one, "table_wise", "SGD", "serving"),
    (checks.check_ranks_agree_with_one, "table_wise", "SGD", "margins"),
    (checks.check_ranks_agree_with_one, "table_wise", "SGD", "margin_without_adapter"),
    (checks.check_ranks_agree_with_one, "table_wise", "SGD", "ranking"),
    (checks.check_ranks_agree_with_one, "table_wise", "Adagrad", "adapted"),
    *((checks.check_labels_and_weights, case, "margins") for case in LACKING),
    (checks.check_labels_and_weights, "labels and weights", "margin_without_adapter"),
    (checks.check_labels_and_weights, "weights", "heads"),
    *((checks.check_labels_and_weights, case, "ranking") for case in ("weights", LACKING[-1])),
    (checks.check_nothing_to_learn_moves_no_adapter, True),
    (checks.check_nothing_to_learn_moves_no_adapter, False),
    (checks.check_without_dmp, False),
    (checks.check_without_dmp, True),
    *((pipelines.check_mixin_of_weight_zero_is_plain, name) for name in ("base", "lite", "own")),
    *((pipelines.check_mixin_equals_train_pipeline_exfm, name) for name in ("base", "lite")),
    (pipelines.check_two_forwards_of_a_batch,),
    (pipelines.check_collectives_do_not_depend_on_a_ranks_teacher,),
    (towers.check_two_towers_agree_with_one,),
    (towers.check_pipelined_towers_equal_plain,),
    (towers.check_towers_of_weight_zero_are_plain,),
    (towers.check_stored_embeddings_equal_columns,),
    (checks.check_changed_ids_are_told,),
    (checks.check_tables_left_whole_are_told,),
    (checks.check_untraceable_is_told,),
    (checks.check_costs_of_a_step,),
    (checks.check_order_of_all_reduces,),
    (checks.check_a_forward_around_the_wrapper_is_refused,),
    (checks.check_absent_teacher,),
    (checks.check_ranks_without_ddp_are_told,),
    (checks.check_adapter_is_shared,),
    (checks.check_adapter_learns_from_labels_alone,),
    (checks.check_student_does_not_feel_the_adapters_loss,),
    (checks.check_live_teacher,),
    (checks.check_ways_of_bringing_outputs,),
    (checks.check_wrong_set_ups_are_refused,),
    *([(checks.check_freed_features_are_refused,)] if serving.FREES_FEATURES else []),
    *((serving.check_export, sharding) for sharding in SHARDINGS),
    *((serving.check_export_in_pieces, sharding) for sharding in SHARDINGS),
    (serving.check_gathered_dtensors,),
    *((serving.check_checkpoint, *pair) for pair in itertools.pairwise((*SHARDINGS, SHARDINGS[0]))),
    (serving.check_resumed_training,),
    *((serving.check_student, name) for name in students()),
    *((serving.check_option_changes_nothing, option) for option in serving.OPTIONS),
    (serving.check_gradient_accumulation,),
    (serving.check_adapter_while_accumulating,),
    (serving.check_evaluation_between_steps,),
    (serving.check_evaluation_in_the_pipeline,),
    (serving.check_sharded_student_is_refused,),
    *((resume.check_resumed_equals_straight, way) for way in resume.WAYS),
    (resume.check_resumed_before_the_first_step,),
    (resume.check_resumed_without_dmp,),
    (resume.check_a_resumed_teacher_equals_straight,),
    (resume.check_checkpoints_of_a_run,),
    (resume.check_a_checkpoint_of_another_run_is_refused,),
    (resume.check_links_and_files_among_checkpoints,),
    (resume.check_wrong_values_are_refused,),
    (resume.check_flipped_bits_of_values,),
    (resume.check_metrics_start_anew,),
    *((das.check_checkpoint_across_ranks, *pair) for pair in itertools.pairwise(SHARDINGS)),
    (das.check_checkpoint_of_dtensors,),
    (das.check_checkpoint_errors_reach_every_rank,),
    (das.check_damage_on_one_rank_is_refused_on_all,),
    (das.check_a_failed_save_is_removed_on_every_rank,),
    (store_checks.check_store_equals_columns,),
    (store_checks.check_ranks_of_a_host_share_its_windows,),
    (store_checks.check_store_with_evaluation_between,),
    (store_checks.check_a_failing_store_ends_training,),
    *(
        (store_checks.check_training_goes_on_without_a_teacher, how)
        for how in store_checks.FAILURES
    ),
    (store_checks.check_a_teacher_that_fails_now_and_then,),
    (store_checks.check_a_failed_teacher_is_left_alone_for_a_while,),
    (store_checks.check_each_example_is_scored_once,),
    (store_checks.check_rows_that_are_gone_are_scored_again,),
    (store_checks.check_a_shard_that_two_ranks_have,),
    (store_checks.check_scores_are_those_of_the_batches,),
    *((store_checks.check_embeddings_are_scored, how) for how in ("float16", "int8")),
    (store_checks.check_wrong_scoring_is_refused,),
    (store_checks.check_the_newest_snapshot_that_does_not_leak,),
    (store_checks.check_logging_the_training_forward,),
    (store_checks.check_embeddings_are_logged,),
    (
        cuda_checks.check_with_a_group,
        checks.check_ranks_agree_with_one,
        "row_wise",
        "SGD",
        "margins",
    ),
    (cuda_checks.check_bfloat16, "autocast"),
    (cuda_checks.check_bfloat16, "over part"),
    (metrics_checks.check_metrics,),
    *((metrics_checks.check_missing_labels, case) for case in metrics_checks.MISSING),
    (metrics_checks.check_weights,),
    (metrics_checks.check_undefined_metrics,),
    (metrics_checks.check_window_of_auc,),
    (metrics_checks.check_metrics_of_one_task,),
    (metrics_checks.check_metrics_in_training,),
    (metrics_checks.check_uneven_batches,),
    (metrics_checks.check_wrong_shapes_are_refused,),
    (metrics_checks.check_wrong_teachers_are_refused,),
    (metrics_checks.check_names_of_tasks,),
    (metrics_checks.check_monitor,),
    (metrics_checks.check_a_monitor_that_cannot_write,),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check_name(*check))
def test_ranks(ranks: Ranks, check: tuple[Any, ...]) -> None:
    ranks.run(*check)


@pytest.mark.ways
def test_torchrecs_compiled_pipeline_takes_the_mixin() -> None:
    """Only on one rank, as compilation takes long."""
    processes = Ranks(1)
    try:
        processes.run(pipelines.check_mixin_equals_train_pipeline_exfm, "compiled")
    finally:
        processes.close()


def test_a_failing_rank_is_told_without_waiting_for_the_others(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank \d: Traceback(.|\n)*on purpose"):
        ranks.run(checks.check_fails_on_the_last_rank)
