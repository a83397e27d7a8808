"""The losses of a distillation term, ``DistillationTerm(loss=listwise(calibrated=True))``."""

from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.losses.elementwise import squared_error_of_logits, task_loss, temperature
from torchrec_exfm.losses.ranking import listwise, pairwise

__all__ = [
    "Loss",
    "LossInputs",
    "listwise",
    "pairwise",
    "squared_error_of_logits",
    "task_loss",
    "temperature",
]
