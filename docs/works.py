"""Make docs/works.md: `python docs/works.py` runs the tests that the page names, and writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).with_suffix(".md")
RANKS = "tests/test_two_ranks.py::test_ranks[two-{}]".format
STREAMS = "tests/test_streams.py::test_mixin[{}]".format
WAYS = "tests/test_ways.py::test_ways[{}]".format
PLAIN = "pipelined_equals_plain-{}-table_wise".format
MIXIN = "mixin_equals_train_pipeline_exfm-{}".format

# A cell is a test's id, or "no, because ...".
# Pipelines: a name, cells for heads, adapter and margin, and a note.
PIPELINES: list[tuple[str, str, str, str, str]] = [
    (
        "`TrainPipelineBase`",
        *[RANKS(MIXIN("base"))] * 3,
        "TorchRec 1.8 ignores its `custom_model_fwd`",
    ),
    (
        "`TrainPipelineSparseDist`, which is `TrainPipelineExFM`",
        *(RANKS(PLAIN(kind)) for kind in ("heads", "adapted", "margins")),
        "",
    ),
    ("`TrainPipelineSparseDistLite`", *[RANKS(MIXIN("lite"))] * 3, ""),
    ("a subclass of your own", *[WAYS("gradient_scaler")] * 3, "the mixin comes first"),
    (
        "`TrainPipelinePT2`",
        *["tests/test_two_ranks.py::test_torchrecs_compiled_pipeline_takes_the_mixin"] * 3,
        "",
    ),
    (
        "`PrefetchTrainPipelineSparseDist`",
        *[STREAMS("PrefetchTrainPipelineSparseDist")] * 3,
        "on simulated streams, without a cache",
    ),
    (
        "`TrainPipelineFusedSparseDist`",
        *[STREAMS("TrainPipelineFusedSparseDist")] * 3,
        "on simulated streams",
    ),
    (
        "`TrainPipelineSemiSync`",
        *[STREAMS("TrainPipelineSemiSync")] * 3,
        "on simulated streams, before `start_batch`",
    ),
    (
        "`StagedTrainPipeline`, or a loop of your own",
        *[WAYS("a_loop_of_ones_own")] * 3,
        "no mixin, as the forward is yours: `Feed` of `torchrec_exfm/steps.py` around the "
        "iterator, `Steps.finish()` after each step; tested as a loop, as the pipeline itself "
        "needs CUDA",
    ),
    (
        "`TrainPipelineSparseDistCompAutograd`",
        *["no, because TorchRec's own fails"] * 3,
        "on a CPU, where FBGEMM's backward has no kernel for fake tensors; not tried with CUDA",
    ),
]
# Ways: a name, a cell, and a note.
WAYS_TO_TRAIN: list[tuple[str, str, str]] = [
    (
        "autocast in bfloat16 around `progress`",
        WAYS("autocast-sparse_dist"),
        "around each step: one around the whole loop keeps the cast weights of its first",
    ),
    ("... under `TrainPipelineBase`", WAYS("autocast-base"), ""),
    ("... under `TrainPipelineSparseDistLite`", WAYS("autocast-lite"), ""),
    ("autocast around the student (`custom_model_fwd`)", WAYS("autocast-student"), ""),
    (
        "float16 with a `GradScaler` in `_backward`",
        WAYS("gradient_scaler"),
        "with data-parallel tables: a fused optimizer takes scaled gradients as they are",
    ),
    ("TF32 and other settings of precision", WAYS("precision_settings_stay"), "left as they are"),
    ("`torch.compile` of the tapped module", WAYS("compiled-over-aot_eager-sparse_dist"), ""),
    ("... by inductor", WAYS("compiled-over-inductor-sparse_dist"), ""),
    ("`torch.compile` of the heads", WAYS("compiled-heads-aot_eager-sparse_dist"), ""),
    (
        "`torch.compile` of the whole student",
        WAYS("compiled-student-aot_eager-base"),
        "under `TrainPipelineBase`; the plain student under `TrainPipelineSparseDist` fails alike "
        "on a CPU, as Dynamo can't trace the stream that its pipelined forward takes",
    ),
    ("`torch.compile` of the whole wrapped model", WAYS("compiled-model-eager-base"), "likewise"),
    ("gradient accumulation", RANKS("gradient_accumulation"), "the adapter steps at every batch"),
    ("... under `TrainPipelineBase`", WAYS("gradient_accumulation-base"), ""),
    ("... under `TrainPipelineSparseDistLite`", WAYS("gradient_accumulation-lite"), ""),
    ("`EvalPipelineSparseDist` between steps", RANKS("evaluation_between_steps"), ""),
    ("... under `TrainPipelineBase`", WAYS("evaluation_between_steps-base"), ""),
    ("... under `TrainPipelineSparseDistLite`", WAYS("evaluation_between_steps-lite"), ""),
    (
        "several data loaders in turns",
        WAYS("loaders_in_turns-sparse_dist"),
        "while none is at its end: TorchRec then loses its place, with or without the mixin",
    ),
    ("... under `TrainPipelineBase`", WAYS("loaders_in_turns-base"), ""),
    ("... under `TrainPipelineSparseDistLite`", WAYS("loaders_in_turns-lite"), ""),
    ("batch sizes by feature (VBE)", WAYS("batch_sizes_by_feature"), ""),
    (
        "a rank with fewer batches",
        "no, because TorchRec's collectives are of all ranks",
        "the others wait until the group's time is up, or gloo ends the process, with or without "
        "the mixin: give that rank batches without examples",
    ),
    (
        "batches without examples on a rank",
        WAYS("batches_without_examples-sparse_dist"),
        "if the student's own loss is not NaN there",
    ),
    ("... under `TrainPipelineBase`", WAYS("batches_without_examples-base"), ""),
    ("`enable_inplace_copy_batch`", RANKS("option_changes_nothing-enable_inplace_copy_batch"), ""),
    (
        "`enqueue_batch_after_forward`",
        RANKS("option_changes_nothing-enqueue_batch_after_forward"),
        "",
    ),
    (
        "`free_features_storage_early`",
        RANKS("option_changes_nothing-free_features_storage_early"),
        "not with a live teacher, which reads the features later",
    ),
    ("`async_inplace_copy` of TorchRec 1.9", "no, because it is off on a CPU", "not tried"),
    ("DDP without `DistributedModelParallel`", RANKS("without_dmp-True"), ""),
    (
        "FSDP2 of the dense modules and the heads",
        WAYS("fsdp-parts"),
        "`fully_shard` each before the pipeline is made, `init_data_parallel=False`",
    ),
    ("FSDP2 of the whole wrapper", WAYS("fsdp-whole"), "with the tables in `ignored_params`"),
    ("FSDP2 over a mesh of two dimensions", WAYS("fsdp-hybrid"), ""),
    (
        "2D parallelism (`DMPCollection`)",
        "no, because it asserts CUDA or MTIA as it is made",
        "not tried",
    ),
]


def tests() -> list[str]:
    """The ids that the page names, each once, in their order."""
    cells = [cell for row in (*PIPELINES, *WAYS_TO_TRAIN) for cell in row[1:-1]]
    return list(dict.fromkeys(cell for cell in cells if cell.startswith("tests/")))


def page() -> str:
    """The page, where every test has passed."""
    numbers = {test: f"tested ({i})" for i, test in enumerate(tests(), start=1)}
    lines = [
        "# Does it work with ...?",
        "",
        "Made by `python docs/works.py`, which runs the tests named below and writes this page if "
        "all pass: on CPUs, on two ranks unless a test says otherwise.",
        "",
        "| Pipeline | heads | adapter | margin | |",
        "| --- | --- | --- | --- | --- |",
        *(_row(row, numbers) for row in PIPELINES),
        "",
        "| Way | | |",
        "| --- | --- | --- |",
        *(_row(row, numbers) for row in WAYS_TO_TRAIN),
        "",
        "## The tests",
        "",
        *(f"{i}. `{test}`" for i, test in enumerate(numbers, start=1)),
        "",
    ]
    return "\n".join(lines)


def _row(row: tuple[str, ...], numbers: dict[str, str]) -> str:
    return f"| {' | '.join(numbers.get(cell, cell) for cell in row)} |"


class Passed:
    """Notes the tests that pass."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """What pytest calls."""
        if report.when == "call" and report.passed:
            self.ids.add(report.nodeid)


def main() -> None:
    """Run the tests, and write the page."""
    passed = Passed()
    pytest.main(
        ["-q", "-m", "", f"--rootdir={PAGE.parents[1]}", "tests/test_ways.py", *tests()],
        plugins=[passed],
    )
    failed = [test for test in tests() if test not in passed.ids]
    if failed:
        sys.exit("\n".join(["these tests should have passed:", *failed]))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
