"""Calls of users' functions, with errors that say what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def read(name: str, function: Callable[[Any], Any], value: Any, owner: str, what: str) -> Any:
    """Call a function that the user passed to ``owner`` as ``name``.

    ``what`` completes the message "``name`` should take ...": what it maps to what.

    Raises:
        ValueError: if the function does not fit the value.
    """
    try:
        return function(value)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{name} should take {what}; received {outline(value)} and {type(error).__name__}: "
            f"{error}: pass {name}=..., a function of it, to {owner}"
        ) from error


def outline(value: Any) -> str:
    """Describe a value's structure for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(outline(item) for item in value)})"
    return type(value).__name__
