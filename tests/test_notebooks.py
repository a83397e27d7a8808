"""The outputs in the notebooks are of one run and name no machine; `make notebooks` runs them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = r"(/tmp|/home|/root|/Users|/var)/|site-packages|localhost"


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_of_one_run_and_name_no_machine(path: Path) -> None:
    assert path.stat().st_size < 150_000
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not cell.metadata
        assert "sys.path" not in cell.source  # helpers.py finds the modules
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text") or output.data.get("text/plain", "")
            assert not re.search(MACHINE, text)
