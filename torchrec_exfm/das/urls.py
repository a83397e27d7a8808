"""The address of a store: a local folder, or a URL without credentials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Of an object store. Excluded are the characters by which a URL may carry a secret (@ ? # % ;), and
# those at which the library panics ([ \ ] ^ |). Percent-encoding would only spell a path twice.
_PATH = r"(?:/(?!\.{1,2}(?:/|$))[\w\-.=+,:~!*'() ]*)*"
_HOST = r"[\w\-.]+(?::\d{1,5})?"
_URL = re.compile(rf"([a-z][a-z0-9+.-]*)://(?:([^/@]*)@)?({_HOST})?({_PATH})", re.IGNORECASE)
_SCHEME = re.compile(r"\s*[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_ENDPOINT = re.compile(r"(aws_|azure_|azure_storage_|google_)?endpoint(_url)?", re.IGNORECASE)
_CONTAINER = re.compile(r"(?=.{3,63}$)[a-z0-9](?:-?[a-z0-9])*")
# What the library can't handle in the name of a local folder.
_UNSUPPORTED = re.compile(r"[\[\\\]^|\x00-\x1f]|%[0-9a-fA-F]{2}")


def normal_url(url: str | Path) -> str:
    """Return the absolute path of a local folder or ``file://`` URL, and other URLs as they are.

    A URL with a place for credentials (user, query, fragment, also percent-encoded) is refused; the
    message does not repeat it.
    """
    if not isinstance(url, (str, Path)):
        raise TypeError(
            f"a store's url should be a string or a Path; received {type(url).__name__}"
        )
    text = str(url)
    if not text:
        raise ValueError("a store's url should be a folder or a URL; received ''")
    if "://" in text or _SCHEME.match(text):
        return _normal_remote(text)
    if _UNSUPPORTED.search(text):
        raise ValueError(
            "a store's url should be a folder without control characters, [ \\ ] ^ | and "
            "percent-encoding (%20), which Delta Lake can't take; received one with them: rename it"
        )
    return str(Path(text).expanduser().absolute())


def check_options(storage_options: Mapping[Any, Any] | None) -> None:
    """Raise unless options and endpoints have the form that the library expects.

    It would panic otherwise, or say less.
    """
    for name, value in (storage_options or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise TypeError(
                "storage_options should be strings by name; received "
                f"{type(value).__name__} for {type(name).__name__} {name!r}"
            )
        if _ENDPOINT.fullmatch(name) and not _is_endpoint(value):
            raise ValueError(
                f"{name!r} should be a URL, http://HOST:PORT; received another text, which is not "
                "repeated: percent-encode a user and password in it"
            )


def is_container(name: str) -> bool:
    """Return whether a name is valid for an Azure container: a user with a password never is."""
    return _CONTAINER.fullmatch(name) is not None


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.scheme and parts.hostname) and parts.port != 0
    except ValueError:  # a bad port, or unbalanced brackets
        return False


def _normal_remote(text: str) -> str:
    parts = _URL.fullmatch(text)
    if parts is not None:
        scheme, container, host, path = parts.groups()
        scheme = scheme.lower()
        if scheme == "file" and container is None and host in (None, "localhost") and path:
            return str(Path(path).absolute())
        is_azure = scheme in ("abfs", "abfss") and is_container(container or "")
        if host is not None and scheme != "file" and (container is None or is_azure):
            place = f"{container}@{host}" if container else host
            return f"{scheme}://{place}{path.rstrip('/')}"
    raise ValueError(
        "a store's url should be a folder, SCHEME://BUCKET/PATH or abfss://CONTAINER@ACCOUNT/PATH, "
        "the last two of letters, digits, blanks and -_.=+,:~!*'() without '..'; received another, "
        "which is not repeated, as it may hold credentials: pass them in storage_options or the "
        "environment (a folder with a ':' in its name: as an absolute path)"
    )
