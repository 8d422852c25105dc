"What holds for every data set: small copies that repeat, folders as zips, leftovers of other systems, what was published."
import shutil
import warnings

import pytest

from spectralmoe.archives.prepare import FIXTURES, RECIPES
from spectralmoe.archives.recipes import PrepareWarning, prepare_with
from spectralmoe.benchmarks import benchmark
from spectralmoe.reading.manifest import read_manifest

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore::spectralmoe.archives.recipes.PrepareWarning")]
OPTIONS = {"fbp_cross_region": {"targets": "GF2_PMS1__L1A0001118839-MSS1"}}
PICTURES = (".tif", ".tiff", ".png")


def made(name, source, to, **options):
    "The manifest of a preparation."
    return read_manifest(prepare_with(RECIPES[name], source, to, {**OPTIONS.get(name, {}), **options}).parent)


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unpacked(source, to):
    "Every zip into a folder of its own, inside another; what is no zip is copied."
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        there = to / "deep" / path.relative_to(source)
        if path.suffix == ".zip": shutil.unpack_archive(path, there.parent if path.stem in ("tr", "val", "ts") or "flair" in path.stem else there.with_suffix(""))
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)
    return to


@pytest.fixture(scope="module", params=list(RECIPES))
def ready(request, tmp_path_factory):
    "A data set's name, its small copy, and what was prepared from that."
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    source = FIXTURES[name](root / "in")
    return name, source, root / "out", made(name, source, root / "out")


def test_copies_are_small_repeat_and_hold_every_class(ready, tmp_path):
    name, source, _, said = ready
    files = content(source)
    assert sum(map(len, files.values())) < 2e6
    assert files == content(FIXTURES[name](tmp_path / "two")) != content(FIXTURES[name](tmp_path / "three", seed=1))
    task = benchmark(RECIPES[name].task)
    for domain in task.domains:
        labels = said["domains"][domain.name]["labels"]
        assert {task.label_map[int(v)] for v in labels} >= set(range(task.n_classes)), domain.name


def test_unpacked_by_a_mac_and_renamed_by_windows(ready, tmp_path):
    name, source, _, said = ready
    folder = unpacked(source, tmp_path / "in")
    for path in [p for p in folder.rglob("*") if p.suffix in PICTURES]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
        path.rename(path.with_suffix(path.suffix.upper()))
    (folder / "__MACOSX").mkdir()
    shutil.copytree(folder / "deep", folder / "__MACOSX" / "deep")
    (folder / "deep" / ".DS_Store").write_bytes(b"Bud1")
    again = made(name, folder, tmp_path / "out")
    assert {k: again[k] for k in ("domains", "statistics")} == {k: said[k] for k in ("domains", "statistics")}


def test_twice_is_once_and_other_options_are_refused(ready):
    name, source, out, _ = ready
    before = content(out / name)
    made(name, source, out)
    assert content(out / name) == before
    with pytest.raises(ValueError, match="tile: 512 there, 16 now"): made(name, source, out, tile=16)


def test_tiles_may_lie_beside_the_archives(ready, tmp_path):
    name, source, _, said = ready
    folder = shutil.copytree(source, tmp_path / "both")
    assert made(name, folder, folder)["domains"] == made(name, folder, folder)["domains"] == said["domains"]


def test_archives_and_what_was_unpacked_from_them_are_not_mixed(ready, tmp_path):
    name, source, _, _ = ready
    folder = shutil.copytree(source, tmp_path / "both")
    with pytest.raises(ValueError, match="there twice.*not both"): made(name, unpacked(source, folder), tmp_path / "out")


def test_a_copy_is_told_from_what_was_published(ready):
    name, source, out, said = ready
    for domain, expected in RECIPES[name].expected.items():
        found = said["domains"][domain]["tiles"]
        assert (found == expected) != any(w.startswith(f"{domain} has {found} of {expected:,} published") for w in said["warnings"])
    archives = {p.name for p in source.rglob("*.zip")}
    for archive in archives & {*RECIPES[name].md5, *RECIPES[name].sizes} - {"Test.zip", "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE.zip"}:
        assert any(w.startswith(f"{archive} has ") and "published" in w for w in said["warnings"]), archive


def test_warnings_are_the_lines_of_the_manifest(ready, tmp_path):
    name, source, _, said = ready
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made(name, source, tmp_path)
    assert {str(w.message) for w in heard if w.category is PrepareWarning} == set(said["warnings"])
