"""URLs that a teacher store accepts: none that could hold credentials."""

from __future__ import annotations

import traceback
from pathlib import Path

import das_data as dd
import pytest

from torchrec_exfm.das import TeacherStore
from torchrec_exfm.das.urls import normal_url

REFUSED = [
    "s3://K:S@bucket/x",
    "s3://S@bucket/x",
    "s3://:S@bucket/x",
    "s3://K:S%40bucket/x",
    "s3:///K:S@bucket/x",
    "s3:/K:S@bucket/x",
    "s3:K:S@bucket/x",
    "s3:\\\\K:S@bucket/x",
    " s3://K:S@bucket/x",
    "\ts3:/K:S@bucket/x",
    "S3://K:S@bucket/x",
    "s3://bucket/K:S@x",
    "s3://bucket/x?sig=S",
    "s3://bucket?sig=S",
    "s3://bucket/x%3Fsig=S",
    "s3://bucket/x%253Fsig=S",
    "s3://bucket/x#S",
    "s3://bucket/x%23S",
    "s3://bucket/x;sig=S",
    "s3://bucket/x&sig=S",
    "s3://bucket/x\\S",
    "s3://bucket/x\nS",
    "s3://bucket/x\0S",
    "s3://bucket\uff20S/x",
    "s3://bucket:S/x",
    "s3://bucket/../S",
    "s3://bucket/%2e%2e/S",
    "s3://bucket/./S",
    "s3://bucket/[S]",
    "s3://",
    "https://user:S@host/x",
    "https://host/x?sv=1&sig=S",
    "file://u:S@host/x",
    "file:/u:S@host/x",
    "file://host/S",
    "file:///data/x?sig=S",
    "file:///data/x#S",
    "file:///data/%2e%2e/S",
    "FILE://u:S@host/x",
    "abfss://container:S@account.dfs.core.windows.net/x",
    "abfss://S@account.dfs.core.windows.net/x",  # containers are of small letters
    "abfss://a--b@account.dfs.core.windows.net/x",
    "abfss://ab@account.dfs.core.windows.net/x",
    "abfss://c%3AS@account.dfs.core.windows.net/x",
    "abfss://one@S@account.dfs.core.windows.net/x",
    "abfss://container@account.dfs.core.windows.net/x?sig=S",
    "az://container@account/x",
    "/data/s3://K:S@bucket/x",
]
MARK = "MARKER"


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_with_a_place_for_credentials_is_refused_and_not_repeated(url: str) -> None:
    marked = (
        url.replace("S", MARK) if not url.startswith("S3") else "S3" + url[2:].replace("S", MARK)
    )
    for way in (TeacherStore, TeacherStore.create):
        with pytest.raises(ValueError, match="a store's url should be") as caught:
            way(marked)
        dd.sentence(caught.value)
        assert MARK not in "".join(traceback.format_exception(caught.value)).replace(
            repr(marked), ""
        )


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("S3://Bucket/A", "s3://Bucket/A"),
        ("s3a://bucket/dt=2026-01-01/10:00 é~(1)", "s3a://bucket/dt=2026-01-01/10:00 é~(1)"),
        ("s3://bucket/a..b/...", "s3://bucket/a..b/..."),
        ("gs://bucket.of.org/x", "gs://bucket.of.org/x"),
        ("az://container/x", "az://container/x"),
        ("hdfs://name-node:8020/x", "hdfs://name-node:8020/x"),
        (
            "abfss://one-2@account.dfs.core.windows.net/x/",
            "abfss://one-2@account.dfs.core.windows.net/x",
        ),
        ("abfs://one@account.dfs.core.windows.net", "abfs://one@account.dfs.core.windows.net"),
        ("abfss://container/x", "abfss://container/x"),
        ("file:///data/x/", "/data/x"),
        ("file://localhost/data/x", "/data/x"),
        ("FILE:///data/x", "/data/x"),
    ],
)
def test_a_url_is_taken(url: str, normal: str) -> None:
    assert normal_url(url) == normal
    assert normal_url(normal) == normal


@pytest.mark.parametrize(
    "name", ["a#b", "50%", "a?b", "a@b", "K:S@h", "a b", " a ", "a;b", "é", "a&b=c", "..a", "dt=1"]
)
def test_a_local_folder_may_have_any_name_that_the_library_takes(tmp_path: Path, name: str) -> None:
    store = dd.small_store(tmp_path / name)
    assert store.url == f"{tmp_path}/{name}"
    assert list(dd.by_id(TeacherStore(f"{tmp_path}/{name}/"))) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a[b", "a]b", "a|b", "a^b", "a\\b", "a%40b", "a\tb", "a\0b"])
def test_a_local_folder_that_the_library_takes_for_another_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="a store's url should be a folder without"):
        dd.new_store(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_relative_folder_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert normal_url("a/b") == normal_url(Path("a/b")) == f"{tmp_path}/a/b"
    with pytest.raises(ValueError, match="as an absolute path"):
        normal_url("run:1/a")
    assert normal_url(tmp_path / "run:1") == f"{tmp_path}/run:1"


def test_a_path_of_a_url_is_refused() -> None:
    with pytest.raises(ValueError, match="SCHEME://BUCKET/PATH"):
        normal_url(Path("s3://bucket/x"))  # which is s3:/bucket/x
