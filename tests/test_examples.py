"""The committed notebook: executed from top to bottom, and what it says is what a run of it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "own_data.ipynb"


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_the_notebook_was_executed_from_top_to_bottom() -> None:
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert "/root" not in NOTEBOOK.read_text(encoding="utf-8")
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.soak
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(book, timeout=3600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment() | {"JUPYTER_PLATFORM_DIRS": "1", "PYTHONPATH": str(NOTEBOOK.parents[1])})
    assert (tmp_path / "students" / "digits" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "digits" / "report.html").is_file()
