"""The notebook runs from top to bottom on the model in the package, and is kept without outputs."""

import json

import programs
import pytest

NOTEBOOK = programs.ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_runs(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs pip install ipykernel")
    monkeypatch.delenv("ADDP_RUN", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(programs.ROOT), prepend=":")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    assert any("task addp" in str(output) for output in shown)


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])]
