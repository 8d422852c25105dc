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


def imported(*modules):
    "Names of the packages that are loaded after importing each of some modules, one after the other in one new process."
    code = "import sys\n" + "\n".join(f"import spectralmoe.{m}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))" for m in modules)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return dict(zip(modules, map(set, map(str.split, said.splitlines())), strict=True))


IN_TURN = ["simulator.pretraining", "simulator.tiles", "datasets", "segmentor", "evaluation", "routing", "inference", "training", "reproduce", "engines", "reporting.sweep"]


@pytest.fixture(scope="module")
def loaded():
    "Packages after each of `IN_TURN`: what is absent then was loaded by none up to there."
    return imported(*IN_TURN)


def test_looking_up_a_task_loads_no_torch():
    code = "import sys, spectralmoe.benchmarks as b; b.shift_laboratory(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_adapter_needs_torch_alone():
    assert not imported("adapter")["adapter"] & {"transformers", "lightning", "rasterio", "pandas", "matplotlib", "nbdev", "fastcore"}


def test_pretraining_needs_neither_matplotlib_nor_lightning(loaded):
    assert "torch" in loaded["simulator.pretraining"] and not loaded["simulator.pretraining"] & {"matplotlib", "lightning"}


@pytest.mark.parametrize("module", IN_TURN)
def test_models_and_training_need_neither_rasterio_nor_nbdev(module, loaded):
    assert not loaded[module] & {"rasterio", "nbdev", "execnb"}


@pytest.mark.parametrize("module", ["engines", "reporting.sweep"])
def test_engines_are_imported_where_they_are_used(module, loaded):
    assert not loaded[module] & {"ray", "submitit"}


PAGES_THAT_EXPORT = sorted(p.relative_to(ROOT / "nbs") for p in ROOT.glob("nbs/**/[0-9]*.ipynb") if "experiments" not in p.parts)
WINGS = {"reading": 3.2, "own": 3.5, "encoders": 13.5, "tuning": 15.5, "archives": 4.5, "reporting": 29.5, "simulator": 2.5}  # between which modules a sub-package stands
EXCEPT = {"own/03_check": 5.5, "own/04_proposal": 5.6, "reporting/05_plans": 31.5, "reporting/07_sweep": 31.6, "archives/08_prepare": 5.5, "simulator/07_tiles": 4.5, "simulator/08_pretraining": 14.5}  # pages that stand later than their sub-package


def place(page):
    "Where a page stands: its number, or that of its sub-package and then its own."
    number, _, name = page.stem.partition("_")
    wing = page.parent.as_posix()
    if wing == ".": return float(number), 0
    return EXCEPT.get(f"{wing}/{page.stem}", WINGS[wing]), int(number)


def module(page):
    return ".".join([*page.parent.parts, page.stem.partition("_")[2]])


def imports(page):
    "Modules of the package that a module imports, anywhere in it."
    import ast
    name = module(page)
    known = {module(p) for p in PAGES_THAT_EXPORT}
    found = set()
    for node in ast.walk(ast.parse((ROOT / "spectralmoe" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = name.split(".")[:-node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            if base[:1] == ["spectralmoe"]: base = base[1:]
            elif not node.level: continue
            found |= {".".join([*base, a.name]) for a in node.names} | {".".join(base)}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("spectralmoe.") for a in node.names if a.name.startswith("spectralmoe.")}
    return (found & known) - {name}


def test_numbers_are_unique():
    numbers = [(p.parent, p.stem.partition("_")[0]) for p in PAGES_THAT_EXPORT]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("page", PAGES_THAT_EXPORT, ids=lambda p: p.as_posix())
def test_a_module_imports_only_from_modules_before_it(page):
    "No module imports from one that stands later, so that there is no circle."
    places = {module(p): place(p) for p in PAGES_THAT_EXPORT}
    later = {m for m in imports(page) if places[m] >= place(page)}
    assert not later, f"{page} imports {', '.join(sorted(later))}"
