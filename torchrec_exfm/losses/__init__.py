"""Losses for distillation terms, as in ``DistillationTerm(loss=listwise(calibrated=True))``."""

from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.losses.elementwise import squared_error_of_logits, task_loss, temperature
from torchrec_exfm.losses.ranking import listwise, pairwise
from torchrec_exfm.losses.representation import cosine_of_embeddings, squared_error_of_embeddings
from torchrec_exfm.losses.two_towers import in_batch_positives, in_batch_softmax

__all__ = [
    "Loss",
    "LossInputs",
    "cosine_of_embeddings",
    "in_batch_positives",
    "in_batch_softmax",
    "listwise",
    "pairwise",
    "squared_error_of_embeddings",
    "squared_error_of_logits",
    "task_loss",
    "temperature",
]
