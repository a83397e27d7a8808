"""A teacher's earlier outputs for a key as a student's feature: pooled histories of short codes.

B examples, N vectors of V numbers; queries of Q; embeddings of E, and their codes of D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import JaggedTensor

__all__ = ["EmbeddingCompressor", "HistoryPooling", "embedding_drift"]

Pooling = Literal["mean", "sum", "attention"]


class HistoryPooling(nn.Module):
    """Pooling of each example's history v_1 ... v_n: by mean, sum, or attention to a query q.

    Attention is DIN's (arXiv 1706.06978) with weights softmax_i(v_i . W q / sqrt(V)). An empty
    history gives zeros and no gradient: pass its length as another feature. Weights of the history
    (ages in days, say) are ignored. Half precision is summed in float32.

    Args:
        width: V.
        pooling: ``"mean"``, ``"sum"`` or ``"attention"``.
        query_width: Q >= 1, for attention; the others ignore a query.

    Raises:
        ValueError: for an invalid argument; in ``forward`` for an input of another shape, or a
            missing query.

    Example:
        >>> values, lengths = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([2, 1])
        >>> HistoryPooling(1)(JaggedTensor(values, lengths=lengths)).tolist()
        [[1.5], [5.0]]
    """

    def __init__(self, width: int, pooling: Pooling = "mean", *, query_width: int = 0) -> None:
        super().__init__()
        attends = pooling == "attention"
        if pooling not in get_args(Pooling) or width < 1 or query_width < attends:
            raise ValueError(
                f"pooling should be one of {get_args(Pooling)}, and width at least 1, as should "
                f"query_width for attention; received {pooling!r}, {width} and {query_width}"
            )
        self.width, self.pooling = width, pooling
        self.project = nn.Linear(query_width, width, bias=False) if attends else None

    def forward(self, history: JaggedTensor, query: Tensor | None = None) -> Tensor:
        """Map B histories, with (N, V) values, and for attention a query (B, Q), to (B, V)."""
        keys = None if self.project is None or query is None else self.project(query)
        return _pooled(history.values(), history.lengths(), keys, self.width, self.pooling)


@torch.fx.wrap  # torch.fx knows no shapes and dtypes while it traces
def _pooled(values: Tensor, lengths: Tensor, query: Tensor | None, width: int, kind: str) -> Tensor:
    received = 0 if query is None else query.shape[0]
    expected = lengths.shape[0] if kind == "attention" else 0
    if values.shape[1:] != (width,) or received != expected:
        raise ValueError(
            f"history should be of width {width}, and have {expected} queries (for attention one "
            f"an example); received values of shape {tuple(values.shape)} and {received} queries"
        )
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    divisor = lengths.unsqueeze(1) if kind == "mean" else lengths.new_ones(())
    if query is not None:
        example = torch.repeat_interleave(lengths, output_size=values.shape[0])
        # Converted before the repetition, so that the query's gradient is summed in float32 too.
        keys = query.to(wide.dtype).index_select(0, example)
        scores = (wide * keys).sum(1, keepdim=True) / math.sqrt(width)
        largest = _reduced(scores.detach(), lengths, "max").index_select(0, example)
        weights = (scores - largest).exp()
        # The largest weight is 1, so the clamp below changes the divisor of empty histories alone.
        wide, divisor = weights * wide, _reduced(weights, lengths, "sum")
    return (_reduced(wide, lengths, "sum") / divisor.clamp(min=1)).to(values.dtype)


def _reduced(values: Tensor, lengths: Tensor, how: str) -> Tensor:
    # In a fixed order, unlike a GPU's index_add. The check of the lengths would wait for the
    # device, and fails if there are none.
    checked = values.device.type == "cpu" and bool(lengths.shape[0])
    return torch.segment_reduce(values, how, lengths=lengths, axis=0, unsafe=not checked)


class EmbeddingCompressor(nn.Module):
    """An autoencoder from embeddings e to codes z = tanh(W e + b) whose prefixes are usable alone.

    It trains beside the teacher, which receives no gradient from it (LoopFM, arXiv 2605.29280). A
    memory must not mix codes of several values of ``version`` (int64, in ``state_dict``). So freeze
    the trained encoder, or train on and call :meth:`refresh` each time before the whole memory is
    written anew.

    Args:
        embedding_width: E.
        width: D.
        prefixes: widths d of z that can be read alone; by default D and its halves down to 4.

    Raises:
        ValueError: for a prefix that is not between 1 and D.

    Example:
        >>> compressor, embeddings = EmbeddingCompressor(64, 16), torch.randn(8, 64)
        >>> compressor.loss(embeddings).backward()  # added to the teacher's own loss
        >>> compressor(embeddings).detach()[:, :4].shape, compressor.prefixes
        (torch.Size([8, 4]), (16, 8, 4))
    """

    version: Tensor

    def __init__(self, embedding_width: int, width: int, prefixes: Sequence[int] = ()) -> None:
        super().__init__()
        halves = (width >> n for n in range(1, width.bit_length()))
        self.prefixes = tuple(prefixes) or (width, *(d for d in halves if d >= 4))
        if not 1 <= min(self.prefixes) <= max(self.prefixes) <= width:
            raise ValueError(f"prefixes should be from 1 to {width}; received {self.prefixes}")
        self.encoder = nn.Linear(embedding_width, width)
        self.decoder = nn.Linear(width, embedding_width)
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (B, E) to codes (B, D) in [-1, 1]; the embeddings get no gradient."""
        return torch.tanh(self.encoder(embeddings.detach().to(self.encoder.weight.dtype)))

    def loss(self, embeddings: Tensor) -> Tensor:
        """Return the mean of (e - f(z_1 ... z_d))^2, f linear, over B, E and the prefixes d."""
        codes, target = self(embeddings), embeddings.detach().to(self.decoder.weight.dtype)
        position = torch.arange(codes.shape[1], device=codes.device)
        decoded = self.decoder(torch.stack([codes * (position < d) for d in self.prefixes]))
        return F.mse_loss(decoded, target.expand_as(decoded))

    def refresh(self) -> int:
        """Start a new version of the codes, and return its number."""
        self.version += 1
        return int(self.version)


def embedding_drift(old: Tensor, new: Tensor) -> float:
    """Return the drift between two encoders' codes z and z' of the same n examples, both (n, D).

    It is ``sum |z_i - z'_i|^2 / sum |z_i - mean z|^2``: 0 for equal codes, on average 2 for
    unrelated codes of equal spread.

    Raises:
        ValueError: for different shapes, values that are not finite, or codes z that are all equal.
    """
    if old.dim() == 2 and old.shape == new.shape:
        before, after = old.detach().double(), new.detach().double()
        spread = (before - before.mean(0)).square().sum()
        if math.isfinite(drift := float((before - after).square().sum() / spread)):
            return drift
    raise ValueError(
        "codes should be of one shape (n, D), finite, and not all the same; received "
        f"{tuple(old.shape)} and {tuple(new.shape)}: encode the same examples, two or more"
    )
