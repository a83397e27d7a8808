"""docs/works.md is what its script writes, and names tests that exist."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from rank_checks_serving import FREES_FEATURES

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


@pytest.mark.skipif(not FREES_FEATURES, reason="names a test of an option that TorchRec 1.6 lacks")
def test_the_page_names_tests_that_exist(works: ModuleType) -> None:
    ids = [str(ROOT / test) for test in works.tests()]
    assert pytest.main(["--collect-only", "-qq", "-m", "", "-p", "no:cacheprovider", *ids]) == 0
