"""Warning categories by what they mean for a run: to filter, count or turn into errors."""

from __future__ import annotations


class ExFMWarning(RuntimeWarning):
    """The base of this package's warnings; on its own, that a TorchRec version was not tried.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ExFMWarning)  # each ends the run ...
        ...     warnings.simplefilter("ignore", NotPipelinedWarning)  # ... except this one
    """


class DistillationWarning(ExFMWarning):
    """The student does not learn what was asked for.

    For example, the tap carries no gradient, or the ranks do not average.
    """


class MetricsRestartedWarning(ExFMWarning):
    """Training resumes, but the metrics start anew."""


class NotPipelinedWarning(ExFMWarning):
    """Training is correct but slower: embeddings or teacher outputs are not fetched ahead."""


class TeacherMissingWarning(ExFMWarning):
    """Training goes on without teacher outputs: the teacher fails, or its store lacks them."""
