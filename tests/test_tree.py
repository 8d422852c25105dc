"What is committed speaks of the project alone, and imports stay where they belong."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("reports/**/*.ipynb"), *ROOT.glob("reports/**/*.json"),
                *ROOT.glob("reports/**/*.html"), ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_path_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    for path in (str(ROOT), str(Path.home()) + "/", "site-packages"):
        assert path not in text, f"{path} in {page.name}"


def imported(module):
    "Names of the packages that importing one room loads."
    code = f"import {module}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


def test_the_adapter_needs_torch_alone():
    assert not imported("spectralmoe.adapter") & {"transformers", "lightning", "rasterio", "pandas", "matplotlib", "nbdev", "fastcore"}


@pytest.mark.parametrize("room", ["segmentor", "datasets", "training", "evaluation", "routing", "reproduce"])
def test_models_and_training_need_neither_rasterio_nor_nbdev(room):
    assert not imported(f"spectralmoe.{room}") & {"rasterio", "nbdev", "fastcore", "execnb"}


def test_rooms_import_only_from_rooms_above_them():
    "The order of the notebooks is the order of the floors."
    import re
    rooms = [p.stem.split("_", 1)[1] for p in sorted(ROOT.glob("nbs/[0-9]*.ipynb"))]
    for i, room in enumerate(rooms):
        text = (ROOT / "spectralmoe" / f"{room}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"from (?:spectralmoe)?\.(\w+) import", text))
        assert used <= set(rooms[:i]), (room, used - set(rooms[:i]))
