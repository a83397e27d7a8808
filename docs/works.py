"""Write docs/works.md after running the tests that it names: `python docs/works.py`."""

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

SHARDED = "ranks_agree_with_one-{}-SGD-adapted".format

# A cell is a test's id, or "no, because ...".
# Pipelines: a name, cells for heads, adapter and margin, and a note.
PIPELINES: list[tuple[str, str, str, str, str]] = [
    (
        "`TrainPipelineBase`",
        *[RANKS(MIXIN("base"))] * 3,
        "TorchRec 1.8 ignores its `custom_model_fwd`",
    ),
    (
        "`TrainPipelineSparseDist` (`TrainPipelineExFM`)",
        *(RANKS(PLAIN(kind)) for kind in ("heads", "adapted", "margins")),
        "",
    ),
    ("`TrainPipelineSparseDistLite`", *[RANKS(MIXIN("lite"))] * 3, ""),
    ("a subclass of your own", *[WAYS("gradient_scaler")] * 3, "put the mixin first"),
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
        "without the mixin, since the forward is yours: put `Feed` of `torchrec_exfm/steps.py` "
        "around the iterator and call `Steps.finish()` after each step. Tested as a loop; the "
        "pipeline itself needs CUDA",
    ),
    (
        "`TrainPipelineSparseDistCompAutograd`",
        *["no, because TorchRec's own fails"] * 3,
        "on a CPU FBGEMM's backward has no kernel for fake tensors; not tried with CUDA",
    ),
]
# Ways to train, by section: a name, a cell, and a note.
WAYS_TO_TRAIN: dict[str, list[tuple[str, str, str]]] = {
    "Mixed precision (AMP)": [
        (
            "autocast in bfloat16 around `progress`",
            WAYS("autocast-sparse_dist"),
            "enter it anew for each step: autocast around the whole loop keeps the weights that it "
            "cast in the first step",
        ),
        ("... under `TrainPipelineBase`", WAYS("autocast-base"), ""),
        ("... under `TrainPipelineSparseDistLite`", WAYS("autocast-lite"), ""),
        ("autocast around the student alone (`custom_model_fwd`)", WAYS("autocast-student"), ""),
        ("a tapped module with bfloat16 weights", RANKS("bfloat16-over part"), ""),
        (
            "float16 with a `GradScaler` in `_backward`",
            WAYS("gradient_scaler"),
            "with data-parallel tables, since a fused optimizer does not unscale its gradients; "
            "from TorchRec 1.7 on",
        ),
        (
            "TF32 and other precision settings",
            WAYS("precision_settings_stay"),
            "left as you set them",
        ),
    ],
    "`torch.compile`": [
        ("the tapped module", WAYS("compiled-over-aot_eager-sparse_dist"), ""),
        ("... by inductor", WAYS("compiled-over-inductor-sparse_dist"), ""),
        ("the heads", WAYS("compiled-heads-aot_eager-sparse_dist"), ""),
        (
            "the whole student",
            WAYS("compiled-student-aot_eager-base"),
            "under `TrainPipelineBase`. Under `TrainPipelineSparseDist` the plain student fails "
            "too on a CPU: Dynamo can't trace the stream in its pipelined forward",
        ),
        ("the whole wrapped model", WAYS("compiled-model-eager-base"), "likewise"),
    ],
    "Accumulation, evaluation and data loaders": [
        (
            "gradient accumulation",
            RANKS("gradient_accumulation"),
            "the adapter steps at every batch",
        ),
        ("... under `TrainPipelineBase`", WAYS("gradient_accumulation-base"), ""),
        ("... under `TrainPipelineSparseDistLite`", WAYS("gradient_accumulation-lite"), ""),
        ("`EvalPipelineSparseDist` between steps", RANKS("evaluation_between_steps"), ""),
        ("... under `TrainPipelineBase`", WAYS("evaluation_between_steps-base"), ""),
        ("... under `TrainPipelineSparseDistLite`", WAYS("evaluation_between_steps-lite"), ""),
        (
            "`model.eval()` for some batches of the train pipeline",
            RANKS("evaluation_in_the_pipeline"),
            "",
        ),
        (
            "several data loaders in turns",
            WAYS("loaders_in_turns-sparse_dist"),
            "while none is exhausted: TorchRec then loses its place, with or without the mixin",
        ),
        ("... under `TrainPipelineBase`", WAYS("loaders_in_turns-base"), ""),
        ("... under `TrainPipelineSparseDistLite`", WAYS("loaders_in_turns-lite"), ""),
    ],
    "Batches and pipeline options": [
        ("variable batch sizes by feature (VBE)", WAYS("batch_sizes_by_feature"), ""),
        (
            "a rank with fewer batches",
            "no, because TorchRec's collectives need all ranks",
            "with or without the mixin, the others wait for the group's timeout, or gloo ends the "
            "process. Give that rank batches without examples",
        ),
        (
            "batches without examples on a rank",
            WAYS("batches_without_examples-sparse_dist"),
            "if the student's own loss is not NaN there",
        ),
        ("... under `TrainPipelineBase`", WAYS("batches_without_examples-base"), ""),
        (
            "`enable_inplace_copy_batch`",
            RANKS("option_changes_nothing-enable_inplace_copy_batch"),
            "",
        ),
        (
            "`enqueue_batch_after_forward`",
            RANKS("option_changes_nothing-enqueue_batch_after_forward"),
            "",
        ),
        (
            "`free_features_storage_early`",
            RANKS("option_changes_nothing-free_features_storage_early"),
            "not with a live teacher, which reads the features later; from TorchRec 1.7 on",
        ),
        ("`async_inplace_copy` of TorchRec 1.9", "no, because it is off on a CPU", "not tried"),
    ],
    "Sharding, DDP, FSDP and 2D parallelism": [
        ("table-wise tables", RANKS(SHARDED("table_wise")), "two ranks agree with one process"),
        ("row-wise tables", RANKS(SHARDED("row_wise")), "likewise"),
        ("column-wise tables", RANKS(SHARDED("column_wise")), "likewise"),
        ("data-parallel tables", RANKS(SHARDED("data_parallel")), "likewise"),
        ("several kinds of sharding in one model", RANKS(SHARDED("mixed")), "likewise"),
        ("DDP without `DistributedModelParallel`", RANKS("without_dmp-True"), ""),
        (
            "FSDP2 of the dense modules and the heads",
            WAYS("fsdp-parts"),
            "apply `fully_shard` to each before the pipeline is made, with "
            "`init_data_parallel=False`",
        ),
        ("FSDP2 of the whole wrapper", WAYS("fsdp-whole"), "with the tables in `ignored_params`"),
        ("FSDP2 over a two-dimensional mesh", WAYS("fsdp-hybrid"), ""),
        (
            "2D parallelism (`DMPCollection`)",
            "no, because its constructor requires CUDA or MTIA",
            "not tried",
        ),
    ],
}
VERSIONS = """\
## TorchRec versions

| TorchRec | torch, FBGEMM | |
| --- | --- | --- |
| 1.8 | 2.13, 1.8 | the tests of this page run on these |
| 1.9.2 | 2.13, 1.8 | the package's tests pass |
| 1.6, 1.7, 1.9 | [as released](install.md#with-an-existing-torchrec) | no warning at import |
| another | as released | a warning at import; training goes on |
"""


def tests() -> list[str]:
    """Return the ids that the page names, each once, in their order."""
    rows = [*PIPELINES, *(row for section in WAYS_TO_TRAIN.values() for row in section)]
    cells = [cell for row in rows for cell in row[1:-1]]
    return list(dict.fromkeys(cell for cell in cells if cell.startswith("tests/")))


def page() -> str:
    """Return the page for the case that every test has passed."""
    numbers = {test: f"tested ({i})" for i, test in enumerate(tests(), start=1)}
    lines = [
        "# Does it work with ...?",
        "",
        "Which pipelines, options and versions are tested. The number in each *tested* cell names "
        "its test [below](#the-tests). Tests run on CPUs, on two ranks unless the test says "
        "otherwise. `make works` runs them all and writes this page only if all pass.",
        "",
        "## Pipelines and kinds of terms",
        "",
        "*Heads* are terms with a head that learns from the teacher; *adapter* and *margin* are "
        "terms with a student adapter, and with a margin.",
        "",
        "| pipeline | heads | adapter | margin | note |",
        "| --- | --- | --- | --- | --- |",
        *(_row(row, numbers) for row in PIPELINES),
    ]
    for title, rows in WAYS_TO_TRAIN.items():
        lines += ["", f"## {title}", "", "| what | | note |", "| --- | --- | --- |"]
        lines += [_row(row, numbers) for row in rows]
    lines += ["", VERSIONS, "## The tests", ""]
    lines += [f"{i}. `{test}`" for i, test in enumerate(numbers, start=1)]
    return "\n".join([*lines, ""])


def _row(row: tuple[str, ...], numbers: dict[str, str]) -> str:
    return f"| {' | '.join(numbers.get(cell, cell) for cell in row)} |"


class Passed:
    """A pytest plugin that collects the ids of the tests that pass."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Collect a test that passed."""
        if report.when == "call" and report.passed:
            self.ids.add(report.nodeid)


def main() -> None:
    """Run the tests; write the page if all pass."""
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
