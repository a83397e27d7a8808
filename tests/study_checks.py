"""Checks of studies, each run by every rank of one or two."""

from __future__ import annotations

import dataclasses
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_models as rm
import torch
import torch.nn.functional as F
from ranks import device
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import DistillationTerm, ExFMBatch, StudentAdapter, Task, TeacherOutputs
from torchrec_exfm.das import Snapshot, TeacherLookup, TeacherStore
from torchrec_exfm.heads import DistillationHead
from torchrec_exfm.study import ARMS, Arm, Study, run, run_pass
from torchrec_exfm.study import passes as study_passes

STEPS, RATE, SEED = 12, 0.2, 3
TASKS = (Task(name="click"), Task(name="buy"))
TEACHERS = ("teacher", "second")
WITHOUT_WEIGHT = (
    DistillationTerm(weight=0.0),
    DistillationTerm(weight=0.0, adapted=True, serving=True, margin=0.25),
)
START, SECONDS, WINDOW = 1_760_000_400, 60, 600


def data() -> list[rm.Columns]:
    """Return data of all ranks: labels 0 or 1 (some "buy" missing), outputs exact in a store."""
    batches = []
    for step, batch in enumerate(rm.lacking(rm.global_data(STEPS), "one task")):
        rows = torch.arange(rm.GLOBAL_SIZE) + step * rm.GLOBAL_SIZE
        presence = batch.presence.all(-1, keepdim=True).expand_as(batch.presence).clone()
        columns = {
            "labels": batch.labels.flip(1).round(),
            "presence": presence,
            "values": batch.values.nan_to_num(0.25).masked_fill(~presence, torch.nan),
            "example_ids": rows,
            "event_seconds": START + SECONDS * rows,
        }
        batches.append(rm.Columns(**batch.columns | columns))
    return batches


def parts(rank: int, world_size: int) -> list[rm.Columns]:
    return [rm.part_of(batch, rank, world_size) for batch in data()]


def study_of(rank: int, world_size: int, **changes: Any) -> Study:
    """Return a study of two tasks and two teachers, on this rank's part of each batch."""
    study = Study(
        make_student=lambda: rm.labelled_student(torch.initial_seed()),
        stream=lambda: parts(rank, world_size),
        make_teacher=lambda: rm.logged,
        tap=rm.TAP,
        tasks=TASKS,
        teachers=TEACHERS,
        distribute=lambda module: rm.sharded(module, world_size, lr=RATE),
    )
    return dataclasses.replace(study, **changes)


def part(examples: Tensor, rank: int, world_size: int) -> Tensor:
    """Select a rank's examples: (steps, 16, T) to (N, T)."""
    return examples.chunk(world_size, dim=1)[rank].flatten(0, 1)


def by_hand(head: bool) -> Tensor:
    """Train a student in one process without a pipeline; return logits (steps, 16, T).

    Args:
        head: whether a second head on the shared representation learns the label.
    """
    student = rm.labelled_student(SEED)
    heads: nn.Module = nn.Identity()
    if head:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            rm.labelled_student(SEED)
            heads = DistillationHead(_width(student), num_tasks=2, hidden=(128,), beta=1.0)
    shared: list[Tensor] = []
    student.get_submodule(rm.TAP).register_forward_pre_hook(lambda _, x: shared.append(x[0]))
    optimizer = torch.optim.SGD([*student.parameters(), *heads.parameters()], lr=RATE)
    logits_by_step = []
    for batch in data():
        loss, (_, logits, labels) = student(batch)
        logits_by_step.append(logits)
        if head:
            labelled = ~labels.isnan()
            losses = F.binary_cross_entropy_with_logits(
                heads(shared[-1]), labels.nan_to_num(0.0), reduction="none"
            )
            loss = loss + (torch.where(labelled, losses, 0.0).sum(0) / labelled.sum(0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(logits_by_step)


def _width(student: nn.Module) -> int:
    first = next(m for m in student.get_submodule(rm.TAP).modules() if isinstance(m, nn.Linear))
    return first.in_features


def check_none_is_the_students_own_training(rank: int, world_size: int) -> None:
    """The arm "none" equals TorchRec's pipeline to the bit, and nearly one process on all data."""
    steps: list[int] = []
    result = run_pass(study_of(rank, world_size), Arm(), SEED, steps.append)
    trainee = rm.sharded(rm.labelled_student(SEED), world_size, lr=RATE)
    plain = TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())
    outputs = rm.drained(plain, parts(rank, world_size))
    for column, position in (("logits", 1), ("labels", 2)):
        expected = torch.cat([output[position] for output in outputs]).numpy()
        np.testing.assert_array_equal(getattr(result, column), expected)
    expected = part(by_hand(head=False), rank, world_size)
    rm.assert_near([torch.from_numpy(result.logits)], [expected])
    size = rm.GLOBAL_SIZE // world_size
    assert steps == [size] * STEPS and result.teacher.shape == (0, 2, 2)
    assert result.periods.tolist() == [at * 40 // STEPS for at in range(STEPS) for _ in range(size)]


def check_logits_are_from_before_the_update(rank: int, world_size: int) -> None:
    """The first step's logits are the fresh student's; a later step's of the same batch differ."""
    first = parts(rank, world_size)[0]
    study = study_of(rank, world_size, stream=lambda: [first, first])
    fresh = rm.labelled_student(SEED)(first)[1][1]
    for arm in ARMS.values():
        logits = torch.from_numpy(run_pass(study, arm, SEED).logits)
        before, after = logits.chunk(2)
        rm.assert_near([before], [fresh])
        assert (after - before).abs().max() > 1e-4


def check_weight_zero_is_none(rank: int, world_size: int) -> None:
    study = study_of(rank, world_size)
    alone, beside = (run_pass(study, arm, SEED) for arm in (Arm(), Arm(WITHOUT_WEIGHT)))
    np.testing.assert_array_equal(beside.logits, alone.logits)
    expected = torch.cat([batch.values for batch in parts(rank, world_size)]).numpy()
    np.testing.assert_array_equal(beside.teacher, expected)
    taught = run_pass(study, Arm((DistillationTerm(),)), SEED)
    assert np.abs(taught.logits - alone.logits).max() > 1e-4


def check_control_is_a_head_on_the_label(rank: int, world_size: int) -> None:
    """The control nearly equals a second head by hand; missing labels teach nothing."""
    result = run_pass(study_of(rank, world_size), ARMS["head on the label"], SEED)
    assert np.isnan(result.labels).any() and result.teacher.shape == (0, 2, 2)
    expected = part(by_hand(head=True), rank, world_size)
    alone = part(by_hand(head=False), rank, world_size)
    rm.assert_near([torch.from_numpy(result.logits)], [expected])
    assert (expected - alone).abs().max() > 1e-4


def check_ways_to_bring_outputs(rank: int, world_size: int) -> None:
    """Outputs in the stream's batches and from a store teach the same as columns, to the bit."""

    def stream() -> Iterator[ExFMBatch[Any]]:
        for batch in parts(rank, world_size):
            yield ExFMBatch(batch, rm.logged(batch))

    columns = study_of(rank, world_size)
    lookups: list[TeacherLookup] = []
    with rm.shared_folder() as name:
        if rank == 0:
            store = {"tasks": ("click", "buy"), "window_seconds": WINDOW, "resolution": "float32"}
            fill(TeacherStore.create(name, **store))
        torch.distributed.barrier()

        def make_teacher() -> TeacherLookup:
            lookups.append(TeacherLookup(TeacherStore(name), TEACHERS))
            return lookups[-1]

        for arm in (ARMS["none"], ARMS["head on the label"], ARMS["AH + SA by margin"]):
            expected = run_pass(columns, arm, SEED)
            carried = run_pass(study_of(rank, world_size, stream=stream, make_teacher=None), arm, 3)
            stored = run_pass(study_of(rank, world_size, make_teacher=make_teacher), arm, SEED)
            for result in (carried, stored):
                for column in ("logits", "labels", "teacher", "periods"):
                    np.testing.assert_array_equal(vars(result)[column], vars(expected)[column])
    assert len(lookups) == 1  # neither the student alone nor the control asks for one
    for lookup in lookups:
        with pytest.raises(ValueError, match=r"before close\(\)"):
            lookup(parts(rank, world_size)[0])


def fill(store: TeacherStore) -> None:
    for k, teacher in enumerate(TEACHERS):
        for batch in data():
            presence = batch.presence[:, k].all(-1)
            store.write(
                Snapshot(teacher, 1, START - 1),
                batch.example_ids[presence],
                batch.values[presence, k],
                batch.event_seconds[presence],
            )


def check_a_run(rank: int, world_size: int) -> None:
    """Both ranks' examples are in the table, and stored passes are not trained again."""
    made: list[int] = []

    def make_student() -> nn.Module:
        made.append(torch.initial_seed())
        return rm.labelled_student(torch.initial_seed())

    older = lambda batch: TeacherOutputs(0.5 * batch.values, batch.presence)  # noqa: E731
    changes = {"make_student": make_student, "make_older_teacher": lambda: older}
    study = study_of(rank, world_size, period=lambda batch: batch.example_ids // 64, **changes)
    with rm.shared_folder() as name:
        text = run(study, seeds=2, folder=Path(name) / "out")
        assert made == [0] * 6 + [1] * 6
        table = json.loads((Path(name) / "out" / "table.json").read_text())
        repeated = run(study, seeds=2, folder=Path(name) / "out")
        assert len(made) == 12 and repeated == text
    assert "means over 2 seeds and 2 tasks, of 128 examples" in text
    labels = torch.cat([batch.labels for batch in data()])[64:]  # the second half, as periods are
    rows = dict(zip(("click", "buy"), (~labels.isnan()).sum(0).tolist(), strict=True))
    student_rows = [r for r in table if "itself" not in r["arm"]]
    assert len(student_rows) == 6 * 2 * 2 and rows["click"] != rows["buy"]
    assert all(r["rows"] == rows[r["part"]] for r in student_rows)
    assert _ratio(text) == pytest.approx(_ratio_of(table), abs=0.006)


def _ratio(text: str) -> float:
    match = re.search(r"Generation ratio of AH, by the older teacher: (\S+)\.\n", text)
    assert match
    return float(match[1])


def _ratio_of(table: list[Mapping[str, Any]]) -> float:
    def covered(arm: str) -> float:
        none = {(r["seed"], r["part"]): r["covered_ne"] for r in table if r["arm"] == "none"}
        rows = [r for r in table if r["arm"] == arm]
        return float(np.mean([r["covered_ne"] / none[r["seed"], r["part"]] for r in rows]))

    gain = covered("AH, by the older teacher") - covered("AH")
    return gain / (covered("the older teacher itself") - covered("the teacher itself"))


def check_wrong_studies_are_refused(rank: int, world_size: int) -> None:
    def refuse(message: str, seeds: int = 1, **changes: Any) -> None:
        study = study_of(rank, world_size, **changes)
        with rm.shared_folder() as name, pytest.raises(ValueError, match=message):
            run(study, seeds=seeds, folder=name)

    refuse("at least one seed.*received 0 seeds", seeds=0)
    refuse(r"one arm 'none' without terms.*received 1 seeds, \[\]", arms={"AH": ARMS["AH"]})
    refuse(r"received 1 seeds, \['none', 'more'\]", arms={"none": Arm(), "more": Arm()})
    older = {"none": Arm(), "before": Arm(ARMS["AH"].terms, "older")}
    refuse(r"make_older_teacher.*\['before'\] of an older one", arms=older)
    refuse(r"binary tasks.*the regressions \['stay'\]", tasks=rm.TASKS)
    refuse(r"stream\(\) should give some batches; received none", stream=list)
    refuse(r"should return \(loss, logits, labels\).*outputs=", outputs=operator.itemgetter(0, 1))
    refuse(r"the last two of \(B, 1\)", tasks=TASKS[:1], teachers=TEACHERS, arms={"none": Arm()})
    refuse("period should give an integer for each example", period=lambda batch: 7)
    calls: list[int] = []

    def changing() -> list[rm.Columns]:
        calls.append(0)
        return parts(rank, world_size)[len(calls) % 2 :]

    refuse("same batches in the same order.*other labels than in an earlier pass", stream=changing)
    if world_size > 1:
        refuse("received the same on two ranks", stream=lambda: parts(0, world_size))

    fifths = lambda output: (output[0], output[1], 5 * output[2])  # noqa: E731
    refuse(r"labels should lie in \[0, 1\].*received 0 to 5", outputs=fifths)
    sure = lambda output: (output[0], output[1].sigmoid(), output[2])  # noqa: E731
    refuse("the student's log-odds; received values that all lie", outputs=sure)


def check_the_planners_way(rank: int, world_size: int) -> None:
    """Even small tables keep their fused optimizer; every arm starts from the same values."""
    with pytest.raises(ValueError, match=r"apply an optimizer to its tables.*t0\.weight"):
        study_passes.distribute(rm.labelled_student())
    model, optimizer = study_passes.distribute(_with_sgd())
    dense: Any = optimizer
    assert not [name for name in dense.params if "embedding_bag" in name]
    module: Any = model
    fused = [name for name in module.fused_optimizer.params if "embedding_bag" in name]
    assert sum(rm.on_every_rank(torch.tensor(len(fused)))) == 3
    study = study_of(rank, world_size, make_student=_with_sgd, distribute=study_passes.distribute)
    alone, beside = (run_pass(study, arm, SEED).logits for arm in (Arm(), Arm(WITHOUT_WEIGHT)))
    np.testing.assert_array_equal(beside, alone)


def _with_sgd() -> nn.Module:
    student = rm.labelled_student(torch.initial_seed())
    bags = student.model.sparse_arch.embedding_bag_collection
    rm.apply_optimizer_in_backward(torch.optim.SGD, bags.parameters(), {"lr": RATE})
    return student


def check_adapter_and_options_are_used(rank: int, world_size: int) -> None:
    """A study uses its own adapter, weights and labels; an adapter without a rate stays."""
    adapters: list[StudentAdapter] = []
    drawn: list[Tensor] = []

    def make_adapter() -> tuple[StudentAdapter, torch.optim.Optimizer]:
        drawn.append(torch.get_rng_state())
        adapters.append(StudentAdapter(num_teachers=2, tasks=TASKS, hidden=(5,)))
        return adapters[-1], torch.optim.SGD(adapters[-1].parameters(), lr=0.0)

    def knows(batch: rm.Columns) -> TeacherOutputs:  # and so leads the student
        return TeacherOutputs((6 * batch.labels.nan_to_num(0.5) - 3).unsqueeze(1).repeat(1, 2, 1))

    arm = ARMS["AH + SA by margin"]
    study = study_of(rank, world_size, make_teacher=lambda: knows)
    own_adapter = dataclasses.replace(study, make_adapter=make_adapter)
    ones = dataclasses.replace(study, weights=lambda batch: torch.zeros(len(batch.labels)))
    usual, frozen, unweighed, alone = (
        run_pass(study_run, arm_of, SEED).logits
        for study_run, arm_of in ((study, arm), (own_adapter, arm), (ones, arm), (study, Arm()))
    )
    assert len(adapters) == 1 and not np.array_equal(usual, frozen)
    assert torch.equal(drawn[0], torch.manual_seed(SEED).get_state())  # whatever sharding drew
    np.testing.assert_allclose(unweighed, alone, rtol=1e-5, atol=1e-6)
    assert np.abs(usual - alone).max() > 1e-4
