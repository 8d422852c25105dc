"What the page of FLAIR does not show: every broken copy, the agency's archives against the mirror's, folders and zips."
import shutil
import warnings
import zipfile

import pytest

from spectralmoe.archives import flair
from spectralmoe.archives.flair import FLAIR, FLAIR_BROKEN, write_flair
from spectralmoe.archives.recipes import PrepareWarning, prepare_with
from spectralmoe.reading.manifest import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*published:spectralmoe.archives.recipes.PrepareWarning")


@pytest.fixture(scope="module")
def aerial(tmp_path_factory): return write_flair(tmp_path_factory.mktemp("aerial"))


def made(there, to, **options):
    "The manifest of a preparation."
    return read_manifest(prepare_with(FLAIR, there, to, options).parent)


def same(a, b): return a["domains"] == b["domains"] and a["statistics"] == b["statistics"]


def test_flair_names():
    for path in ("flair_aerial_train/D004_2021/Z10_AU/img/IMG_000826.tif", "D004_2021/aerial/Z1_UU/img/IMG_000826.tif", "x/D004_2021/Z1_UU/msk/MSK_000826.tif"):
        assert flair._FLAIR_NAME.search(f"/{path}")[1] == "D004_2021"
    for path in ("D004_2021/Z1_UU/img/MSK_000826.tif", "D4_2021/Z1_UU/img/IMG_000826.tif", "D004_2021/Z1_UU/sen/IMG_000826.tif"):
        assert not flair._FLAIR_NAME.search(f"/{path}")


@pytest.mark.parametrize("kind", [dict(mirror=True), dict(zipped=False), dict(mirror=True, zipped=False)])
def test_flair_is_the_same_however_it_comes(kind, aerial, tmp_path):
    other = write_flair(tmp_path / "in", **kind)
    assert same(made(aerial, tmp_path / "a"), made(other, tmp_path / "b"))


def test_one_archive_of_the_mirror_is_found_without_its_inner_folder(tmp_path):
    write_flair(tmp_path / "in", mirror=True, zipped=False)
    inner = tmp_path / "in" / "data" / "train-val" / "D004_2021"
    with zipfile.ZipFile(inner.with_name("D004_2021.zip"), "w") as z:
        for path in inner.rglob("*.tif"): z.write(path, path.relative_to(inner))
    shutil.rmtree(inner)
    assert made(tmp_path / "in", tmp_path / "out")["domains"]["source_departments"]["scenes"] == 40


SAYS = {"truncated": "cut off or damaged", "bands": "has 4 bands, expected 5", "label": "expected 1..19", "missing_mask": "1 of 50 images have no mask",
              "name": "fit no pattern", "department": "D099_2020 in no list", "number": r"IMG_080000 is numbered outside 61713..77412",
              "hub": "of FLAIR-HUB"}


@pytest.mark.parametrize("broken", SAYS)
def test_broken_flair_is_refused(broken, tmp_path):
    source = write_flair(tmp_path / "in", broken=broken)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=SAYS[broken]): made(source, tmp_path / "out")


@pytest.mark.parametrize("mirror", [False, True])
def test_the_second_test_is_left_out_with_a_warning(mirror, aerial, tmp_path):
    assert set(SAYS) | {"second_test"} == set(FLAIR_BROKEN)
    source = write_flair(tmp_path / "in", broken="second_test", mirror=mirror)
    with pytest.warns(PrepareWarning, match="2 files of the test of FLAIR #2 are left out"): said = made(source, tmp_path / "out")
    assert same(said, made(aerial, tmp_path / "a"))


def test_departments_by_option(aerial, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*published")
        said = made(aerial, tmp_path / "out", source="D006_2020,D008_2019,D013_2020", target="D064_2021,D068_2021,D071_2020")
    assert [d["scenes"] for d in said["domains"].values()] == [3, 3]


def test_a_department_that_was_not_downloaded_is_missed(aerial, tmp_path):
    write_flair(tmp_path / "in", mirror=True)
    (tmp_path / "in" / "data" / "train-val" / "D091_2021.zip").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 40 departments of the source are not there .D091_2021"): made(tmp_path / "in", tmp_path / "out")


def test_a_missing_label_archive_is_named(tmp_path):
    source = write_flair(tmp_path / "in")
    (source / "flair_labels_train.zip").unlink()
    with pytest.raises(FileNotFoundError, match="40 of 50 images have no mask"): made(source, tmp_path / "out")


def test_more_scenes_have_other_numbers(tmp_path):
    said = made(write_flair(tmp_path / "in", scenes=2), tmp_path / "out")
    assert [d["scenes"] for d in said["domains"].values()] == [80, 20]
