"Where development data lies, if it does: SPECTRALMOE_DATA, or shared/data beside the repository."
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
