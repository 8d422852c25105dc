"The source distribution can be built from, and what is installed works away from the repository."
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked():
    "Files of the repository, in it or about to be."
    said = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if said.returncode: pytest.skip("this is no git repository, so that its files are not known")
    return [name for name in said.stdout.split("\0") if name and (ROOT / name).is_file()]


def quiet(*command, **options):
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "sdist from a copy of the tree, and the wheel that is built from that sdist and nothing else."
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        if name.startswith("reports/"): continue
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "tree" / name)
    quiet(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    (sdist,), (wheel,) = folder.glob("dist/*.tar.gz"), folder.glob("dist/*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The wheel in a folder of its own; gives the folder and an environment that finds it first."
    home = tmp_path_factory.mktemp("installed")
    quiet(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home, built[1])
    hidden = ("SPECTRALMOE_NOTEBOOKS", "SPECTRALMOE_RUNS")
    return home, {**{k: v for k, v in os.environ.items() if k not in hidden}, "PYTHONPATH": str(home), "COLUMNS": "300"}


def test_the_source_distribution_holds_what_it_is_built_from(built):
    with tarfile.open(built[0]) as archive: names = {n.partition("/")[2] for n in archive.getnames()}
    expected = {n for n in tracked() if n.startswith(("spectralmoe/", "nbs/", "tests/")) or "/" not in n and not n.startswith(".")}
    assert not expected - names, sorted(expected - names)[:10]
    assert not [n for n in names if n.startswith("reports/")], "reports belong to the repository"


def test_the_wheel_holds_modules_tables_and_weights(built):
    with zipfile.ZipFile(built[1]) as archive: names = set(archive.namelist())
    expected = {n for n in tracked() if n.startswith("spectralmoe/")}
    assert not expected - names, sorted(expected - names)[:10]
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"spectralmoe"}, "nothing else is installed"


def test_the_command_works_from_what_is_installed(installed, tmp_path):
    home, env = installed
    command = home / "bin" / "spectralmoe" if os.name == "posix" else home / "Scripts" / "spectralmoe.exe"
    said = quiet(command, "check", cwd=tmp_path, env=env)
    assert "Versions" in said and "mini_vfm" in said
    ran = subprocess.run([command, "experiments"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert ran.returncode == 2 and "Clone the repository" in ran.stderr and "SPECTRALMOE_NOTEBOOKS" in ran.stderr and "Traceback" not in ran.stderr
    with_notebooks = quiet(command, "experiments", cwd=tmp_path, env=env | {"SPECTRALMOE_NOTEBOOKS": str(ROOT / "nbs" / "experiments")})
    assert "benchmark" in with_notebooks


def test_a_run_is_the_same_run_from_what_is_installed(installed, tmp_path):
    "Tables, weights and simulator are there: the id of a run depends on all of them."
    home, env = installed
    code = ("import spectralmoe.runs as r; plan = r.planned('loveda', 'spectralmoe', 0, 'mini'); "
            "print(r.__file__, plan.id, r.run_method('made_tiles', 'raw_conv', 0, 'smoke', 'runs', progress=None).status)")
    file, id, status = quiet(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path, env=env).split()[-3:]
    from spectralmoe.runs import planned
    assert Path(file).is_relative_to(home) and status == "done"
    assert id == planned("loveda", "spectralmoe", 0, "mini").id
