"""Costs of distillation in machine-independent counts: operations, bytes, host syncs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from costs import Costs, costs_of
from models import make_teacher

from torchrec_exfm import AuxiliaryHead, DistillationTerm, StudentAdapter, Task, TeacherOutputs
from torchrec_exfm.adapter import adapter_step

B, D, H = 512, 24, 128


def head_costs(
    *,
    terms: int = 1,
    tasks: int = 1,
    teachers: int = 1,
    adapted: int = 0,
    hidden: int = H,
    rates: tuple[float, float] = (1.0, 1.0),
) -> Costs:
    """Return the costs of an auxiliary head's forward and backward; the last terms are adapted.

    The negative sampling rates are those of the student's data and of the teachers'.
    """
    names = [f"teacher{m}" for m in range(teachers)]
    head = AuxiliaryHead(
        D,
        terms=[
            DistillationTerm(
                teacher=names[k % teachers],
                adapted=k >= terms - adapted,
                beta=3.0,
                weight=0.5,
                hidden=(hidden,),
                negative_sampling_rate=1.0 if k >= terms - adapted else rates[1],
            )
            for k in range(terms)
        ],
        teachers=names,
        tasks=[Task(name=f"task{t}", negative_sampling_rate=rates[0]) for t in range(tasks)],
    )
    teacher = make_teacher(0, B, teachers=teachers, tasks=tasks)
    shared = torch.randn(B, D, requires_grad=True)

    def step() -> None:
        head.zero_grad()
        shared.grad = None
        head(shared, teacher, adapted=teacher.values)[0].backward()

    return costs_of(step)


def adapter_costs(teachers: int = 1, tasks: int = 1) -> Costs:
    adapter = StudentAdapter(
        num_teachers=teachers, tasks=[Task(name=f"task{t}") for t in range(tasks)]
    )
    optimizer = torch.optim.Adam(adapter.parameters(), fused=True)
    teacher = make_teacher(0, B, teachers=teachers, tasks=tasks)
    labels = torch.zeros(B, tasks)
    count = torch.full((teachers, tasks), float(B))  # as the pipeline gives it
    return costs_of(lambda: adapter_step(adapter, optimizer, teacher, labels, count=count))


def test_the_costs_are_counted() -> None:
    values = torch.ones(B)
    costs = costs_of(lambda: (values + 1).view(1, B)[values.bool()[None]].sum().item())
    assert costs.operations["add"] == 1 and costs.kernels >= 4
    assert costs.syncs.keys() >= {"_local_scalar_dense"}
    assert costs.bytes >= 2 * values.nbytes


def test_operations_do_not_grow_with_tasks() -> None:
    """With one task the mean over tasks is saved."""
    for measure in (head_costs, adapter_costs):
        one, two, many = (measure(tasks=tasks) for tasks in (1, 2, 16))
        assert many.operations == two.operations
        assert one.kernels < two.kernels


def test_a_further_term_adds_its_own_operations_alone() -> None:
    """The same for the second and the eighth: nothing is done for each pair of terms."""
    one, two, eight = (head_costs(terms=terms).kernels for terms in (1, 2, 8))
    assert two - one <= 25
    assert eight - two == 6 * (two - one)


def test_operations_of_a_further_term_of_every_kind() -> None:
    """Costs of an adapted term, of a serving term with a margin, and of weights."""
    plain = mixed_costs(())
    adapted = mixed_costs((DistillationTerm(adapted=True, hidden=()),))
    margin = mixed_costs((DistillationTerm(adapted=True, serving=True, margin=0.5),))
    assert adapted.kernels - plain.kernels <= 17
    assert margin.kernels - plain.kernels <= 37
    weighted = mixed_costs((), weights=True)
    assert weighted.kernels - plain.kernels <= 14


def mixed_costs(terms: tuple[DistillationTerm, ...], *, weights: bool = False) -> Costs:
    """Return the costs of a head with a plain term and these."""
    head = AuxiliaryHead(D, terms=[DistillationTerm(), *terms])
    teacher, shared = make_teacher(0, B), torch.randn(B, D, requires_grad=True)
    serving = torch.randn(B, 1, requires_grad=True)
    options = {"adapted": teacher.values, "serving": serving, "labels": torch.zeros(B, 1)}
    if weights:
        options["weights"] = torch.ones(B)

    def step() -> None:
        head.zero_grad()
        shared.grad = serving.grad = None
        head(shared, teacher, **options)[0].backward()

    return costs_of(step)


@pytest.mark.parametrize("adapted", [0, 1])
def test_sampling_rates_cost_an_addition_where_they_differ(adapted: int) -> None:
    sizes = {"terms": 3, "tasks": 4, "teachers": 2, "adapted": adapted}
    plain, equal, other = (
        head_costs(**sizes, rates=rates) for rates in ((1.0, 1.0), (0.1, 0.1), (0.1, 0.5))
    )
    assert equal.operations == plain.operations
    assert other.operations - plain.operations == {"add": 3 - adapted}  # one a term
    assert plain.operations - other.operations == {}
    assert other.syncs == {}


def test_operations_of_a_step() -> None:
    """Each is a kernel's launch on a GPU, of about five microseconds."""
    assert head_costs().kernels <= 28
    assert head_costs(terms=2, adapted=1).kernels <= 54
    assert adapter_costs().kernels <= 37


@pytest.mark.parametrize(("measure", "looks"), [(head_costs, 0), (adapter_costs, 1)])
def test_nothing_waits_for_a_value(measure: Callable[..., Costs], looks: int) -> None:
    """Only the labels, which are on the CPU here, are looked at."""
    assert sum(measure(teachers=2, tasks=3).syncs.values()) == looks


def test_labels_and_weights_on_an_accelerator_are_taken_without_a_look_at_them() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    with torch.device("meta"):
        tasks = [Task(name="a"), Task(name="b", regression=True)]
        teacher = TeacherOutputs(torch.zeros(B, 1, 2))
        labels, weights = torch.zeros(B, 2), torch.ones(B)
        adapter, shared = StudentAdapter(tasks=tasks), torch.zeros(B, D)
        loss = adapter.loss(adapter(teacher), teacher, labels, weights=weights)
        terms = [DistillationTerm(), DistillationTerm(serving=True, margin=0.5)]
        head = AuxiliaryHead(D, terms=terms, tasks=tasks).to("meta")
        options = {"serving": torch.zeros(B, 2), "labels": labels, "weights": weights}
        total, _ = head(shared, teacher, **options)
    assert loss.is_meta and total.is_meta


def test_outputs_on_an_accelerator_are_taken_without_a_look_at_them() -> None:
    """Meta tensors have no values: whatever asked for one would raise."""
    device = torch.device("meta")
    values = torch.zeros(B, 2, 3, device=device)
    presence = torch.ones(B, 2, 3, device=device, dtype=torch.bool)
    outputs = TeacherOutputs(values, presence, torch.zeros(B, 2, device=device))
    assert outputs.values.device == device


def test_bytes_of_a_step() -> None:
    """Bytes are those of hidden layers: values, and gradients before and behind the ReLU."""
    widths = 2 * 1024
    parameters = (D + 2) * widths
    floats = head_costs(terms=2, adapted=1, hidden=1024).bytes / 4
    assert floats <= B * (5 * D + 3 * widths + 80) + 2 * parameters
