"""Checks of a foundation model (FM) that teaches a domain model, which teaches vertical students.

All of them meet in one store; the domain model is student and teacher at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import das_data as dd
import pytest
import rank_checks_metrics as metrics_checks
import rank_checks_store as store_checks
import rank_models as rm
import torch
import torch.distributed as dist
from ranks import device
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import (
    DistillationTerm,
    ExFMMetrics,
    RunMonitor,
    TeacherOutputs,
    export_student,
)
from torchrec_exfm.das import (
    Shard,
    Snapshot,
    StoreError,
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    Window,
    publish,
    published,
    score,
    train_teacher,
    train_windows,
    wait_for_outputs,
)
from torchrec_exfm.wrapper import find_wrapper

BEFORE = store_checks.TRAINED_THROUGH


def student(world_size: int, *teachers: str, seed: int = 3) -> rm.Trainee:
    """Return a student with a head for each teacher."""
    terms = [DistillationTerm(teacher=teacher, hidden=(4,)) for teacher in teachers]
    wrapper = rm.wrapped(rm.two_task_student(seed), terms=terms, teachers=teachers)
    return rm.sharded(wrapper, world_size)


def learnt(world_size: int, batches: Sequence[rm.Columns], source: Any, *teachers: str) -> Any:
    """Return a student's outputs and its final state."""
    trainee = student(world_size, *teachers)
    outputs = rm.drained(rm.pipeline_of(trainee, teacher=source), batches)
    return outputs, rm.snapshot(trainee.model.state_dict())


def column(*names: str) -> Any:
    """Return a source of the teachers' outputs in columns of the batch."""
    return lambda batch: TeacherOutputs(torch.stack([getattr(batch, n) for n in names], dim=1))


def with_column(
    batches: Sequence[rm.Columns], name: str, values: Sequence[Tensor]
) -> list[rm.Columns]:
    pairs = zip(batches, values, strict=True)
    return [rm.Columns(**batch.columns | {name: logits.cpu()}) for batch, logits in pairs]


def log_fm(store: TeacherStore, world_size: int, batches: list[rm.Columns]) -> list[Tensor]:
    """Train the FM, which has no teacher; return the outputs that it logged before each update."""
    trainee = rm.sharded(rm.two_task_student(), world_size)
    pipeline: Any = TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())
    with TeacherLogger(store, "fm") as logger:
        logger.attach(trainee.model)
        logits = [logits for _, logits, _ in rm.drained(pipeline, batches)]
    dist.barrier()
    return logits


def log_domain(
    store: TeacherStore, trainee: rm.Trainee, batches: Sequence[rm.Columns], source: Any
) -> list[Tensor]:
    """Train the domain model on the FM's outputs; return the outputs that it logged."""
    pipeline = rm.pipeline_of(trainee, teacher=source)
    with TeacherLogger(store, "domain") as logger:
        logger.attach(trainee.model)
        logits = [logits for _, logits, _ in rm.drained(pipeline, batches)]
    dist.barrier()
    return logits


def check_student_and_teacher_at_once(rank: int, world_size: int) -> None:
    """Looked-up outputs of each hop teach the same as columns of the batches, to the bit."""
    batches = store_checks.parts(rank, world_size)
    with rm.shared_folder() as name:
        store = store_checks.new_store(Path(name) / "store")
        columns = with_column(batches, "fm", log_fm(store, world_size, batches))
        with TeacherLookup(store, "fm") as lookup:
            by_store = learnt(world_size, batches, lookup, "fm")
            rm.assert_same(by_store, learnt(world_size, columns, column("fm"), "fm"))
            domain = log_domain(store, student(world_size, "fm"), batches, lookup)
        rm.assert_same(domain, [logits for _, logits, _ in by_store[0]])
        outputs_by_id = store_checks.stored(store, "domain")
        ids = torch.cat([batch.example_ids for batch in batches]).tolist()
        assert [outputs_by_id[key] for key in ids] == torch.cat(domain).tolist()

        columns = with_column(columns, "domain", domain)
        for teachers in ("domain",), ("fm", "domain"):
            with TeacherLookup(store, teachers) as lookup:
                vertical = learnt(world_size, batches, lookup, *teachers)
                assert all(lookup.counters[key].coverage == 1 for key in teachers)
            rm.assert_same(vertical, learnt(world_size, columns, column(*teachers), *teachers))
        assert rm.differs(
            vertical[1], learnt(world_size, columns, column("fm", "fm"), *teachers)[1]
        )


def check_what_is_logged_is_the_serving_head_before_the_update(rank: int, world_size: int) -> None:
    """Logged outputs are the exported student's before the update; the monitor sees the FM."""
    batches = metrics_checks.clicked(store_checks.parts(rank, world_size))
    with rm.shared_folder() as name:
        store = store_checks.new_store(Path(name) / "store")
        log_fm(store, world_size, batches)
        trainee = student(world_size, "fm")
        pipeline = rm.pipeline_of(trainee, teacher=TeacherLookup(store, "fm"))
        metrics = ExFMMetrics(
            batch_size=len(batches[0].labels), device=device(), tasks=rm.TASKS, teachers=["fm"]
        )
        expected: list[Tensor] = []
        with (
            TeacherLogger(store, "domain") as logger,
            RunMonitor(pipeline, metrics, progress=False) as monitor,
        ):
            logger.attach(trainee.model)
            iterator = iter(batches)
            for batch in batches:
                served = export_student(trainee.model)
                monitor.step(pipeline.progress(iterator))
                after = export_student(trainee.model)
                if served is not None and after is not None:  # on the first rank
                    expected.append(served(batch)[1][1])
                    assert not torch.allclose(after(batch)[1][1], expected[-1], atol=1e-3)
        assert monitor.last["coverage/fm/click"] == 1 and monitor.last["lookup/fm/missing"] == 0
        dist.barrier()
        outputs_by_id = store_checks.stored(store, "domain")
        for batch, logits in zip(batches, expected, strict=False):
            stored = torch.tensor([outputs_by_id[id_] for id_ in batch.example_ids.tolist()])
            torch.testing.assert_close(stored, logits)
        assert len(expected) == (len(batches) if rank == 0 else 0)


def write_fm(store: TeacherStore, snapshot: Snapshot, batches: Sequence[rm.Columns]) -> None:
    """Write outputs of the FM for the examples of all ranks."""
    if dist.get_rank() == 0:
        for batch in batches:
            values = batch.values[:, 0].nan_to_num(0.25)
            store.write(snapshot, batch.example_ids, values, batch.event_seconds)
    dist.barrier()


def plant_fm(store: TeacherStore, batches: Sequence[rm.Columns]) -> None:
    """Plant outputs of a newer version that break the leak rule."""
    if dist.get_rank() == 0:
        for batch in batches:
            rows, seconds = len(batch.labels), batch.event_seconds.numpy()
            values = batch.values[:, 0].nan_to_num(0.25).T.numpy()
            dd.plant(
                store,
                rows,
                example_id=batch.example_ids.tolist(),
                event_time=seconds * dd.US,
                trained_through=seconds * dd.US,
                snapshot=[9] * rows,
                window=seconds // store_checks.WINDOW,
                **dict(zip(store.format.outputs, values + 5, strict=True)),
            )
    dist.barrier()


def check_nothing_of_a_leak_reaches_the_second_hop(rank: int, world_size: int) -> None:
    """Leaking outputs of the FM change neither the domain model nor its student."""
    global_batches, batches = store_checks.data(), store_checks.parts(rank, world_size)
    domains, verticals = [], []
    for case in "clean", "leaking", "allowed":
        with rm.shared_folder() as name:
            store = store_checks.new_store(Path(name) / "store")
            write_fm(store, Snapshot("fm", 3, BEFORE), global_batches[::2])
            if case == "leaking":
                plant_fm(store, global_batches)
                with pytest.raises(StoreError, match="leak: their teacher was trained through"):
                    TeacherLookup(store, "fm")(batches[0])
            if case == "allowed":
                write_fm(store, Snapshot("fm", 9, BEFORE), global_batches)
            lookup = TeacherLookup(store, "fm", bad_rows="quarantine")
            domains.append(log_domain(store, student(world_size, "fm"), batches, lookup))
            counters = lookup.counters["fm"]
            assert (counters.quarantined > 0) == (case == "leaking")
            assert counters.coverage == (1 if case == "allowed" else 0.5)
            verticals.append(learnt(world_size, batches, TeacherLookup(store, "domain"), "domain"))
    clean, leaking, allowed = domains
    rm.assert_same(leaking, clean)
    rm.assert_same(verticals[1], verticals[0])
    assert not torch.equal(torch.cat(allowed), torch.cat(clean))
    assert rm.differs(verticals[2][1], verticals[0][1])


def check_a_published_domain_model_scores(rank: int, world_size: int, form: str) -> None:
    """A domain model's scores are its exported student's outputs; each hop has ages of its own."""
    batches = store_checks.parts(rank, world_size)
    trained, fresh = batches[:4], batches[4:]
    through = int(store_checks.data()[3].event_seconds[-1])
    with rm.shared_folder() as name:
        store = store_checks.new_store(Path(name) / "store")
        write_fm(store, Snapshot("fm", 3, BEFORE), store_checks.data())
        domain, domain_lookup = student(world_size, "fm"), TeacherLookup(store, "fm")
        log_domain(store, domain, trained, domain_lookup)
        ages = torch.cat([batch.event_seconds for batch in trained]) - BEFORE
        assert domain_lookup.counters["fm"].age_seconds == pytest.approx(
            float(ages.double().mean())
        )

        if form == "wrapped":
            model, scorer = domain.model, student(world_size, "fm", seed=9).model
        else:
            model = find_wrapper(domain.model).student
            scorer = rm.sharded(rm.two_task_student(seed=9), world_size).model
        newest = publish(store, "domain", model, trained_through_seconds=through)
        shards = [Shard(f"fresh {rank}", lambda: iter(fresh), through + 1)]
        options: Any = {"device": device(), "progress": False}
        score(scorer, store, shards, "domain", **options)
        served, lookup = export_student(domain.model), TeacherLookup(store, ["fm", "domain"])
        for number, batch in enumerate(batches):
            outputs, seconds = lookup(batch), batch.event_seconds
            assert outputs.presence.all() and outputs.age_seconds is not None
            assert torch.equal(outputs.age_seconds[:, 0], (seconds - BEFORE).float())
            expected_age = (seconds - through).float()
            assert torch.equal(outputs.age_seconds[:, 1], expected_age.where(seconds > through, 0))
            if served is not None and number >= len(trained):
                torch.testing.assert_close(outputs.values[:, 1], served(batch)[1][1])
        late = [Shard(f"trained {rank}", lambda: iter(trained), store_checks.START)]
        with pytest.raises((ValueError, RuntimeError), match="leak: their teacher was trained"):
            score(scorer, store, late, newest, **options)


def check_a_stream_of_three(rank: int, world_size: int) -> None:
    """In a stream each model waits for its teachers, window by window; all outputs are present."""
    batches = store_checks.parts(rank, world_size)
    begins = [int(batch.event_seconds[0]) for batch in store_checks.data()]
    ends = [*begins[1:], begins[-1] + rm.GLOBAL_SIZE * store_checks.SECONDS]

    def windows() -> Iterator[Window]:
        return (
            Window(*window) for window in zip(begins, ends, [[b] for b in batches], strict=True)
        )

    with rm.shared_folder() as name:
        store = store_checks.new_store(Path(name) / "store")
        fm = rm.sharded(rm.two_task_student(), world_size)
        fm_pipeline: Any = TrainPipelineSparseDist(fm.model, fm.optimizer, device())
        domain, vertical = student(world_size, "fm"), student(world_size, "fm", "domain")
        domain_lookup = TeacherLookup(store, "fm", refresh_seconds=None)
        vertical_lookup = TeacherLookup(store, ["fm", "domain"], refresh_seconds=None)
        with (
            TeacherLogger(store, "fm") as fm_logger,
            TeacherLogger(store, "domain") as domain_logger,
        ):
            fm_logger.attach(fm.model)
            domain_logger.attach(domain.model)
            jobs = (
                train_teacher(fm_pipeline, windows(), store, "fm", logger=fm_logger),
                train_teacher(
                    rm.pipeline_of(domain, teacher=domain_lookup),
                    wait_for_outputs(windows(), domain_lookup, timeout_seconds=5.0),
                    store,
                    "domain",
                    logger=domain_logger,
                ),
                train_windows(
                    rm.pipeline_of(vertical, teacher=vertical_lookup),
                    wait_for_outputs(windows(), vertical_lookup, timeout_seconds=5.0),
                ),
            )
            assert sum(1 for _ in zip(*jobs, strict=True)) == len(batches)
        through = [end - 1 for end in ends]
        assert [s.trained_through_seconds for s in published(store, "domain")] == through
        for counters in domain_lookup.counters["fm"], *vertical_lookup.counters.values():
            assert (counters.coverage, counters.age_seconds, counters.late) == (1.0, 0.0, 0)
