"""The notebooks run from first to last cell, draw what they should, and are stored without outputs."""

from pathlib import Path

import pytest
from explorer import picture_file

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def executed(path: Path, **parameters: str | int):
    """A notebook after running all its cells, with other parameters."""
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    return notebook


def outcome(notebook) -> tuple[int, str]:
    """(pictures, everything printed)."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert all(
        output.output_type in ("display_data", "stream") and output.get("name") != "stderr" for output in outputs
    )
    pictures = [output for output in outputs if "image/png" in output.get("data", ())]
    return len(pictures), "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_emergence_shows_the_models_of_the_package():
    notebook = executed(NOTEBOOKS[0])
    pictures, printed = outcome(notebook)
    assert pictures == 2 + 2 + 2 + 2 + 1 + 1 + 1
    assert "shipped:CRATE: 4 layers, 3 heads, the paper's layer is 2" in printed
    scores = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if "mean IoU" in line]
    assert scores[0] > 0.4 > scores[1]  # CRATE, ViT


def test_emergence_takes_a_run_and_a_folder(tiny_run, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture_file(number))
    notebook = executed(NOTEBOOKS[0], MODEL=str(tiny_run), OTHER="", IMAGES=f"folder:{tmp_path}", COUNT=3)
    pictures, printed = outcome(notebook)
    assert pictures == 8  # one of each, the history of the run among them
    assert "mean IoU" not in printed
