"""The losses of a distillation term, each a pure function of :class:`LossInputs`.

A term is given one by ``DistillationTerm(loss=temperature(2.0))``.
"""

from torchrec_exfm.losses.contract import Loss, LossInputs
from torchrec_exfm.losses.elementwise import squared_error_of_logits, task_loss, temperature

__all__ = [
    "Loss",
    "LossInputs",
    "squared_error_of_logits",
    "task_loss",
    "temperature",
]
