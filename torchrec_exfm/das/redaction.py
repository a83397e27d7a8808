"""Removal of credentials from the text of errors, which object stores may repeat in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus

from torchrec_exfm.das.urls import is_container

HIDDEN = "***"
_MAX_CHARACTERS = 500  # of a library's text in a message

# Not hidden: values that occur in any text ("true", "30s", "404"), which would hide the message
# itself, and strings of up to 3 characters, which are no secrets but parts of other words. All
# other values are hidden, whatever the option's name: a misspelt one may hold a credential.
_TRIVIAL = re.compile(r"true|false|none|null|\d{0,5} ?[a-z]{0,2}|.{0,3}", re.IGNORECASE)
# The look-behind keeps the search from starting again at each letter of a long word.
_SCHEME = r"(?<![a-z0-9+.-])([a-z0-9+.-]+)"
_URL = re.compile(_SCHEME + r"://(\S*@)?([^\s/?#]*)([^\s?#]*)([?#]\S*)?", re.IGNORECASE)
# A URL as Rust prints it once parsed: without the "://" before its user.
_FIELD = re.compile(r'\b(username: |password: Some\(|query: Some\(|fragment: Some\()"[^"]*"')
_CREDENTIAL_VARIABLE = re.compile(
    r"(AWS|AZURE|GOOGLE|GCP|GCS|S3|MINIO|OSS|LAKEFS|DATABRICKS|HF)_"
    r".*(KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS|SIGNATURE)",
    re.IGNORECASE,
)
_ENDPOINT = re.compile(r"[A-Z0-9_]*(ENDPOINT|URL|PROXY)[A-Z0-9_]*", re.IGNORECASE)


def redacted(text: str, storage_options: Mapping[str, str] | None = None) -> str:
    """Replace everything in a text that may be a secret by ``***``.

    That is: all values of the options, and of environment variables that object stores take
    credentials from, also percent-encoded; and user, query and fragment of every URL. Of an option
    that is a URL, scheme, host and port stay.
    """
    # the longest first: a secret may be part of another, whose rest would remain
    for secret in sorted(_secrets(storage_options or {}), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _FIELD.sub(rf'\1"{HIDDEN}"', _URL.sub(_redacted_url, text))


def describe_error(
    error: BaseException, storage_options: Mapping[str, str] | None = None
) -> tuple[str, BaseException | None]:
    """Return a library's error as one line without secrets, and the cause to raise from.

    The cause is None if its text, or that of an error in its chain, holds a secret: a traceback
    would print it.
    """
    text = re.sub(r"\x1b\[[0-9;]*m|↳", "", redacted(str(error), storage_options))
    line = ": ".join(filter(None, map(str.strip, text.splitlines()))) or type(error).__name__
    chain = "".join(traceback.format_exception(error))
    return line[:_MAX_CHARACTERS], error if redacted(chain, storage_options) == chain else None


def _redacted_url(match: re.Match[str]) -> str:
    scheme, user, host, path, rest = match.groups(default="")
    if user and not (scheme.lower() in ("abfs", "abfss") and is_container(user[:-1])):
        user = f"{HIDDEN}@"
    return f"{scheme}://{user}{host}{path}" + (f"{rest[0]}{HIDDEN}" if rest else "")


def _secrets(storage_options: Mapping[str, str]) -> set[str]:
    environment = dict(os.environ)
    values = [*storage_options.values()]
    values += [value for name, value in environment.items() if _CREDENTIAL_VARIABLE.match(name)]
    # only the secret parts of these URLs: an endpoint's host helps to read a message
    urls = [v for name, v in environment.items() if _ENDPOINT.fullmatch(name) and _URL.match(v)]
    parts = {part for value in (*values, *urls) for part in _parts(str(value))}
    spellings = {
        spelling(part)
        for part in parts
        for spelling in (str, _quoted, quote, quote_plus, unquote, unquote_plus, _escaped)
    }
    return {part for part in spellings if not _TRIVIAL.fullmatch(part)}


def _parts(value: str) -> Iterator[str]:
    """Yield the secret parts of a value: of a URL, of JSON (a Google key), or the value itself."""
    value = value.strip()
    match = _URL.fullmatch(value)
    if match is not None:
        _, user, _, path, rest = match.groups(default="")
        yield from (user[:-1], *user[:-1].split(":", 1), path.strip("/"), rest[1:])
        yield from (text for _, text in parse_qsl(rest[1:]))
        return
    yield value
    yield from (line.strip() for line in value.splitlines())
    if value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from _leaves(json.loads(value))


def _leaves(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield from (data, *data.splitlines())
    elif isinstance(data, (dict, list)):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _leaves(item)


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _escaped(text: str) -> str:
    """Escape a text as JSON, Python and Rust do between quotes."""
    return json.dumps(text)[1:-1]
