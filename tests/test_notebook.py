"""The notebook runs from top to bottom, the published usage in it included."""

from pathlib import Path

import nbclient
import nbformat
from sure_network import save_sure_network

from fpnssd.data.voc import VOC_CLASSES
from fpnssd.training.config import lite

ROOT = Path(__file__).parents[1]


def test_notebook_runs_from_top_to_bottom(tmp_path):
    path = save_sure_network(tmp_path / "small.pth.tar", VOC_CLASSES, lite().backbone, image_size=300, level=5)
    notebook = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.source.startswith("CHECKPOINT = ")
    first.source = f"CHECKPOINT = {str(path)!r}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    said = "".join(output.get("text", "") for output in outputs)
    assert "8,748 priors" in said
    assert "objects in 512 x 512 pixels" in said
