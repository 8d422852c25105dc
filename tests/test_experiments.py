"Every experiment can be run with other parameters: the tag that papermill needs survives cleaning."
from pathlib import Path

import nbformat
import pytest

from spectralmoe.reproduce import read_parameters

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs" / "experiments").glob("[!_.]*.ipynb"))


def test_there_are_experiments():
    assert NOTEBOOKS, "nbs/experiments holds no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_parameters_cell_of_bare_literals_near_the_top(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] < 6
    assert cells[0].source.startswith("# "), "the first cell gives the title"
    parameters = read_parameters(path)
    assert parameters and not [p.name for p in parameters.values() if not p.help], "every parameter says what it means"
