"""A study of a small student: does a teacher pay for it, and with which setting?

    python -m torchrec_exfm.study examples/study_minimal.py --seeds 3

The stream is made here, so that there is something to find: an item's appeal drifts from day to
day, the student knows user and item by their ids alone, and the teacher knows the odds but for an
error of its own. Put your student, your stream and your teacher in their places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_exfm import TeacherOutputs

USERS, ITEMS, BATCHES, SIZE = 300, 200, 240, 256
tap = "top"  # the submodule whose input serving head and distillation heads share


class Ranker(nn.Module):
    """Two tables and a small perceptron."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, embedding_dim=8, num_embeddings=rows, feature_names=[name])
            for name, rows in (("user", USERS), ("item", ITEMS))
        ]
        self.tables = EmbeddingBagCollection(tables)
        self.bottom = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.top = nn.Linear(32, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        pooled = self.tables(batch.sparse_features)
        shared = self.bottom(torch.cat([pooled["user"], pooled["item"]], dim=1))
        logits = self.top(shared).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, (loss.detach(), logits.detach(), batch.labels)


def make_student() -> nn.Module:
    student = Ranker()
    apply_optimizer_in_backward(RowWiseAdagrad, student.tables.parameters(), {"lr": 0.1})
    return student


def stream():
    """Batches in time order, the same at every call; the dense column is the teacher's logit."""
    random = torch.Generator().manual_seed(0)
    users, items = torch.randn(USERS, 4, generator=random), torch.randn(ITEMS, 4, generator=random)
    for _ in range(BATCHES):
        items = 0.99 * items + 0.14 * torch.randn(items.shape, generator=random)
        user = torch.randint(USERS, (SIZE,), generator=random)
        item = torch.randint(ITEMS, (SIZE,), generator=random)
        odds = (users[user] * items[item]).sum(1) - 2
        labels = (torch.rand(SIZE, generator=random) < odds.sigmoid()).float()
        teacher = odds + 0.5 * torch.randn(SIZE, generator=random)
        ids = KeyedJaggedTensor(
            ["user", "item"], torch.cat([user, item]), lengths=torch.ones(2 * SIZE).int()
        )
        yield Batch(teacher.unsqueeze(1), ids, labels)


def make_teacher():
    """Columns of the batch; from a store it would be `return TeacherLookup(store, "fm")`."""
    return lambda batch: TeacherOutputs(batch.dense_features[:, 0])
