"Where development data lies, if it does (SPECTRALMOE_DATA, or shared/data beside the repository); experiments without a kernel."
import ast
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def development_data(name):
    "Folder `name` of the development data; skips the test where there is none."
    roots = [os.environ.get("SPECTRALMOE_DATA"), ROOT.parent / "shared" / "data"]
    for root in filter(None, roots):
        if (Path(root) / name).is_dir(): return Path(root) / name
    pytest.skip(f"no folder {name} under SPECTRALMOE_DATA: development data that is not part of the package")


def die_once(path):
    "Ends its process the first time; stands here because a process that imports this module starts fast."
    import signal
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def run_cells(experiment, parameters, folder):
    "Every cell of an experiment in this process, values shown as a notebook shows them; `reproduce` does it in a kernel, which takes seconds to start."
    import nbformat
    from IPython.core.formatters import DisplayFormatter
    from matplotlib import pyplot
    from spectralmoe.reproduce import find_experiment
    exp, shown, space = find_experiment(experiment), DisplayFormatter(), {}
    values = {**exp.check(parameters), "folder": str(folder)}
    for cell in nbformat.read(exp.path, 4).cells:
        if cell.cell_type != "code": continue
        tree = ast.parse(cell.source, exp.path.name)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, exp.path.name, "exec"), space)
        if last: shown.format(eval(compile(ast.Expression(last.value), exp.path.name, "eval"), space))
        if "parameters" in cell.metadata.get("tags", ()): space.update(values)
    pyplot.close("all")
    return space


@pytest.fixture(scope="session")
def wildfire():
    "Folder with images/, masks/ and index.csv of the California burned areas."
    return development_data("wildfire_ca")


@pytest.fixture(scope="session")
def released_parity():
    "Folder with numbers measured on the released code."
    return development_data("released_parity")


def pytest_configure(config):  # rasterio's own calls of affine
    config.addinivalue_line("filterwarnings", "ignore::PendingDeprecationWarning:rasterio")
