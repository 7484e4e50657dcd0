"""The notebooks run from top to bottom and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tree import ROOT

import modeling_moshi_ttt

NOTEBOOKS = {path.stem: path for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}


def run(name: str, folder: Path, monkeypatch, changes: dict[str, str]) -> str:
    """Everything that a notebook prints and shows as text, run in `folder`."""
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    monkeypatch.setenv("PYTHONPATH", str(Path(modeling_moshi_ttt.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # a plot
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_fine_tune_and_listen(tmp_path, monkeypatch):
    said = run("fine_tune_and_listen", tmp_path, monkeypatch, {"STEPS = 320": "STEPS = 2"})
    assert "the user: Good morning" in said
    assert (tmp_path / "runs" / "notebook" / "final" / "model.safetensors").is_file()


def test_inside_a_memory(tmp_path, monkeypatch):
    said = run("inside_a_memory", tmp_path, monkeypatch, {})
    assert said.count(": True\n") == 2  # the three inner losses lie one below the other in both layers
    assert "mean 0.100" in said
    assert "{'layer_norm': False, 'none': True}" in said


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_without_outputs(name):
    cells = [cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) > 4
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []
