"""What the notebooks keep is of one run and of no machine; `make notebooks` runs them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
OF_A_MACHINE = r"(/tmp|/home|/root|/Users|/var)/|site-packages|localhost"


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_outputs_of_one_run(name: str) -> None:
    assert (FOLDER / name).stat().st_size < 150_000
    cells = [c for c in nbformat.read(FOLDER / name, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            text = output.get("text") or output.data.get("text/plain", "")
            assert not re.search(OF_A_MACHINE, text)


def test_there_are_notebooks() -> None:
    assert NAMES
