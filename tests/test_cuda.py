"""The same checks on a CUDA device with NCCL, where copies and look-ups have their own streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rank_checks as checks
import rank_checks_cuda as cuda_checks
import rank_checks_metrics as metrics_checks
import rank_checks_resume as resume
import rank_checks_serving as serving
import rank_checks_store as store_checks
import torch
from ranks import Ranks, check_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHECKS: list[tuple[Any, ...]] = [
    (checks.check_weight_zero_is_plain, "dlrm", True),
    (checks.check_pipelined_equals_plain, "heads", "table_wise"),
    (checks.check_pipelined_equals_plain, "serving", "table_wise"),
    (checks.check_pipelined_equals_plain, "margins", "table_wise"),
    (checks.check_ranks_agree_with_one, "row_wise", "SGD", "serving"),
    (checks.check_ranks_agree_with_one, "row_wise", "SGD", "margins"),
    (checks.check_without_dmp, False),
    (checks.check_without_dmp, True),
    (checks.check_pinned_batches,),
    (checks.check_absent_teacher,),
    (checks.check_adapter_is_shared,),
    (checks.check_live_teacher,),
    (checks.check_ways_of_bringing_outputs,),
    (serving.check_export, "mixed"),
    *((serving.check_option_changes_nothing, option) for option in serving.OPTIONS),
    (serving.check_evaluation_between_steps,),
    *((resume.check_resumed_equals_straight, way) for way in resume.ON_CUDA),
    (store_checks.check_store_equals_columns,),
    (store_checks.check_store_with_evaluation_between,),
    (store_checks.check_each_example_is_scored_once,),
    (store_checks.check_the_newest_snapshot_that_does_not_leak,),
    (store_checks.check_logging_the_training_forward,),
    (metrics_checks.check_metrics,),
    (metrics_checks.check_missing_labels, "both"),
    (metrics_checks.check_weights,),
    (cuda_checks.check_no_wait_is_added,),
    (cuda_checks.check_no_copy_is_pageable,),
    *((cuda_checks.check_late_copies_are_waited_for, way) for way in cuda_checks.LATE),
    (cuda_checks.check_torchrecs_own,),
    (cuda_checks.check_bfloat16, "autocast"),
    (cuda_checks.check_bfloat16, "over part"),
    (cuda_checks.check_with_a_group, checks.check_pipelined_equals_plain, "margins", "table_wise"),
    (
        cuda_checks.check_with_a_group,
        checks.check_ranks_agree_with_one,
        "row_wise",
        "SGD",
        "margins",
    ),
    (cuda_checks.check_with_a_group, checks.check_adapter_is_shared),
    (cuda_checks.check_with_a_group, cuda_checks.check_late_copies_are_waited_for, "look-up"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(min(2, torch.cuda.device_count()), device="cuda")
    yield processes
    processes.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check_name(*check))
def test_cuda(ranks: Ranks, check: tuple[Any, ...]) -> None:
    ranks.run(*check)
