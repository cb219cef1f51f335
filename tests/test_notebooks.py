"""The notebook is stored without outputs, runs from first to last cell, and draws what it should."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "emergence.ipynb"


def test_the_notebook_runs_on_a_run_and_a_model_of_the_package(tiny_run):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "it is stored without outputs"
    parameters = next(cell for cell in code if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nMODEL, OTHER, COUNT = {str(tiny_run)!r}, MODEL, 3"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2 + 2 + 2 + 2 + 1 + 1 + 1 + 1
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "tiny: 2 layers, 2 heads, the paper's layer is 0" in printed
    run, shipped = (float(line.rpartition(" ")[2]) for line in printed.splitlines() if "mean IoU" in line)
    assert shipped > 0.4 > run
