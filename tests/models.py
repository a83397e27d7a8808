"""Small students, batches and teacher outputs that the tests share; everything is seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.streamable import Pipelineable

from torchrec_exfm import TeacherOutputs

CPU = torch.device("cpu")
NUM_TABLES = 3
ROWS = 20
DIM = 4
NUM_DENSE = 5


def tables(
    num: int = NUM_TABLES, rows: int = ROWS, dim: int = DIM, *, device: torch.device = CPU
) -> EmbeddingBagCollection:
    """Return tables ``t0`` ... of ``rows`` rows, with one feature ``f0`` ... each."""
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=f"t{i}", embedding_dim=dim, num_embeddings=rows, feature_names=[f"f{i}"]
            )
            for i in range(num)
        ],
    )


def dlrm_train(seed: int = 0, *, device: torch.device = CPU) -> DLRMTrain:
    torch.manual_seed(seed)
    return DLRMTrain(
        DLRM(
            tables(device=device),
            dense_in_features=NUM_DENSE,
            dense_arch_layer_sizes=[6, DIM],
            over_arch_layer_sizes=[5, 1],
            dense_device=device,
        )
    )


def dlrm_dcn_train(seed: int = 0, *, device: torch.device = CPU) -> DLRMTrain:
    torch.manual_seed(seed)
    with device:  # its LowRankCrossNet takes no device
        return DLRMTrain(
            DLRM_DCN(
                tables(device=device),
                dense_in_features=NUM_DENSE,
                dense_arch_layer_sizes=[6, DIM],
                over_arch_layer_sizes=[5, 1],
                dcn_num_layers=2,
                dcn_low_rank_dim=3,
                dense_device=device,
            )
        )


def dlrm_projection_train(seed: int = 0, *, device: torch.device = CPU) -> DLRMTrain:
    torch.manual_seed(seed)
    return DLRMTrain(
        DLRM_Projection(
            tables(device=device),
            dense_in_features=NUM_DENSE,
            dense_arch_layer_sizes=[6, DIM],
            over_arch_layer_sizes=[5, 1],
            interaction_branch1_layer_sizes=[2 * DIM],
            interaction_branch2_layer_sizes=[3 * DIM],
            dense_device=device,
        )
    )


class DeepFMTrain(nn.Module):
    """TorchRec's SimpleDeepFMNN, which gives probabilities, with TorchRec's training contract."""

    def __init__(self, deepfm: SimpleDeepFMNN) -> None:
        super().__init__()
        self.deepfm = deepfm

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        probabilities = self.deepfm(batch.dense_features, batch.sparse_features).squeeze(-1)
        loss = F.binary_cross_entropy(probabilities, batch.labels.float())
        logits = probabilities.logit(1e-6)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


def deepfm_train(seed: int = 0, *, device: torch.device = CPU) -> DeepFMTrain:
    torch.manual_seed(seed)
    with device:  # its linear layers take no device
        return DeepFMTrain(SimpleDeepFMNN(NUM_DENSE, tables(device=device), 6, 4))


class HandBatch(Pipelineable):
    """A user's own batch, with no attribute name of TorchRec's."""

    def __init__(self, ids: KeyedJaggedTensor, numbers: Tensor, clicked: Tensor) -> None:
        self.ids = ids
        self.numbers = numbers
        self.clicked = clicked

    def to(self, device: torch.device, non_blocking: bool = False) -> HandBatch:
        return self._map(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> HandBatch:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.ids, self.numbers, self.clicked):
            part.record_stream(stream)

    def _map(self, function: Callable[[Any], Any]) -> HandBatch:
        return HandBatch(function(self.ids), function(self.numbers), function(self.clicked))


class HandScore(nn.Module):
    """The serving head of HandTrain."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1, device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.out(hidden)
        return scores


class HandTrain(nn.Module):
    """A user's own training module; it calls its serving head by keyword."""

    def __init__(self, *, device: torch.device = CPU) -> None:
        super().__init__()
        self.lookup = tables(device=device)
        self.trunk = nn.Sequential(nn.Linear(NUM_TABLES * DIM + NUM_DENSE, 7, device=device))
        self.norm = nn.LayerNorm(7, device=device)
        self.score = HandScore(7, device)

    def forward(self, batch: HandBatch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        pooled = self.lookup(batch.ids)  # by name: sharding changes the order of the features
        inputs = [*(pooled[f"f{i}"] for i in range(NUM_TABLES)), batch.numbers]
        hidden = self.norm(self.trunk(torch.cat(inputs, dim=1)).tanh())
        logits = self.score(hidden=hidden)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, batch.clicked)
        return loss, (loss.detach(), logits.detach(), batch.clicked)


def hand_train(seed: int = 0, *, device: torch.device = CPU) -> HandTrain:
    torch.manual_seed(seed)
    return HandTrain(device=device)


def make_ids(generator: torch.Generator, size: int, *, one_id: bool) -> KeyedJaggedTensor:
    """Return ids of features ``f0`` ...: one per example, or 0 to 3."""
    shape = (NUM_TABLES * size,)
    lengths = torch.ones(shape, dtype=torch.long)
    if not one_id:
        lengths = torch.randint(0, 4, shape, generator=generator)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor([f"f{i}" for i in range(NUM_TABLES)], values, lengths=lengths)


def make_batch(seed: int = 0, size: int = 8, *, one_id: bool = False) -> Batch:
    """Return a TorchRec batch; labels are 0 or 1, and the first two differ."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        dense_features=torch.randn(size, NUM_DENSE, generator=generator),
        sparse_features=make_ids(generator, size, one_id=one_id),
        labels=_labels(generator, size),
    )


def make_hand_batch(seed: int = 0, size: int = 8, *, one_id: bool = False) -> HandBatch:
    generator = torch.Generator().manual_seed(seed)
    return HandBatch(
        make_ids(generator, size, one_id=one_id),
        torch.randn(size, NUM_DENSE, generator=generator),
        _labels(generator, size).float(),
    )


def _labels(generator: torch.Generator, size: int) -> Tensor:
    labels = torch.randint(0, 2, (size,), generator=generator)
    labels[:2] = torch.tensor([0, 1])[:size]
    return labels


def make_teacher(
    seed: int = 0, size: int = 8, *, teachers: int = 1, tasks: int = 1, missing: float = 0.0
) -> TeacherOutputs:
    """Return normal logits; each is missing (NaN) with probability ``missing``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, teachers, tasks, generator=generator)
    presence = torch.rand(size, teachers, tasks, generator=generator) >= missing
    return TeacherOutputs(torch.where(presence, values, float("nan")), presence)


class Student(NamedTuple):
    """A student under test: ``factory(seed, device=...)``, its tap, ``make_batch(seed, size)``.

    ``head`` is the prefix of the parameters after the tap, in the student's own names.
    """

    factory: Callable[..., nn.Module]
    tap: str
    make_batch: Callable[..., Any]

    @property
    def head(self) -> str:
        return f"{self.tap}."


def students() -> dict[str, Student]:
    """Return every kind of student that the package supports unchanged."""
    return {
        "dlrm": Student(dlrm_train, "model.over_arch", make_batch),
        "dlrm_dcn": Student(dlrm_dcn_train, "model.over_arch", make_batch),
        "dlrm_projection": Student(dlrm_projection_train, "model.over_arch", make_batch),
        "deepfm": Student(deepfm_train, "deepfm.over_arch", make_batch),
        "hand_written": Student(hand_train, "score", make_hand_batch),
    }
