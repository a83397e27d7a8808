"""Taps of submodules' outputs: two towers, alone or in one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchrec_exfm import (
    DistillationTerm,
    DistillationWarning,
    ExFMBatch,
    ExFMWrapper,
    OutputsOf,
    Task,
    TeacherOutputs,
)
from torchrec_exfm.batch import StepInputs
from torchrec_exfm.losses import in_batch_positives, in_batch_softmax

SIZE = 6
BOTH = OutputsOf("towers.query", "towers.item")


class Towers(nn.Module):
    """Returns both vectors, normalised in place or not, or some other tuple."""

    def __init__(self, widths: tuple[int, int], change: Callable[..., Any]) -> None:
        super().__init__()
        self.query, self.item = nn.Linear(3, widths[0]), nn.Linear(5, widths[1])
        self.change = change

    def forward(self, inputs: Tensor) -> Any:
        return self.change(self.query(inputs[:, :3]), self.item(inputs[:, 3:]))


def as_they_are(query: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    return query, item


class Train(nn.Module):
    """Sums the pairs' scores; ``runs`` is how often its towers run."""

    def __init__(
        self, widths: tuple[int, int] = (4, 4), change: Any = as_they_are, runs: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.towers, self.runs = Towers(widths, change), runs
        self.norm = nn.LayerNorm(8)

    def forward(self, batch: Tensor) -> Any:
        for _ in range(self.runs):
            query, item = self.towers(batch)[:2]
        loss = (query[:, :1] * item[:, :1]).sum()
        return loss, (loss.detach(), query.detach(), None)


def inputs() -> ExFMBatch[Tensor]:
    torch.manual_seed(1)
    teacher = TeacherOutputs(torch.randn(SIZE), embeddings=torch.randn(SIZE, 10))
    batch = ExFMBatch(torch.randn(SIZE, 8), teacher)
    batch.step_inputs = StepInputs(teacher, candidates=torch.arange(SIZE))
    return batch


def seen(student: nn.Module, tap: Any, **options: Any) -> Tensor:
    """Return the representation that the heads receive."""
    wrapper, tapped = ExFMWrapper(student, tap=tap, **options), []
    head = wrapper.auxiliary_head.term_losses[0]
    head.register_forward_pre_hook(lambda module, args: tapped.append(args[0][0]))
    wrapper(inputs())[0].backward()
    assert wrapper.student.towers.item.weight.grad.any()
    return tapped[0]


def expected(student: Train) -> Tensor:
    features = inputs().batch
    return torch.cat(
        [student.towers.query(features[:, :3]), student.towers.item(features[:, 3:])], 1
    )


def normalised(query: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
    return query.mul(2), item.relu_()  # in place, after the tapped module


@pytest.mark.parametrize("change", [as_they_are, normalised])
def test_outputs_are_taken_side_by_side_as_they_were(change: Any) -> None:
    student = Train(change=change)
    torch.testing.assert_close(seen(student, BOTH), expected(student))


def test_a_module_may_return_both() -> None:
    student = Train(change=lambda query, item: (query, item))
    actual = seen(student, OutputsOf("towers"), in_features=8)
    torch.testing.assert_close(actual, expected(student))
    loss = {"terms": [DistillationTerm(loss=in_batch_softmax())]}
    assert seen(student, OutputsOf("towers"), in_features=8, **loss).shape == (SIZE, 8)


def test_the_width_is_that_of_the_last_layers() -> None:
    assert seen(Train((4, 3)), BOTH).shape == (SIZE, 7)
    with pytest.raises(ValueError, match=r"'norm' \(LayerNorm\), which has no nn.Linear"):
        ExFMWrapper(Train(), tap=OutputsOf("towers.query", "norm"))


def test_pairs_of_tasks_may_mix_both_kinds() -> None:
    tasks = [Task(name="click"), Task(name="buy")]
    tap = {"click": BOTH, "buy": "towers.item"}
    teacher = TeacherOutputs(torch.randn(SIZE, 2))
    terms = [DistillationTerm(loss=in_batch_positives(), tasks=("click",)), DistillationTerm()]
    wrapper = ExFMWrapper(Train(), tap=tap, tasks=tasks, terms=terms)
    batch = ExFMBatch(torch.randn(SIZE, 8, requires_grad=True), teacher)
    batch.step_inputs = StepInputs(teacher, candidates=torch.arange(SIZE))
    wrapper(batch)[0].backward()
    assert [h.mlp[0].in_features for h in wrapper.auxiliary_head.term_losses[1].heads] == [8, 5]


IN_BATCH = [DistillationTerm(loss=in_batch_softmax())]


@pytest.mark.parametrize(
    ("student", "tap", "options", "error", "message"),
    [
        (Train(runs=2), BOTH, {}, RuntimeError, r"'towers.query, towers.item'.*it ran 4 times"),
        (Train(runs=2), OutputsOf("towers.query"), {}, RuntimeError, "it ran 2 times"),
        (
            Train(),
            OutputsOf("towers.query", "norm"),
            {"in_features": 8},
            RuntimeError,
            "should run exactly once .* it ran 1 times",
        ),
        (Train(), BOTH, {"in_features": 9}, ValueError, r"output .*\(B, 9\); received \(6, 4\)"),
        (
            Train(change=lambda query, item: (query, item, None)),
            OutputsOf("towers"),
            {"in_features": 8},
            ValueError,
            r"received \(6, 4\), \(6, 4\), NoneType",
        ),
        (Train((4, 2)), BOTH, {"terms": IN_BATCH}, ValueError, r"of one width.*\[4, 2\]"),
        (
            Train(),
            OutputsOf("towers.query"),
            {"terms": IN_BATCH},
            ValueError,
            r"of one width.*\[4\]",
        ),
        (
            Train(),
            "towers.query",
            {"terms": IN_BATCH},
            ValueError,
            r"tap=OutputsOf\(query tower, item tower\); received tap='towers.query'",
        ),
        (
            Train(),
            BOTH,
            {"terms": [DistillationTerm(serving=True)]},
            ValueError,
            "should be the logits of the tasks.*or pass serving_logits",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    student: nn.Module, tap: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        ExFMWrapper(student, tap=tap, **options)(inputs())


class TrainOfLogits(Train):
    """Returns its logits with their gradient."""

    def forward(self, batch: Tensor) -> Any:
        query, item = self.towers(batch)
        logits = (query * item).sum(1)
        return logits.new_zeros(()), (logits.detach(), logits, None)


def test_serving_logits_may_be_told() -> None:
    terms = [DistillationTerm(serving=True)]
    wrapper = ExFMWrapper(
        TrainOfLogits(), tap=BOTH, terms=terms, serving_logits=lambda output: output[1][1]
    )
    wrapper(inputs())[0].backward()
    assert wrapper.student.towers.query.weight.grad.any()


def test_towers_without_gradient_are_told() -> None:
    student = Train()
    for parameter in student.towers.parameters():
        parameter.requires_grad_(False)
    with pytest.warns(
        DistillationWarning, match=r"the output of the tapped module 'towers.query, "
    ):
        ExFMWrapper(student, tap=BOTH)(inputs())


def test_a_tap_prints_as_it_is_written() -> None:
    assert repr(BOTH) == "OutputsOf('towers.query', 'towers.item')"
