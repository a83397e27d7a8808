"""What the package warns of, by what it means for the run: to filter, to count, to make errors."""

from __future__ import annotations


class ExFMWarning(RuntimeWarning):
    """Any warning of this package: one of the kinds below, or that a TorchRec was not tried.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ExFMWarning)  # each of them ends the run ...
        ...     warnings.simplefilter("ignore", NotPipelinedWarning)  # ... but for this one
    """


class DistillationWarning(ExFMWarning):
    """The student learns something else than was asked for.

    The tap carries no gradient, or ranks do not average what they should.
    """


class MetricsRestartedWarning(ExFMWarning):
    """Training goes on where it was, and the metrics start anew."""


class NotPipelinedWarning(ExFMWarning):
    """Training is right, but slower: embeddings or outputs come late, as batches are."""


class TeacherMissingWarning(ExFMWarning):
    """Training goes on without a teacher's outputs: it fails, or its store has none of these."""
