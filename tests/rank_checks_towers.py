"""Checks of two towers and of teachers' embeddings, each run by every rank of one or two."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import rank_models as rm
import representation_reference as reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import DIM, tables
from ranks import device
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.mlp import MLP

from torchrec_exfm import (
    DistillationTerm,
    ExFMBatch,
    ExFMWrapper,
    OutputsOf,
    TeacherOutputs,
    TrainPipelineExFM,
    export_student,
    student_state_dict,
)
from torchrec_exfm.batch import StepInputs
from torchrec_exfm.das import Snapshot, TeacherLookup, TeacherStore
from torchrec_exfm.losses import (
    cosine_of_embeddings,
    in_batch_positives,
    in_batch_softmax,
    squared_error_of_embeddings,
)
from torchrec_exfm.wrapper import find_wrapper

TAU, TEACHER_TAU, VECTOR, EMBEDDING = 0.5, 2.0, 4, 6
TAP = OutputsOf("two_tower.query_proj", "two_tower.candidate_proj")
TERMS = (
    DistillationTerm(loss=in_batch_softmax(tau=TAU, teacher_tau=TEACHER_TAU), beta=2.0, weight=0.7),
    DistillationTerm(loss=in_batch_positives(tau=TAU), weight=0.3),
    DistillationTerm(loss=cosine_of_embeddings(EMBEDDING), hidden=(), weight=0.4),
    DistillationTerm(loss=squared_error_of_embeddings(EMBEDDING), hidden=(), beta=0.5),
    DistillationTerm(),
)


class TwoTower(nn.Module):
    """A query's and an item's vector, each from tables of its own."""

    def __init__(self, embedding_bag_collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = embedding_bag_collection
        self.query_proj = MLP(2 * DIM, [5, VECTOR])
        self.candidate_proj = MLP(DIM, [VECTOR])

    def forward(self, features: Any) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(features).to_dict()  # of float32 whatever the tables are
        dtype = next(self.query_proj.parameters()).dtype
        f0, f1, f2 = (pooled[f"f{i}"].to(dtype) for i in range(3))
        return self.query_proj(torch.cat([f0, f1], dim=1)), self.candidate_proj(f2)


class TwoTowerTrain(nn.Module):
    """Cross entropy of the pairs' dot products."""

    def __init__(self, two_tower: TwoTower) -> None:
        super().__init__()
        self.two_tower = two_tower

    def forward(self, batch: Any) -> Any:
        query, item = self.two_tower(batch.sparse_features)
        logits = (query * item).sum(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def student() -> TwoTowerTrain:
    torch.manual_seed(0)
    return TwoTowerTrain(TwoTower(tables(rows=rm.ROWS)))


def wrapped(terms: Sequence[DistillationTerm] = TERMS) -> ExFMWrapper:
    module = student()
    torch.manual_seed(1)
    return ExFMWrapper(module, tap=TAP, terms=terms)


def global_data() -> list[rm.Columns]:
    """Return data as in ``rank_models``, for one task and teacher, with lopsided embeddings."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for step, batch in enumerate(rm.global_data()):
        embedding_presence = torch.rand(rm.GLOBAL_SIZE, generator=generator) < 0.6
        if step % 3 == 0:
            embedding_presence[rm.GLOBAL_SIZE // 2 :] = False
        embeddings = torch.randn(rm.GLOBAL_SIZE, EMBEDDING, generator=generator)
        weights = torch.randint(0, 4, (rm.GLOBAL_SIZE,), generator=generator) / 2
        columns = {
            "labels": batch.labels[:, 0].round(),
            "values": batch.values[:, 0, 0].contiguous(),
            "presence": batch.presence[:, 0, 0].contiguous(),
            "embeddings": embeddings.masked_fill(~embedding_presence.unsqueeze(1), float("nan")),
            "embedding_presence": embedding_presence,
            "weights": weights,
            "items": torch.randint(6, (rm.GLOBAL_SIZE,), generator=generator),
            "log_q": torch.randn(rm.GLOBAL_SIZE, generator=generator),
        }
        batches.append(rm.Columns(sparse_features=batch.sparse_features, **columns))
    return batches


def teacher(batch: Any) -> TeacherOutputs:
    embeddings = {"embeddings": batch.embeddings, "embedding_presence": batch.embedding_presence}
    return TeacherOutputs(batch.values, batch.presence, **embeddings)


def _candidates(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.items, batch.log_q


def _pipelined(rank: int, world_size: int, **options: Any) -> tuple[Any, rm.Trainee]:
    trainee = rm.sharded(wrapped(), world_size)
    keys = {"weights": lambda batch: batch.weights, "candidates": _candidates}
    pipeline = rm.pipeline_of(trainee, teacher=teacher, **keys, **options)
    batches = [rm.part_of(batch, rank, world_size) for batch in global_data()]
    outputs = rm.drained(pipeline, batches)
    assert len(pipeline._pipelined_modules) == options.get("trace", True)
    return outputs, trainee


def check_two_towers_agree_with_one(rank: int, world_size: int) -> None:
    """All terms on all ranks train like one process in float64 with each rank's candidates."""
    wrapper = wrapped()
    reference = copy.deepcopy(wrapper.student).double()
    for module in reference.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    heads = copy.deepcopy(wrapper.auxiliary_head.term_losses).double()
    optimizer = torch.optim.SGD([*reference.parameters(), *heads.parameters()], lr=0.2)
    for batch in global_data():
        query, item = reference.two_tower(batch.sparse_features)
        logits = (query * item).sum(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels.double())
        added = _by_hand(torch.cat([query, item], dim=1), heads, batch, world_size)
        optimizer.zero_grad()
        (loss + added).backward()
        optimizer.step()
    weights = {f"student.{key}": value for key, value in reference.state_dict().items()}
    for key, value in heads.state_dict().items():
        weights[f"exfm.auxiliary_head.term_losses.{key}"] = value
    outputs, trainee = _pipelined(rank, world_size)
    assert len(outputs) == len(global_data())
    rm.assert_near_whole(trainee.model.state_dict(), weights)


def _by_hand(shared: Tensor, heads: Any, batch: rm.Columns, world_size: int) -> Tensor:
    weights, ids = batch.weights.tolist(), batch.items.tolist()
    log_q = batch.log_q.tolist()
    values, embeddings = batch.values.double(), batch.embeddings.double()
    total = torch.zeros((), dtype=torch.float64)
    for k, term in enumerate(TERMS):
        scaled = term.beta * shared + (1 - term.beta) * shared.detach()
        present = batch.embedding_presence if term.loss.embeddings else batch.presence
        rows = (present & (batch.weights > 0)).nonzero().flatten().tolist()
        vectors = heads[k].heads[0].mlp(scaled) if k > 1 else scaled
        loss = torch.zeros((), dtype=torch.float64)
        for part in torch.arange(rm.GLOBAL_SIZE).chunk(world_size):
            here = [i for i in rows if i in part]
            if k == 0:
                keys = (ids, log_q, TAU, TEACHER_TAU)
                loss = loss + reference.divergence(vectors, embeddings, weights, here, *keys)
            elif k == 1:
                loss = loss + reference.positives(vectors, values, weights, here, ids, log_q, TAU)
            elif k < 4:
                by_hand = (reference.cosine, reference.squared)[k - 2]
                loss = loss + by_hand(vectors, embeddings, weights, here)
            else:
                soft = values[here].sigmoid()
                losses = F.binary_cross_entropy_with_logits(
                    vectors[here, 0], soft, reduction="none"
                )
                loss = loss + (losses * batch.weights[here]).sum()
        total = total + term.weight * loss / max(sum(weights[i] for i in rows), 1e-9)
    return total


def check_pipelined_towers_equal_plain(rank: int, world_size: int) -> None:
    """The pipeline without tracing gives the outputs and weights of a loop by hand."""
    outputs, pipelined = _pipelined(rank, world_size)
    untraced, plain = _pipelined(rank, world_size, trace=False)
    expected = rm.snapshot(pipelined.model.state_dict())
    rm.assert_same(untraced, outputs)
    rm.assert_same(rm.snapshot(plain.model.state_dict()), expected)

    trainee = rm.sharded(wrapped(), world_size)
    looped = []
    for data in global_data():
        part = rm.part_of(data, rank, world_size)
        batch = ExFMBatch(part, teacher(part)).to(device())
        present = torch.stack([data.presence, data.embedding_presence])
        counts = (present * data.weights).sum(1).reshape(2, 1, 1) / world_size
        weights = batch.batch.weights.unsqueeze(1)
        keys = {"candidates": _candidates(batch.batch)}
        batch.step_inputs = StepInputs(
            batch.teacher, None, weights, counts.to(device()), None, **keys
        )
        trainee.optimizer.zero_grad()
        loss, output = trainee.model(batch)
        loss.backward()
        trainee.optimizer.step()
        looped.append([value.clone() for value in output])
    rm.assert_same(looped, outputs)
    rm.assert_same(rm.snapshot(trainee.model.state_dict()), expected)
    assert find_wrapper(trainee.model).last_losses.min() > 0  # type: ignore[union-attr]


def check_towers_of_weight_zero_are_plain(rank: int, world_size: int) -> None:
    """With w = 0 towers train plainly, to the bit; the export has their own keys."""
    batches = [rm.part_of(batch, rank, world_size) for batch in global_data()]
    bare = rm.sharded(student(), world_size)
    plain = TrainPipelineSparseDist(bare.model, bare.optimizer, device())
    expected = rm.drained(plain, batches)

    terms = [dataclasses.replace(term, weight=0.0) for term in TERMS]
    trainee = rm.sharded(wrapped(terms), world_size)
    pipeline = TrainPipelineExFM(
        trainee.model, trainee.optimizer, device(), teacher=teacher, candidates=_candidates
    )
    rm.assert_same(rm.drained(pipeline, batches), expected)
    trained = rm.snapshot(student_state_dict(trainee.model))
    rm.assert_same(trained, rm.snapshot(bare.model.state_dict()))

    exported = export_student(trainee.model)
    if rank == 0:
        assert isinstance(exported, TwoTowerTrain)
        assert exported.state_dict().keys() == student().state_dict().keys()
        items = exported.two_tower.candidate_proj
        assert not items._forward_hooks
        state = trainee.model.state_dict()
        for key, value in items.state_dict().items():
            key = f"student.two_tower.candidate_proj.{key}"
            assert torch.equal(value, state[key].cpu())


def check_stored_embeddings_equal_columns(rank: int, world_size: int) -> None:
    """Embeddings of a float16 store, some absent, teach the same as columns, to the bit."""
    data = []
    for step, batch in enumerate(global_data()):
        ids = 100 * step + torch.arange(rm.GLOBAL_SIZE)
        presence = batch.presence & batch.embedding_presence
        keys = {"example_ids": ids, "event_seconds": 1_000 + ids, "embedding_presence": presence}
        embeddings = batch.embeddings.half().float()
        data.append(rm.Columns(**(batch.columns | keys | {"embeddings": embeddings})))

    with rm.shared_folder() as folder:
        if rank == 0:
            store = TeacherStore.create(
                f"{folder}/store", resolution="float32", embedding_width=EMBEDDING
            )
            for batch in data:
                for has_embedding in (True, False):
                    rows = batch.presence & (batch.embedding_presence == has_embedding)
                    embeddings = batch.embeddings[rows] if has_embedding else None
                    columns = batch.example_ids[rows], batch.values[rows], batch.event_seconds[rows]
                    store.write(Snapshot("fm", 1, 10), *columns, embeddings=embeddings)
        dist.barrier()
        runs = []
        with TeacherLookup(TeacherStore(f"{folder}/store"), "fm", embeddings=True) as lookup:
            for source in (teacher, lookup):
                trainee = rm.sharded(wrapped(), world_size)
                pipeline = rm.pipeline_of(trainee, teacher=source, candidates=_candidates)
                outputs = rm.drained(pipeline, [rm.part_of(b, rank, world_size) for b in data])
                runs.append((outputs, rm.snapshot(trainee.model.state_dict())))
        rm.assert_same(*runs)
        dist.barrier()
