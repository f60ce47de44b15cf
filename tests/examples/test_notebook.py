"""The notebook runs from its first cell to its last, and draws what it promises."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "own_loop.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's client, not of ptsim
def test_the_notebook_prunes_projects_and_draws_three_figures(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    channels = next(line for line in printed.splitlines() if line.startswith("output channels"))
    before, after = channels.removeprefix("output channels ").split(" (")[0].split(" → ")
    assert int(after) < int(before)


def test_the_notebook_is_stored_without_outputs() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"outputs": []' in text
    assert "image/png" not in text
