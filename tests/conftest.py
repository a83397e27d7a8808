"""The S3 server of the tests that write to an object store."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a folder of the test's own."""
    server.set_faults()
    server.requests()
    yield f"{server.url}/" + re.sub(r"\W", "-", request.node.name)
    server.set_faults()


# Two processes share the tests, a file at a time: those that take minutes begin first.
LONG = (
    "test_two_ranks.py",
    "test_quality.py",
    "test_served_files.py",
    "test_retrieval.py",
    "test_study.py",
    "test_hierarchy.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
