"""Memories as features of the quality benchmark's students, and the table of what they bring.

A memory holds examples whose labels were known strictly before the example's own time. It keeps
their labels, which need no teacher, or the teacher's logits, or the user's last events as a
sequence. Letters in shapes: B examples, L events of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ebnerd
import numpy as np
import quality_report
import torch
from quality_report import RECIPE, Result
from sources import Array, Features, Source, data, models
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType

from torchrec_exfm.das.memory import Memory, MemoryFeatures, MemoryFormat
from torchrec_exfm.history import HistoryPooling
from torchrec_exfm.study.report import markdown, mean_cell

LENGTH, WIDTH = 50, 12
CHUNK = 1 << 16


def settings(source: Source) -> list[Any]:
    """Return what a memory depends on beside its stream and teacher."""
    return [source.memory_keys, source.memory_half_life, LENGTH, WIDTH, ebnerd.PRIOR_COUNT]


def _memory(source: Source, name: str, **options: Any) -> Memory:
    options = {"keys": source.memory_keys, **options}
    half_life = 86_400 * source.memory_half_life
    return Memory(MemoryFormat(name=name, half_life_seconds=half_life, **options))


def _pass(
    memory: Memory,
    source: Source,
    stream: data.Stream,
    events: Array,
    values: Array,
    examples: Array,
) -> Iterator[dict[str, MemoryFeatures]]:
    """Yield the features of the examples, in their order, a chunk at a time.

    Args:
        memory: starts empty.
        source: says when labels are known.
        stream: in time order.
        events: a mask of the rows to remember.
        values: of each row, (B,).
        examples: a mask of the rows to look up.
    """
    known = np.asarray(stream.time if source.known is None else source.known())
    for first in range(0, len(stream), CHUNK):
        for rows, is_event in ((events, True), (examples, False)):
            chosen = first + np.flatnonzero(rows[first : first + CHUNK])
            columns = {
                name: stream.sparse[name][chosen] for key in memory.format.keys for name in key
            }
            if is_event:
                memory.write(columns, known[chosen], values[chosen].astype(np.float32))
            else:
                yield memory.read(columns, stream.time[chosen])


def aggregates(
    source: Source, stream: data.Stream, examples: Array, logits: Array | None = None
) -> Array:
    """Return dense features of a memory of the teacher's logits, or (None) of labels.

    Rates of labels are smoothed log-odds, as the strong student has them. float32 (B', D).
    """
    values = np.asarray(stream.label if logits is None else logits)
    memory = _memory(source, "label" if logits is None else "teacher")
    parts = []
    for features in _pass(memory, source, stream, ~np.isnan(values), values, examples):
        known = features.values()
        parts.append(np.concatenate([_odds(f) if logits is None else f.dense() for f in known], 1))
    return np.concatenate(parts)


def _odds(features: MemoryFeatures) -> Array:
    """Return dense features of labels, with log-odds in the place of rates."""
    count, dense = features.count, features.dense()
    for column, rate in ((3, features.mean), (5, features.decayed_mean)):
        dense[:, column] = ebnerd.log_odds(count, np.where(count > 0, rate[:, 0] * count, 0))
    return dense


def histories(source: Source, stream: data.Stream, examples: Array, events: Array) -> Array:
    """Return the stream's rows of the user's last events, newest first; -1: none, int32 (B', L)."""
    user = source.memory_keys[0]
    memory = _memory(source, "history", keys=[user], length=LENGTH)
    rows = np.arange(len(stream))
    assert len(stream) < 1 << 24  # the memory keeps rows as float32, exact below this
    parts = []
    for features in _pass(memory, source, stream, events, rows, examples):
        (known,) = features.values()
        filled = np.arange(LENGTH) < known.lengths[:, None]
        part = np.full(filled.shape, -1, np.int32)
        part[filled] = known.vectors[:, 0]
        parts.append(part)
    return np.concatenate(parts)


@dataclass
class HistoryBatch(data.StreamBatch):
    """A batch with the last events of each example's user: vectors, or ids."""

    history: Any

    def _with(self, batch: Any) -> HistoryBatch:
        return HistoryBatch(*vars(super()._with(batch)).values(), self.history)


def with_history(batch: data.StreamBatch, rows: Array, taught: Array | Tensor) -> HistoryBatch:
    """Return the batch with sequences: of vectors where `taught` is (N, V), of ids where (N,).

    Args:
        batch: of b examples.
        rows: of their events, -1: none, (b, L).
        taught: the vector or id of each event.
    """
    lengths = torch.from_numpy((rows >= 0).sum(1))
    values = torch.from_numpy(np.array(taught[rows[rows >= 0]]))
    if values.dim() == 1:
        history: Any = KeyedJaggedTensor(["history"], values.long(), lengths=lengths)
    else:
        history = JaggedTensor(values, lengths=lengths)
    return HistoryBatch(*vars(batch).values(), history)


def with_pooled_history(
    features: Features, stream: data.Stream, sizes: dict[str, Any], taught: Array
) -> nn.Module:
    """Return a ranker with a history of vectors (N, V), or of ids (N,) in a table as wide."""
    ids = None if taught.ndim == 2 else 1 + int(taught.max())
    dense = (*features[1], *(f"history_{n}" for n in range(WIDTH)))
    module = models.ranker(features[0], dense, stream.cardinalities, **sizes)
    return WithHistory(module.model, ids)


class WithHistory(nn.Module):
    """A ranker in TorchRec's training contract, with a pooled history among its dense features."""

    def __init__(self, ranker: nn.Module, num_ids: int | None) -> None:
        super().__init__()
        self.model = ranker
        self.loss = nn.BCEWithLogitsLoss()
        self.table = self.pooling = None
        if num_ids is None:
            self.pooling = HistoryPooling(WIDTH)
        else:
            config = EmbeddingBagConfig(
                name="history",
                embedding_dim=WIDTH,
                num_embeddings=num_ids,
                feature_names=["history"],
                pooling=PoolingType.MEAN,
            )
            self.table = EmbeddingBagCollection([config], device=torch.device("meta"))

    def forward(self, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        if self.table is None:
            pooled = self.pooling(batch.history)
        else:
            pooled = self.table(batch.history).values()
        dense = torch.cat([batch.dense_features, pooled], 1)
        logits = self.model(dense, batch.sparse_features).squeeze(-1)
        loss = self.loss(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


CONTROLS = {  # what each arm is compared with, besides the student alone
    "label memory": "none",
    "label memory + AH": "label memory",
    "label and teacher memory + AH": "label memory + AH",
    "label memory + recipe": "label memory",
    "teacher memory + recipe": RECIPE,
    "label and teacher memory + recipe": "label memory + recipe",
    "raw history + recipe": RECIPE,
    "teacher history + recipe": "raw history + recipe",
}


def table(results: Sequence[Result]) -> Iterator[str]:
    """Yield table 10: each arm with a memory, against the student alone and its control."""
    remembered = [r for r in results if r["arm"] in CONTROLS]
    if not remembered:
        return
    yield (
        "\n## 10. Memory of earlier examples, as features\n\nMemories are of the user, of the "
        "item, and of the user with item or category. Features are the number of earlier examples, "
        "the days since, and the mean, the decayed mean and the last of their labels, which anyone "
        "could keep, or of the teacher's logits. Only examples whose label was known before "
        f"count.\n\n*History*: the user's last {LENGTH} of these, pooled by their mean, as {WIDTH} "
        "principal directions of the teacher's last layer. *Raw* is its control: learned vectors "
        "of the same width, of the item with its label.\n\n**A student that is served with a "
        "memory needs it at serving time: one key-value read.**\n\n*Less its control's*: the "
        "difference of NE, paired by seed, to the arm in brackets.\n\nHalf-lives, and the lean "
        "student's rates with a memory, were chosen before the evaluation, in one vertical of each "
        "stream. So the lean student's differences to none are of memory and rates together. Those "
        "between arms with a memory are not. On MovieLens the strong student and the teacher have "
        "the counts and means of a label memory too, but the means as probabilities: most of what "
        "the memory brings there is that they are log-odds.\n"
    )
    for source, student in quality_report.kinds_of(remembered):
        kind = {"source": source, "student": student}
        arms = [r for r in remembered if r["source"] == source and r["student"] == student]
        cells = {(r["vertical"], r["seed"]) for r in arms}
        part = [r for r in results if (r["vertical"], r["seed"]) in cells]
        teacher = quality_report.changes(part, arm="teacher", **kind)
        names = ["AH", RECIPE, *CONTROLS]
        by_arm = {arm: quality_report.changes(part, arm=arm, **kind) for arm in names}
        rows = []
        for arm, change in by_arm.items():
            if change is None or teacher is None:
                continue
            control = CONTROLS.get(arm, "none")
            against = by_arm.get(control)
            less = "" if against is None else f"{mean_cell(change.less(against))} ({control})"
            eta = f"{change.eta(teacher):.2f}"
            rows.append([arm, mean_cell(change.ne), mean_cell(change.auc), eta, less])
        if rows and teacher is not None:
            yield (
                f"\n{source}, {student} student. Means over {len(teacher.parts)} verticals and "
                f"{len(teacher.seeds)} seeds; the teacher itself {teacher.ne.mean():+.1f} %:\n\n"
            )
            yield markdown(["arm", "NE", "AUC", "η", "NE less its control's"], rows)
            etas = {arm: c.eta(teacher) for arm, c in by_arm.items() if c is not None}
            best = max(etas, key=lambda arm: etas[arm])
            alone = max(etas.get("AH", np.nan), etas.get(RECIPE, np.nan))
            yield f"\nThe best arm is {best}: η {etas[best]:.2f}; by logits alone {alone:.2f}.\n"
