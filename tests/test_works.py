"""docs/works.md is what its script writes, which fails where a test that it names is gone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def works() -> ModuleType:
    spec = importlib.util.spec_from_file_location("works", ROOT / "docs" / "works.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_script(works: ModuleType) -> None:
    assert (ROOT / "docs" / "works.md").read_text() == works.page()
