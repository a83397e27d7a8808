"""Credentials are in no message, traceback, repr, log record, output or file."""

from __future__ import annotations

import logging
import pprint
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import das_data as dd
import pytest
from das_data import AT, WINDOW, snapshot
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from s3_server import S3Server

from torchrec_exfm.das import StoreError, TeacherLogger, TeacherLookup, TeacherStore, publish
from torchrec_exfm.das.__main__ import main
from torchrec_exfm.das.redaction import describe_error, redacted

MARK = "Xq7/MARK+er=="  # like a key of S3; URL-quoted it is another string
NOWHERE = "127.0.0.1:1"  # where nobody listens
QUICK = {"max_retries": "0", "retry_timeout": "1s", "allow_http": "true", "aws_region": "eu-1"}
WHOLE = {**QUICK, "aws_endpoint_url": f"http://{NOWHERE}", "aws_access_key_id": "AKIA"}
WHOLE["aws_secret_access_key"] = "other-secret"


def spellings(mark: str) -> list[str]:
    return [mark, quote(mark), quote(mark, safe=""), mark.split("+")[0], mark.split("/")[1][:6]]


def check_hidden(text: str) -> None:
    for spelling in spellings(MARK):
        assert spelling not in text


def told_of(error: BaseException) -> str:
    return f"{error}\n{error!r}\n{''.join(traceback.format_exception(error))}"


# ---- What is redacted ----


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("no Xq7/MARK+er== here", {"k": MARK}, "no *** here"),
        ("no Xq7%2FMARK%2Ber%3D%3D here", {"k": MARK}, "no *** here"),
        ("no Xq7/MARK%2Ber%3D%3D here", {"k": MARK}, "no *** here"),
        ("key abcd in abcdef", {"a": "abcd", "b": "abcdef"}, "key *** in ***"),
        ("403 true in 30s", {"a": "true", "b": "403", "c": "30s"}, "403 true in 30s"),
        ("GET http://u:p@h:1/x?q=1&r#f in 2s", {}, "GET http://***@h:1/x?*** in 2s"),
        ("at s3://b/x#f", {}, "at s3://b/x#***"),
        ("http://u@h", {}, "http://***@h"),
        ("-1http://u@h", {}, "-1http://***@h"),
        ("http://u:a/b@h/x", {}, "http://***@h/x"),
        ("at http://h:1/x", {"aws_endpoint_url": "http://h:1"}, "at http://h:1/x"),
        ("as longuser and longword", {"e": "http://longuser:longword@h"}, "as *** and ***"),
        ("with sig-value", {"e": "http://h?sig=sig-value"}, "with ***"),
        ("abfss://one@a.net/x", {}, "abfss://one@a.net/x"),
        ("abfss://one:p@a.net/x", {}, "abfss://***@a.net/x"),
        (r"got a\"quote", {"k": 'a"quote'}, "got ***"),
        ("line MIIEvg", {"k": '{"private_key": "BEGIN\\nMIIEvg\\nEND"}'}, "line ***"),
        (
            'Url { username: "u", password: Some("p") }',
            {},
            'Url { username: "***", password: Some("***") }',
        ),
    ],
)
def test_what_is_hidden(text: str, options: dict[str, str], expected: str) -> None:
    assert redacted(text, options) == expected


@pytest.mark.parametrize("text", ["a" * 100_000, "http://" * 20_000])
def test_long_texts_take_no_time(text: str) -> None:
    started = time.monotonic()
    redacted(text, {"k": MARK})
    assert time.monotonic() - started < 2  # it once took minutes


def test_the_environments_credentials_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", MARK)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "a-sas-token")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("HTTPS_PROXY", "http://longuser:longword@proxy")
    text = f"{MARK} a-sas-token eu-west-1 longword http://proxy"
    assert redacted(text) == "*** *** eu-west-1 *** http://proxy"


def test_the_chain_is_cut_only_where_it_tells_a_secret() -> None:
    inner = OSError(f"refused {MARK}")
    outer = ValueError("can't")
    outer.__cause__ = inner
    assert describe_error(outer, {"k": MARK}) == ("can't", None)
    assert describe_error(outer, {}) == ("can't", outer)
    assert describe_error(ValueError())[0] == "ValueError"


def test_an_errors_lines_become_one_that_is_cut_after_it_is_redacted() -> None:
    error = ValueError("Generic error\n  \x1b[31m↳\x1b[0m " + "x" * 480 + MARK)
    text, _ = describe_error(error, {"k": MARK})
    assert text.startswith("Generic error: xxx") and len(text) == 498 and text.endswith("x***")


# ---- What a store says ----

OPTIONS = [
    *("aws_secret_access_key", "aws_access_key_id", "aws_session_token", "aws_secret_acces_key"),
    *("aws_region", "proxy_url", "timeout", "retry_timeout", "max_retries"),
    *("aws_virtual_hosted_style_request", "conditional_put", "aws_conditional_put"),
    *("backoff_config.init_backoff", "google_service_account_key", "password"),
]
URLS = {
    "user": f"http://user:{quote(MARK, safe='')}@{NOWHERE}",
    "name": f"http://{quote(MARK, safe='')}@{NOWHERE}",
    "query": f"http://{NOWHERE}?sig={MARK}",
    "path": f"http://{NOWHERE}/{MARK}",
    "fragment": f"http://{NOWHERE}#{MARK}",
}
NO_URLS = {
    "unquoted": f"http://user:{MARK}@{NOWHERE}",  # its user ends at the first "/"
    "no host": f"http://user:{quote(MARK, safe='')}@",
    "no port": f"http://user:{quote(MARK, safe='')}@h:port",
    "no scheme": f"user:{MARK}@{NOWHERE}",
}
AZURE = ("azure_storage_account_key", "azure_storage_sas_token", "azure_client_secret")
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{f"s3 {name}": ("s3://bucket/store", {**WHOLE, name: MARK}) for name in OPTIONS},
    **{
        f"s3 {name} {place}": ("s3://bucket/store", {**WHOLE, name: url})
        for name in ("aws_endpoint_url", "proxy_url")
        for place, url in URLS.items()
    },
    **{
        f"azure {name}": (
            "abfss://container@account.dfs.core.windows.net/store",
            {**QUICK, "azure_endpoint": f"http://{NOWHERE}", name: MARK},
        )
        for name in AZURE
    },
    "gs key": ("gs://bucket/store", {**QUICK, "google_service_account_key": MARK}),
    "gs json": (
        "gs://bucket/store",
        {**QUICK, "google_service_account_key": f'{{"private_key": "{MARK}", "client_email": 1}}'},
    ),
    "gs file": ("gs://bucket/store", {**QUICK, "google_service_account": f"/none/{MARK}"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_store_that_cannot_be_had_does_not_tell(
    case: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url, options = CASES[case]
    caplog.set_level(logging.DEBUG)
    for way in (TeacherStore, TeacherStore.create):
        with pytest.raises(StoreError) as caught:
            way(url, storage_options=options)
        check_hidden(told_of(caught.value))
    check_hidden(caplog.text + "".join(capfd.readouterr()))


@pytest.mark.parametrize("option", ["aws_endpoint_url", "AWS_ENDPOINT", "endpoint"])
@pytest.mark.parametrize("case", NO_URLS)
def test_an_endpoint_that_is_no_url_is_refused_and_not_repeated(option: str, case: str) -> None:
    options = {**WHOLE, option: NO_URLS[case]}  # at which the library panics
    for way in (TeacherStore, TeacherStore.create):
        with pytest.raises(ValueError, match=f"'{option}' should be a URL") as caught:
            way("s3://bucket/store", storage_options=options)
        check_hidden(told_of(caught.value))


@pytest.mark.parametrize("options", [{"max_retries": 3}, {"timeout": None}, {5: "5"}])
def test_options_are_strings(options: Any) -> None:
    with pytest.raises(TypeError, match="storage_options should be strings by name; received"):
        TeacherStore.create("s3://bucket/store", storage_options=options)


@pytest.fixture(scope="module")
def store(server: S3Server) -> TeacherStore:
    """Create a good store whose secret key, and the value of a misspelt option, is the marker."""
    options = {**server.storage_options, "max_retries": "0", "aws_secret_acces_key": MARK}
    options["aws_access_key_id"] = MARK  # which the server repeats in its errors, as S3 does
    store = TeacherStore.create(
        f"{server.url}/secrets", window_seconds=WINDOW, storage_options=options
    )
    store.write(snapshot(), [0, 1], [0.5, 1.5], [AT, AT])
    store.refresh()
    return store


def look_up(store: TeacherStore) -> Any:
    return TeacherLookup(store, "fm", ids=lambda batch: batch, event_seconds=lambda _: AT)([0, 1])


ACTS: dict[str, Callable[[TeacherStore], Any]] = {
    "open": lambda store: TeacherStore(store.url, storage_options=store.storage_options),
    "create": lambda store: TeacherStore.create(
        f"{store.url}-new", storage_options=store.storage_options
    ),
    "refresh": lambda store: store.refresh(),
    "write": lambda store: store.write(snapshot(), [5], [0.5], [AT]),
    "watermark": lambda store: store.advance_watermark("fm", 5),
    "read": lambda store: store.read("fm", 2),
    "publish": lambda store: publish(store, "fm", None, trained_through_seconds=5),
    "look up": look_up,
}


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("act", ACTS)
def test_a_store_that_fails_does_not_tell(
    act: str,
    status: int,
    store: TeacherStore,
    server: S3Server,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    opened = TeacherStore(store.url, storage_options=store.storage_options)
    server.set_faults(failing=1.0, status=status)
    try:
        with pytest.raises(StoreError) as caught:
            ACTS[act](opened)
    finally:
        server.set_faults()
    assert str(status) in str(caught.value)
    check_hidden(told_of(caught.value) + caplog.text + "".join(capfd.readouterr()))


def test_the_server_repeats_the_key(store: TeacherStore, server: S3Server) -> None:
    """Without this the tests above could not fail."""
    server.set_faults(failing=1.0, status=403)
    with pytest.raises(Exception, match="MARK"):
        store.table.delta.update_incremental()
    server.set_faults()


def test_objects_do_not_tell(store: TeacherStore) -> None:
    lookup = TeacherLookup(store, "fm", ids=lambda batch: batch, event_seconds=lambda _: AT)
    texts = [repr(x) + str(x) for x in (store, store.table, lookup, TeacherLogger(store, "fm"))]
    check_hidden("".join(texts) + pprint.pformat(texts))


def test_files_do_not_tell(tmp_path: Path) -> None:
    store = dd.new_store(tmp_path, storage_options={"aws_secret_acces_key": MARK})
    store.write(snapshot(), [1], [0.5], [AT])
    publish(store, "fm", None, trained_through_seconds=5)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not any(s.encode() in path.read_bytes() for path in files for s in spellings(MARK))


# ---- What the command says ----

COMMANDS = ["show", "verify", "compact"]


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment from which the command reads its options."""
    names = {"AWS_SECRET_ACCESS_KEY": MARK, "AWS_ACCESS_KEY_ID": MARK, "AWS_ALLOW_HTTP": "true"}
    names |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "eu-1", "RUST_BACKTRACE": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_the_command_does_not_tell(
    store: TeacherStore, server: S3Server, environment: None
) -> None:
    server.set_faults(failing=1.0, status=403)
    line = [sys.executable, "-m", "torchrec_exfm.das", "show", store.url]
    done = subprocess.run(line, capture_output=True, text=True)
    server.set_faults()
    assert done.returncode == 2
    assert "error: " in done.stderr and "403" in done.stderr
    check_hidden(done.stdout + done.stderr)


@pytest.mark.parametrize("failing", ["history", "repair", "vacuum", "get_add_actions"])
def test_the_command_does_not_tell_what_the_library_says(
    failing: str,
    store: TeacherStore,
    environment: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise DeltaError(f"refused {MARK}")

    monkeypatch.setattr(DeltaTable, failing, fail)
    for command in (["show"], ["verify"], ["compact", "--repair"], ["compact", "--vacuum-hours=9"]):
        main([command[0], store.url, *command[1:]])
    printed = "".join(capfd.readouterr())
    assert "refused ***" in printed
    check_hidden(printed)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_does_not_repeat_a_url(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in (f"s3://K:{MARK}@bucket/x", f"s3:/K:{MARK}@bucket", f"file:///x?sig={MARK}"):
        assert main([command, url]) == 2
    check_hidden("".join(capsys.readouterr()))
