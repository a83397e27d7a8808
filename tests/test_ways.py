"""Other ways to train than the pipelines (docs/works.md), on two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import rank_checks_ways as ways
from ranks import Ranks
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

pytestmark = pytest.mark.ways

HAS_OPTIMIZER_STEP = hasattr(TrainPipelineSparseDist, "_optimizer_step")  # not in TorchRec 1.6
CHECKS: list[tuple[Any, ...]] = [
    *((ways.check_autocast, way) for way in ("base", "sparse_dist", "lite", "student")),
    *([(ways.check_gradient_scaler,)] if HAS_OPTIMIZER_STEP else []),
    (ways.check_precision_settings_stay,),
    (ways.check_compiled, "over", "aot_eager", "sparse_dist"),
    (ways.check_compiled, "heads", "aot_eager", "sparse_dist"),
    *((ways.check_gradient_accumulation, base) for base in ("base", "lite")),
    *((ways.check_evaluation_between_steps, base) for base in ("base", "lite")),
    *((ways.check_loaders_in_turns, base) for base in ("base", "sparse_dist", "lite")),
    (ways.check_batch_sizes_by_feature,),
    *((ways.check_batches_without_examples, base) for base in ("base", "sparse_dist")),
    (ways.check_a_loop_of_ones_own,),
    *((ways.check_fsdp, way) for way in ("parts", "whole", "hybrid")),
    (ways.check_compiled, "over", "inductor", "sparse_dist"),
    (ways.check_compiled, "student", "aot_eager", "base"),
    (ways.check_compiled, "model", "eager", "base"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


def _name(check: tuple[Any, ...]) -> str:
    return "-".join([check[0].__name__.removeprefix("check_"), *check[1:]])


@pytest.mark.parametrize("check", CHECKS, ids=_name)
def test_ways(ranks: Ranks, check: tuple[Any, ...]) -> None:
    ranks.run(*check)


@pytest.mark.parametrize("is_exfm", [False, True], ids=["torchrec", "exfm"])
def test_uneven_numbers_of_batches(is_exfm: bool) -> None:
    """In separate processes, since their connection breaks."""
    processes = Ranks(2)
    try:
        processes.run(ways.check_uneven_batches_end, is_exfm)
    finally:
        processes.close()
