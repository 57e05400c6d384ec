"""Every notebook runs from top to bottom, in short form, and is stored without outputs."""

import json
import os
import pathlib

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == [
        '1_quickstart', '2_schedules', '3_gradient_noise', '4_your_own', '5_minima',
    ]  # fmt: skip


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    monkeypatch.setenv('ADABATCH_NOTEBOOK_SHORT', '1')
    monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')  # as users have it
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}
    ).execute()
    if folder := os.environ.get('ADABATCH_EXECUTED_NOTEBOOKS'):  # to look at them
        nbformat.write(notebook, pathlib.Path(folder, path.name))
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get('outputs', [])
        if {'image/png', 'image/svg+xml'} & output.get('data', {}).keys()
    ]
    assert figures


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())['cells']
    assert not any(cell.get('outputs') or cell.get('execution_count') for cell in cells)
