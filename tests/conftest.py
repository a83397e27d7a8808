"""Fixtures that several files share: the S3 server, and a process group of one rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a folder of the test's own."""
    server.set_faults()
    server.requests()
    yield f"{server.url}/" + re.sub(r"\W", "-", request.node.name)
    server.set_faults()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist  # takes seconds to import, and most tests do without

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Two processes share the tests, one file at a time: those that take minutes go first.
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
