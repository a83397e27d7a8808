"""Study a small student: does a teacher pay for it, and with which setting?

    python -m torchrec_exfm.study examples/study_minimal.py --seeds 3

The command needs `tap`, `make_student` and `stream`; put yours in their place. The stream is made
up: the appeal of users and items drifts, and the student has to follow it from clicks. The teacher
knows the odds, but for some noise.
"""

import torch
import torch.distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_exfm import ExFMBatch, TeacherOutputs

NAMES, ROWS, BATCHES, SIZE = ["user", "item"], 500, 240, 256

tap = "model.over_arch"  # the submodule whose input the serving and distillation heads share


def make_student():
    """Return a module like TorchRec's: forward(batch) -> (loss, (loss, logits, labels))."""
    tables = [EmbeddingBagConfig(ROWS, 8, name=name, feature_names=[name]) for name in NAMES]
    bags = EmbeddingBagCollection(tables)
    apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.1})
    return DLRMTrain(DLRM(bags, 1, [8], [16, 1]))


def stream():
    """Yield batches in time order, the same at every call, with the teacher's logits.

    If a store has the logits, yield the batch alone, and define `make_teacher` in this module to
    return `TeacherLookup(store, "fm")`.
    """
    random = torch.Generator().manual_seed(0)
    appeal = torch.randn(2, ROWS, generator=random)
    for number in range(BATCHES):
        appeal = 0.995 * appeal + 0.1 * torch.randn(appeal.shape, generator=random)
        ids = torch.randint(ROWS, (2, SIZE), generator=random)
        odds = appeal.gather(1, ids).sum(0) - 1
        clicked = (torch.rand(SIZE, generator=random) < odds.sigmoid()).float()
        noise = 0.5 * torch.randn(SIZE, generator=random)
        if number % dist.get_world_size() == dist.get_rank():  # each rank has its own batches
            features = KeyedJaggedTensor(NAMES, ids.flatten(), lengths=torch.ones(2 * SIZE).int())
            batch = Batch(torch.ones(SIZE, 1), features, clicked)
            yield ExFMBatch(batch, TeacherOutputs(odds + noise))
