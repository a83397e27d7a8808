"""Losses that bring the student's representation close to the teacher's embedding.

Shapes: B examples, U tasks of a term, D width of the shared representation, E width of the
teacher's embedding e. P is the term's head with E outputs, linear for ``hidden=()``, and like any
head dropped for serving. It receives the full gradient, the representation x receives it β times.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchrec_exfm.functional import present_mean, squared_error
from torchrec_exfm.losses.contract import Loss, LossInputs


def cosine_of_embeddings(width: int) -> Loss:
    """Return 1 minus the cosine between the projected representation and the embedding.

    .. math:: \\frac{1}{C} \\sum_b w_b \\left(1 -
        \\frac{P(x_b) \\cdot e_b}{|P(x_b)| \\, |e_b|}\\right) =
        \\frac{1}{2C} \\sum_b w_b
        \\left| \\frac{P(x_b)}{|P(x_b)|} - \\frac{e_b}{|e_b|} \\right|^2

    C is the sum of the weights w of examples with an embedding (``count``). The scale of e has no
    effect; an embedding of zeros has a loss of 1 without gradient.

    Args:
        width: E >= 1, the width of the teacher's embeddings.

    Raises:
        ValueError: if the width is below 1; in forward, if the embeddings have another width.
    """
    return Loss(_cosine, embeddings=True, width=_checked(width))


def squared_error_of_embeddings(width: int) -> Loss:
    """Return the mean squared error between the projected representation and the embedding.

    .. math:: \\frac{1}{C E} \\sum_b w_b |P(x_b) - e_b|^2

    For embeddings whose scale has a meaning, such as principal components of a hidden layer: those
    that vary most count most. Arguments and errors are those of :func:`cosine_of_embeddings`.
    """
    return Loss(_squared_error, embeddings=True, width=_checked(width))


def _cosine(inputs: LossInputs) -> Tensor:
    outputs, values = _projected(inputs)
    cosines = F.cosine_similarity(outputs, values, dim=-1, eps=1e-6)
    return present_mean(1 - cosines, inputs.absent, inputs.count, inputs.weights)


def _squared_error(inputs: LossInputs) -> Tensor:
    losses = squared_error(*_projected(inputs)).mean(-1)
    return present_mean(losses, inputs.absent, inputs.count, inputs.weights)


def _projected(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return outputs, 0 where absent, and embeddings, both (B, U, E)."""
    outputs, values = inputs.outputs, inputs.values
    if values.shape[-1] != outputs.shape[-1]:
        raise ValueError(
            f"the teacher's embeddings should be of the width {outputs.shape[-1]} that the loss "
            f"was given; received {values.shape[-1]}: pass their width to the loss"
        )
    # A NaN of an absent example would make the gradient NaN, whatever its factor.
    outputs = outputs.masked_fill(inputs.absent.unsqueeze(-1), 0.0)
    return outputs, values.to(outputs.dtype).expand_as(outputs)


def _checked(width: int) -> int:
    if width < 1:
        raise ValueError(
            f"width should be that of the teacher's embeddings, >= 1; received {width}"
        )
    return width
