"""Checks of the teacher store in training and scoring, on one rank and on two."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import rank_models as rm
import torch
import torch.distributed as dist
from ranks import device
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchrec_exfm import (
    ExFMBatch,
    LiveTeacher,
    TeacherOutputs,
    TrainPipelineExFM,
    student_state_dict,
)
from torchrec_exfm import sources as exfm_sources
from torchrec_exfm._ranks import gather_from_ranks, on_rank_0
from torchrec_exfm.das import (
    ScoringReport,
    Shard,
    Snapshot,
    StoreError,
    TeacherLogger,
    TeacherLookup,
    TeacherStore,
    forget,
    load_snapshot,
    newest_snapshot,
    publish,
    published,
    score,
)
from torchrec_exfm.das import lookup as lookup_module
from torchrec_exfm.das.rules import NO_KEY

STEPS = 6
WINDOW = 1000
START = 10 * WINDOW
SECONDS = 50  # between examples: a batch of all ranks spans windows
TRAINED_THROUGH = START - 1


def data(steps: int = STEPS) -> list[rm.Columns]:
    """Return global batches with ids above 2^53 and times; a teacher has all tasks or none."""
    batches = []
    for step, batch in enumerate(rm.global_data(steps)):
        rows = torch.arange(rm.GLOBAL_SIZE) + step * rm.GLOBAL_SIZE
        presence = batch.presence.any(-1, keepdim=True).expand_as(batch.presence).clone()
        values = torch.where(presence, batch.values.nan_to_num(0.25), torch.nan)
        batches.append(
            rm.Columns(
                **batch.columns
                | {
                    "values": values,
                    "presence": presence,
                    "age_seconds": (START + SECONDS * rows - TRAINED_THROUGH)[:, None]
                    .expand(-1, len(rm.TEACHERS))
                    .float(),
                    "example_ids": (rows * 7919) % 1009 + 2**60,
                    "event_seconds": START + SECONDS * rows,
                }
            )
        )
    return batches


def parts(rank: int, world_size: int) -> list[rm.Columns]:
    return [rm.part_of(batch, rank, world_size) for batch in data()]


def new_store(folder: Path, **options: Any) -> TeacherStore:
    """Create a store on rank 0, and open it on every rank."""
    if dist.get_rank() == 0:
        options = {
            "tasks": task_names(),
            "window_seconds": WINDOW,
            "resolution": "float32",
        } | options
        TeacherStore.create(folder, **options)
    dist.barrier()
    return TeacherStore(folder)


def task_names() -> tuple[str, ...]:
    return tuple(task.name for task in rm.TASKS)


def fill(store: TeacherStore) -> None:
    """Write the outputs of the columns on rank 0, teacher by teacher."""
    if dist.get_rank() == 0:
        for k, teacher in enumerate(rm.TEACHERS):
            for batch in data():
                presence = batch.presence[:, k].all(-1)
                store.write(
                    Snapshot(teacher, 3, TRAINED_THROUGH),
                    batch.example_ids[presence],
                    batch.values[presence, k],
                    batch.event_seconds[presence],
                )
    dist.barrier()


def trained(world_size: int, batches: list[rm.Columns], **options: Any) -> Any:
    trainee = rm.sharded(rm.wrapped(), world_size)
    pipeline = rm.pipeline_of(trainee, **options)
    outputs = rm.drained(pipeline, batches)
    assert len(outputs) == STEPS
    return outputs, rm.snapshot(trainee.model.state_dict())


def check_store_equals_columns(rank: int, world_size: int) -> None:
    """Looked-up outputs teach the same as columns of the batches, to the bit."""
    batches = parts(rank, world_size)
    columns = trained(world_size, batches, teacher=rm.logged)
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        fill(store)
        lookup = TeacherLookup(store, rm.TEACHERS)
        for batch in batches:
            outputs, expected = lookup(batch), rm.logged(batch)
            assert torch.equal(outputs.values, expected.values)
            assert torch.equal(outputs.presence, expected.presence)
            here = expected.presence.any(-1)
            assert outputs.age_seconds is not None and expected.age_seconds is not None
            assert torch.equal(outputs.age_seconds[here], expected.age_seconds[here])
        rm.assert_same(trained(world_size, batches, teacher=lookup), columns)
        for option in ("enable_inplace_copy_batch", "enqueue_batch_after_forward"):
            looked_up = trained(world_size, batches, teacher=lookup, **{option: True})
            rm.assert_same(looked_up, columns)
        rm.assert_same(trained(world_size, batches, teacher=lookup, trace=False), columns)


def check_ranks_of_a_host_share_its_windows(rank: int, world_size: int) -> None:
    """Windows mapped by all ranks of a host, as under torchrun, teach the same as columns."""
    batches = parts(rank, world_size)
    columns = trained(world_size, batches, teacher=rm.logged)
    with rm.shared_folder() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr(lookup_module, "default_folder", lambda: Path(name) / "host")
        store = new_store(Path(name) / "store")
        fill(store)
        with TeacherLookup(store, rm.TEACHERS, max_windows=8) as lookup:
            rm.assert_same(trained(world_size, batches, teacher=lookup), columns)
            assert lookup.counters[rm.TEACHERS[0]].late == 0
            (reader,) = (Path(name) / "host").glob("*/*/reader")
            windows = [path.name.split(".")[1] for path in reader.parent.glob("0.*.ready")]
            store.refresh()
            known = store.windows(rm.TEACHERS[0])
            dist.barrier()  # the last to leave removes the folder
        assert sorted(map(int, windows)) == known and len(known) > 1


def check_store_with_evaluation_between(rank: int, world_size: int) -> None:
    """Batches may be loaded in evaluation and trained on, and the other way round."""
    batches = parts(rank, world_size)
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        fill(store)
        outputs = {}
        for teacher in (rm.logged, TeacherLookup(store, rm.TEACHERS)):
            trainee = rm.sharded(rm.wrapped(), world_size)
            pipeline = rm.pipeline_of(trainee, teacher=teacher)
            iterator, steps = iter(batches), []
            for step in range(STEPS):
                trainee.model.train(step not in (1, 2, 4))
                with torch.set_grad_enabled(trainee.model.training):
                    if teacher is rm.logged and trainee.model.training:
                        _attach_columns(pipeline)
                    steps.append([value.clone() for value in pipeline.progress(iterator)])
            outputs[teacher is rm.logged] = steps, rm.snapshot(trainee.model.state_dict())
        rm.assert_same(outputs[False], outputs[True])


def _attach_columns(pipeline: TrainPipelineExFM) -> None:
    """Attach the outputs that a batch loaded in evaluation lacks."""
    if pipeline.batches and not isinstance(pipeline.batches[0], ExFMBatch):
        batch = pipeline.batches[0]
        pipeline.batches[0] = ExFMBatch(batch, rm.logged(batch))


def check_a_failing_store_ends_training(rank: int, world_size: int) -> None:
    """A failing store is an error on every rank that names the file, and no hang."""
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        fill(store)
        dist.barrier()
        if rank == 0:
            for path in (Path(name) / "store" / "outputs").glob("teacher=a/*/*.parquet"):
                path.unlink()
        dist.barrier()
        trainee = rm.sharded(rm.wrapped(), world_size)
        pipeline = rm.pipeline_of(trainee, teacher=TeacherLookup(store, rm.TEACHERS))
        with pytest.raises(StoreError, match=r"teacher=a/window=10/.*parquet: is missing"):
            rm.drained(pipeline, parts(rank, world_size))


FAILURES = ("gone", "damaged", "function")


def check_training_goes_on_without_a_teacher(rank: int, world_size: int, failure: str) -> None:
    """Masked failures leave the student's training equal to the bit, and are counted."""
    batches = parts(rank, world_size)
    bare = rm.sharded(rm.two_task_student(), world_size)
    plain = TrainPipelineSparseDist(bare.model, bare.optimizer, device())
    expected = rm.drained(plain, batches), rm.snapshot(bare.model.state_dict())
    with rm.shared_folder() as name, mock.patch.object(exfm_sources, "RETRY_SECONDS", 0.0):
        teacher = failing(Path(name) / "store", failure, rank)
        trainee = rm.sharded(rm.wrapped(), world_size)
        pipeline = rm.pipeline_of(trainee, teacher=teacher, on_teacher_error="mask")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs = rm.drained(pipeline, batches)
        messages = [str(w.message) for w in caught if "training goes on without" in str(w.message)]
        assert len(messages) == 1 and pipeline.teacher_failures == STEPS
        state = rm.snapshot(student_state_dict(trainee.model))
        rm.assert_same((outputs, state), expected)
        with pytest.raises((StoreError, RuntimeError, ConnectionError)):
            rm.drained(
                rm.pipeline_of(rm.sharded(rm.wrapped(), world_size), teacher=teacher), batches
            )


def failing(folder: Path, failure: str, rank: int) -> Any:
    """Return a teacher whose outputs can't be read."""
    if failure == "function":
        return mock.Mock(side_effect=ConnectionError("no route"), spec=rm.logged)
    store = new_store(folder)
    fill(store)
    lookup = TeacherLookup(store, rm.TEACHERS)
    dist.barrier()
    if rank == 0 and failure == "gone":
        shutil.rmtree(folder)
    for path in folder.glob("outputs/*/*/*.parquet") if rank == 0 and failure == "damaged" else ():
        path.write_bytes(b"PAR1")
    dist.barrier()
    return lookup


def check_a_teacher_that_fails_now_and_then(rank: int, world_size: int) -> None:
    """Failures on one rank alone equal absent outputs of those batches there."""
    batches = parts(rank, world_size)
    fails = [rank == 0 and step in (1, 2, 4) for step in range(STEPS)]

    def absent(batch: rm.Columns) -> rm.Columns:
        return rm.Columns(**batch.columns | {"presence": torch.zeros_like(batch.presence)})

    pairs = list(zip(batches, fails, strict=True))
    expected = trained(world_size, [absent(b) if bad else b for b, bad in pairs], teacher=rm.logged)

    def teacher(batch: rm.Columns) -> TeacherOutputs:
        if any(bad for known, bad in pairs if known is batch):
            raise ConnectionError("now and then")
        return rm.logged(batch)

    trainee = rm.sharded(rm.wrapped(), world_size)
    pipeline = rm.pipeline_of(trainee, teacher=teacher, on_teacher_error="mask")
    with mock.patch.object(exfm_sources, "RETRY_SECONDS", 0.0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = rm.drained(pipeline, batches)
    rm.assert_same((outputs, rm.snapshot(trainee.model.state_dict())), expected)
    assert pipeline.teacher_failures == sum(fails)


def check_a_failed_teacher_is_left_alone_for_a_while(rank: int, world_size: int) -> None:
    """A failed teacher is asked once in that time, not at every batch."""
    teacher = mock.Mock(side_effect=ConnectionError("no route"), spec=rm.logged)
    trainee = rm.sharded(rm.wrapped(), world_size)
    pipeline = rm.pipeline_of(trainee, teacher=teacher, on_teacher_error="mask")
    with pytest.warns(RuntimeWarning, match=r"ConnectionError: no route\).*every 30 s"):
        rm.drained(pipeline, parts(rank, world_size))
    assert teacher.call_count == 1 and pipeline.teacher_failures == STEPS
    wrong = mock.Mock(side_effect=KeyError("no such column"), spec=rm.logged)
    pipeline = rm.pipeline_of(trainee, teacher=wrong, on_teacher_error="mask")
    with pytest.raises(KeyError, match="no such column"):
        rm.drained(pipeline, parts(rank, world_size))
    for options, message in (
        ({"on_teacher_error": "mask"}, "'raise' without a teacher"),
        ({"on_teacher_error": "skip"}, "should be 'raise' or 'mask'; received 'skip'"),
        ({"on_teacher_error": "mask", "teacher": LiveTeacher(nn.Identity())}, "with a LiveTeacher"),
    ):
        with pytest.raises(ValueError, match=message):
            rm.pipeline_of(trainee, **options)


def all_examples() -> rm.Columns:
    """Return all examples as one batch, with one id per feature."""
    batches = data()
    columns = {
        name: torch.cat([batch.columns[name] for batch in batches])
        for name in ("dense_features", "labels", "example_ids", "event_seconds")
    }
    rows = len(columns["labels"])
    ids = torch.randint(0, rm.ROWS, (rows, rm.NUM_TABLES), generator=torch.manual_seed(5))
    return rm.Columns(**columns, sparse=ids)


def batch_of(examples: rm.Columns, rows: Tensor) -> rm.Columns:
    """Return the teacher's batch of some examples."""
    columns = {name: column[rows] for name, column in examples.columns.items()}
    sparse = columns.pop("sparse")
    names = [f"f{i}" for i in range(rm.NUM_TABLES)]
    lengths = torch.ones(sparse.numel(), dtype=torch.int32)
    features = KeyedJaggedTensor.from_lengths_sync(names, sparse.t().reshape(-1), lengths)
    return rm.Columns(sparse_features=features, **columns)


LENGTHS = (3, 40, 1, 17, 35)  # of shards, which lie in windows of 20 examples


def shards_of(examples: rm.Columns, lengths: Sequence[int] = LENGTHS) -> list[Shard]:
    """Return the examples as numbered shards of given lengths, in batches of 5."""

    def shard(number: int, rows: Tensor) -> Shard:
        def batches() -> Iterator[rm.Columns]:
            return (batch_of(examples, part) for part in rows.split(5))

        return Shard(f"{number}", batches, int(examples.event_seconds[rows[0]]))

    parts = torch.arange(len(examples.labels)).split(lengths)
    return [shard(number, rows) for number, rows in enumerate(parts)]


def keys_of(batch: rm.Columns) -> dict[str, Tensor]:
    return {"category_id": batch.event_seconds % 97, "user_id": batch.example_ids - 2**61}


def assert_keys(store: TeacherStore, examples: Sequence[rm.Columns]) -> None:
    """Require one row per example, with the example's own keys."""
    names = ["user_id", "category_id", "item_id"]
    store.refresh()
    parts = [store.read("a", window, keys=names)[0] for window in store.windows("a")]
    expected = [
        (id_, id_ - 2**61, second % 97, NO_KEY)
        for batch in examples
        for id_, second in zip(
            batch.example_ids.tolist(), batch.event_seconds.tolist(), strict=True
        )
    ]
    rows = [(id_, *keys) for p in parts for id_, keys in zip(p.example_id, p.keys, strict=True)]
    assert sorted(rows) == sorted(expected)


def never_opened(shards: list[Shard]) -> list[Shard]:
    return [replace(shard, batches=mock.Mock(side_effect=AssertionError)) for shard in shards]


def stored(store: TeacherStore, teacher: str) -> dict[int, list[float]]:
    """Return the stored outputs by id, and require each id once."""
    store.refresh()
    parts = [store.read(teacher, window)[0] for window in store.windows(teacher)]
    ids = np.concatenate([part.example_id for part in parts]).tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, np.concatenate([part.outputs for part in parts]).tolist(), strict=True))


def teacher_model(world_size: int, seed: int) -> nn.Module:
    return rm.sharded(rm.two_task_student(seed), world_size, sharding="mixed").model


def expected_outputs(seed: int, examples: rm.Columns) -> dict[int, list[float]]:
    """Return a teacher's outputs of all examples, without ranks, pipeline or store."""
    model = rm.two_task_student(seed).to(device())
    batch = batch_of(examples, torch.arange(len(examples.labels))).to(device())
    with torch.no_grad():
        logits = model(batch)[1][1]
    return dict(zip(examples.example_ids.tolist(), logits.cpu().tolist(), strict=True))


def assert_near(actual: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-5, atol=1e-6)


def check_each_example_is_scored_once(rank: int, world_size: int) -> None:
    """Each example is scored once, however shards lie on ranks; a second run does nothing."""
    examples = all_examples()
    n = len(examples.labels)
    shards = shards_of(examples)
    model = teacher_model(world_size, seed=4)
    rows = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].labels)))
    options: Any = {"device": device(), "shard_rows": 7, "progress": False, "keys": keys_of}
    for rank_shards in shards[rank:], shards if rank == world_size - 1 else []:
        with rm.shared_folder() as name:
            store = new_store(Path(name) / "store")
            snapshot = Snapshot("a", 1, TRAINED_THROUGH)
            rows.clear()
            model.train()
            report = score(model, store, iter(rank_shards), snapshot, **options)
            assert model.training
            assert report.scored == n
            counts = [sum(rows), sum(LENGTHS[int(shard.name)] for shard in rank_shards)]
            total = torch.tensor(counts, device=device())
            dist.all_reduce(total)
            assert total[0] == total[1] + report.fillers
            assert (report.fillers > 0) == (world_size > 1)
            assert_near(stored(store, "a"), expected_outputs(4, examples))
            assert_keys(store, [examples])

            repeated = score(model, store, never_opened(rank_shards), snapshot, **options)
            assert (repeated.skipped, repeated.shards, repeated.fillers) == (
                total_shards(rank_shards),
                0,
                0,
            )
            assert repeated.scored == repeated.stored_before == 0


def total_shards(rank_shards: Sequence[Any]) -> int:
    """Return the number of shards on all ranks."""
    return sum(gather_from_ranks(len(rank_shards)))


def check_rows_that_are_gone_are_scored_again(rank: int, world_size: int) -> None:
    """Rows that were given up or forgotten, and only those, are scored again."""
    examples = all_examples()
    rank_shards = shards_of(examples)[rank::world_size]
    model = teacher_model(world_size, seed=4)
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        snapshot = Snapshot("a", 1, TRAINED_THROUGH)
        options: Any = {"device": device(), "shard_rows": 7, "progress": False}

        def scored(shards: list[Shard]) -> ScoringReport:
            report = score(model, store, shards, snapshot, keys=keys_of, **options)
            assert_near(stored(store, "a"), expected_outputs(4, examples))
            assert_keys(store, [examples])
            dist.barrier()  # rank 0 changes the store next, which the others still read
            return report

        scored(rank_shards)

        def lose() -> int:
            file = store.files("a", store.windows("a")[1])[0]
            (Path(name) / "store" / "outputs" / file.path).unlink()
            store.table.repair()
            return file.rows or 0

        lost = on_rank_0(lose)
        report = scored(rank_shards)
        assert (report.scored, report.shards, report.skipped) == (lost, 1, len(LENGTHS) - 1)
        assert len(examples.labels) - 2 * 7 < report.scored + report.stored_before
        assert scored(never_opened(rank_shards)).skipped == len(LENGTHS)
        on_rank_0(lambda: forget(store, "a", versions=[1]))
        assert scored(rank_shards).scored == len(examples.labels)
        on_rank_0(lambda: forget(store, "a", versions=[7]))  # which it does not have
        assert scored(rank_shards).scored == 0


def check_a_shard_that_two_ranks_have(rank: int, world_size: int) -> None:
    """Two ranks score the same shard, and its rows are stored once."""
    examples = all_examples()
    model = teacher_model(world_size, seed=4)
    options: Any = {"device": device(), "shard_rows": 7, "progress": False}
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        snapshot = Snapshot("a", 1, TRAINED_THROUGH)
        report = score(model, store, shards_of(examples), snapshot, **options)
        assert report.scored == len(examples.labels)
        assert report.stored_before == (world_size - 1) * report.scored
        assert_near(stored(store, "a"), expected_outputs(4, examples))


def check_scores_are_those_of_the_batches(rank: int, world_size: int) -> None:
    """Scores equal the teacher's outputs of the same batches, to the bit."""
    examples = all_examples()
    model = teacher_model(world_size, seed=4)
    (shard,) = shards_of(examples, [len(examples.labels)])  # the same for all ranks

    def aligned() -> Iterator[rm.Columns]:
        return (rm.where_torch_allocates(**batch.columns) for batch in shard.batches())

    with torch.no_grad():
        expected = torch.cat([model.eval()(batch.to(device()))[1][1] for batch in aligned()])
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        snapshot = Snapshot("a", 1, TRAINED_THROUGH)
        options: Any = {"device": device(), "shard_rows": 7, "progress": False}
        score(model, store, [replace(shard, batches=aligned)], snapshot, **options)
        outputs_by_id = stored(store, "a")
        assert torch.equal(
            torch.tensor([outputs_by_id[id_] for id_ in examples.example_ids.tolist()]),
            expected.cpu(),
        )


WIDTH = 5  # of the layer before the logits


def hidden_layer(model: nn.Module) -> nn.Module:
    """Return a layer whose output the model's forward does not return."""
    return next(m for name, m in model.named_modules() if name.endswith("over_arch.model.0"))


def embeddings_of(store: TeacherStore, examples: rm.Columns) -> dict[int, list[float]]:
    """Return the stored embeddings of all examples by id."""
    outputs = TeacherLookup(store, "a", embeddings=True, max_windows=100)(examples)
    assert outputs.embeddings is not None and outputs.embedding_presence is not None
    assert outputs.embedding_presence.all()
    return dict(zip(examples.example_ids.tolist(), outputs.embeddings[:, 0].tolist(), strict=True))


def check_embeddings_are_scored(rank: int, world_size: int, resolution: str) -> None:
    """Embeddings from a hook equal those of an unsharded model."""
    examples = all_examples()
    model, bare = teacher_model(world_size, seed=4), rm.two_task_student(4).to(device())
    hidden_outputs: list[Tensor] = []
    for teacher in (model, bare):
        hidden_layer(teacher).register_forward_hook(lambda *call: hidden_outputs.append(call[-1]))
    options: Any = {"device": device(), "shard_rows": 7, "progress": False}
    rank_shards = shards_of(examples)[rank::world_size]
    with rm.shared_folder() as name:
        embedding_options = {"embedding_width": WIDTH, "embedding_resolution": resolution}
        store = new_store(Path(name) / "store", **embedding_options)
        snapshot = Snapshot("a", 1, TRAINED_THROUGH)
        embeddings = {"embeddings": lambda output: hidden_outputs.pop()}
        score(model, store, rank_shards, snapshot, **embeddings, **options)
        assert not hidden_outputs
        assert_near(stored(store, "a"), expected_outputs(4, examples))
        rows = torch.arange(len(examples.labels))
        with torch.no_grad():
            bare(batch_of(examples, rows).to(device()))
        (hidden,) = hidden_outputs
        stored_embeddings = torch.tensor(list(embeddings_of(store, examples).values()))
        # half of the last bit of float16, half a step of int8; and what ranks differ by, as above
        size = hidden.cpu().abs()
        largest = size.amax(1, keepdim=True)
        bound = size * 2.0**-11 + 2.0**-25 if resolution == "float16" else largest / 254
        assert ((stored_embeddings - hidden.cpu()).abs() <= bound + 1e-5 * largest + 1e-6).all()
        wrong = {"embeddings": lambda output: output[1]}  # of the tasks' width
        other = Snapshot("a", 2, TRAINED_THROUGH)
        with pytest.raises(ValueError, match=r"embeddings should be of shape \(\d, 5\) .*, 2\)"):
            score(model, store, rank_shards, other, **wrong, **options)


def check_wrong_scoring_is_refused(rank: int, world_size: int) -> None:
    """An error in the last rank's only shard stops all ranks, and names that rank."""
    examples = all_examples()
    last = rank == world_size - 1
    model = teacher_model(world_size, seed=4)
    shards = shards_of(examples)
    (whole_shard,) = shards_of(examples, [len(examples.labels)])
    snapshot = Snapshot("a", 1, TRAINED_THROUGH)

    def torn() -> Iterator[rm.Columns]:
        yield batch_of(examples, torch.arange(5))
        raise OSError("the file is torn")

    def refused(
        error: type[Exception],
        match: str,
        last_shard: Shard,
        teacher: str | Snapshot = "a",
        keys: Callable[[rm.Columns], Any] | None = None,
    ) -> None:
        rank_shards = [last_shard] if last else []
        elsewhere = rf"^rank {world_size - 1} stopped, and all ranks with it: .*{match}"
        with pytest.raises(error if last else RuntimeError, match=match if last else elsewhere):
            score(model, store, rank_shards, teacher, device=device(), keys=keys, progress=False)

    def some_without(batch: rm.Columns) -> dict[str, Tensor]:
        names = ("user_id", "item_id") if batch.example_ids[0] == examples.example_ids[0] else ()
        return dict.fromkeys(names, batch.example_ids)

    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        words = "the shard 'torn' can't be read: OSError: the file is torn"
        refused(RuntimeError, words, Shard("torn", torn), snapshot)
        refused(ValueError, "the shard '1' should have begin_seconds", Shard("1", list))
        refused(ValueError, "a has no published snapshot", shards[1])
        for keys, error, words in (
            (lambda _: {"user": []}, ValueError, "keys should be among .*'user'"),
            (lambda _: {"user_id": [1]}, ValueError, r"user_id should be of shape \(5,\); .*1,"),
            (lambda batch: {"item_id": batch.labels[:, 0]}, TypeError, "item_id should be whole"),
            (some_without, ValueError, r"keys .* same names .*\[\] after \['user_id', 'item_id'\]"),
        ):
            refused(error, f"the shard '0': {words}", whole_shard, snapshot, keys)
        assert stored_nothing(store)
        leaking = Snapshot("a", 2, START + SECONDS * 50)
        refused(ValueError, r"the shard '3': .*leak.*trained through", shards[3], leaking)


def stored_nothing(store: TeacherStore) -> bool:
    store.refresh()
    return store.teachers() == []


def check_the_newest_snapshot_that_does_not_leak(rank: int, world_size: int) -> None:
    """Each shard is scored by the newest published snapshot that does not leak.

    One rank has no shard for the first snapshot.
    """
    examples = all_examples()
    middle = int(examples.event_seconds[len(examples.labels) // 2]) // WINDOW * WINDOW
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        for seed, seconds in ((4, TRAINED_THROUGH), (5, middle - 1), (6, middle + 10**6)):
            model = teacher_model(world_size, seed)
            made = publish(store, "a", model, trained_through_seconds=seconds)
            assert made == Snapshot("a", seed - 3, seconds)
        dist.barrier()
        assert [snapshot.version for snapshot in published(store, "a")] == [1, 2, 3]
        assert newest_snapshot(store, "a") == Snapshot("a", 3, middle + 10**6)
        assert newest_snapshot(store, "a", before_seconds=middle) == Snapshot("a", 2, middle - 1)
        model = teacher_model(world_size, seed=9)
        rank_shards = shards_of(examples, (40, 8, 48))[rank::world_size]
        report = score(model, store, rank_shards, "a", device=device(), progress=False)
        assert (report.shards, report.scored) == (3, len(examples.labels))
        repeated = score(
            model, store, never_opened(rank_shards), "a", device=device(), progress=False
        )
        assert (repeated.shards, repeated.skipped) == (0, 3)
        expected = expected_outputs(4, examples)
        newer = expected_outputs(5, examples)
        for key, seconds in zip(
            examples.example_ids.tolist(), examples.event_seconds.tolist(), strict=True
        ):
            expected[key] = newer[key] if seconds >= middle else expected[key]
        assert_near(stored(store, "a"), expected)
        load_snapshot(store, Snapshot("a", 1, TRAINED_THROUGH), model)
        first = teacher_model(world_size, seed=4)
        rm.assert_same(rm.snapshot(model.state_dict()), rm.snapshot(first.state_dict()))
        with pytest.raises(StoreError, match=r"a version 8, .* is not published"):
            load_snapshot(store, Snapshot("a", 8, 0), model)


def check_logging_the_training_forward(rank: int, world_size: int) -> None:
    """Logged outputs are the training forward's before the update, without an extra pass."""
    batches = parts(rank, world_size)
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store")
        trainee = rm.sharded(rm.two_task_student(), world_size)
        calls: list[Any] = []
        trainee.model.register_forward_pre_hook(lambda *_: calls.append(1))
        pipeline: Any = TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())
        rows = 2 * rm.GLOBAL_SIZE // world_size
        with TeacherLogger(store, "a", keys=keys_of, shard_rows=rows) as logger:
            logger.attach(trainee.model)
            outputs = rm.drained(pipeline, batches)
        assert len(calls) == STEPS
        dist.barrier()
        logits = torch.cat([logits for _, logits, _ in outputs]).cpu()
        ids = torch.cat([batch.example_ids for batch in batches])
        outputs_by_id = stored(store, "a")
        assert len(outputs_by_id) == STEPS * rm.GLOBAL_SIZE
        assert [outputs_by_id[key] for key in ids.tolist()] == logits.tolist()
        assert_keys(store, data())
        for window in store.windows("a"):
            rows, _ = store.read("a", window)
            assert rows.logged.all() and not rows.age_seconds.any()

        trainee.model.eval()
        restarted = rm.sharded(rm.two_task_student(7), world_size)
        other: Any = TrainPipelineSparseDist(restarted.model, restarted.optimizer, device())
        with TeacherLogger(store, "a") as logger:
            logger.attach(restarted.model)
            rm.drained(other, batches)
        assert logger.written == 0 and logger.logged_before == len(ids)
        dist.barrier()
        assert stored(store, "a") == outputs_by_id


def check_embeddings_are_logged(rank: int, world_size: int) -> None:
    """Logged embeddings are the training forward's, to the bit of float16."""
    batches = parts(rank, world_size)
    with rm.shared_folder() as name:
        store = new_store(Path(name) / "store", embedding_width=WIDTH)
        trainee = rm.sharded(rm.two_task_student(), world_size)
        hidden_outputs: list[Tensor] = []
        hidden_layer(trainee.model).register_forward_hook(
            lambda *call: hidden_outputs.append(call[-1])
        )
        pipeline: Any = TrainPipelineSparseDist(trainee.model, trainee.optimizer, device())
        with TeacherLogger(store, "a", embeddings=lambda output: hidden_outputs[-1]) as logger:
            logger.attach(trainee.model)
            rm.drained(pipeline, batches)
        dist.barrier()
        assert len(hidden_outputs) == STEPS
        for batch, hidden in zip(batches, hidden_outputs, strict=True):
            stored_embeddings = torch.tensor(list(embeddings_of(store, batch).values()))
            assert torch.equal(stored_embeddings, hidden.detach().cpu().half().float())
