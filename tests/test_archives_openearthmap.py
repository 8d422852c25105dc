"OpenEarthMap: regions, continents, xBD, damage."
import shutil
import warnings

import pytest

from spectralmoe.archives.openearthmap import OPENEARTHMAP, OPENEARTHMAP_BROKEN, write_openearthmap
from spectralmoe.archives.recipes import PrepareWarning, prepare_with
from spectralmoe.reading.manifest import read_manifest

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore:.*(published|part of xBD):spectralmoe.archives.recipes.PrepareWarning")]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A small copy, not to be changed."
    return write_openearthmap(tmp_path_factory.mktemp("in"), side=64)


def made(source, to, **options):
    "Domains of a preparation."
    return read_manifest(prepare_with(OPENEARTHMAP, source, to, {"compress": "none", **options}, workers=1).parent)["domains"]


def unpack(source, to):
    "Every zip into a folder of its own."
    for path in sorted(source.glob("*.zip")): shutil.unpack_archive(path, to / path.stem)
    return to


@pytest.mark.parametrize("broken, error, message", [
    ("truncated", ValueError, "OpenEarthMap.zip.*get it again"),
    ("bands", RuntimeError, "1 bands, expected 3"),
    ("label", RuntimeError, r"\[\(9, 1\)\]"),
    ("missing_mask", FileNotFoundError, "images have no mask .accra_1"),
    ("missing_image", FileNotFoundError, "masks have no image .accra_1"),
    ("region", ValueError, "atlantis.*expected of the 97.*regions=PATH"),
    ("name", ValueError, "tonga_9.tif.*expected REGION/images"),
    ("size", RuntimeError, "expected the same")])
def test_damage_is_refused(broken, error, message, tmp_path):
    with pytest.raises(error, match=message): made(write_openearthmap(tmp_path / "in", side=64, broken=broken), tmp_path / "to")
    assert not list(tmp_path.rglob("manifest.json"))
    assert OPENEARTHMAP_BROKEN.keys() == {"truncated", "bands", "label", "missing_mask", "missing_image", "region", "name", "size"}


@pytest.mark.parametrize("broken, skip, left", [("size", "accra_1", 6)])
def test_what_is_damaged_can_be_skipped(broken, skip, left, tmp_path):
    source = write_openearthmap(tmp_path / "in", side=64, broken=broken)
    assert sum(d["scenes"] for d in made(source, tmp_path / "to", skip=skip).values()) == left


def test_own_regions(archives, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("region,continent\n" + "".join(f"{r},{'here' if r < 'b' else 'there'}\n" for r in
                   ("accra", "al_qurnah", "austin", "buenos_aires", "khartoum", "kujawsko-pomorskie", "tonga")), encoding="utf-8")
    got = made(archives, tmp_path / "to", regions=str(own), target_continents="there")
    assert {d: s["scenes"] for d, s in got.items()} == {"source_continents": 3, "target_continents": 4}
    with pytest.raises(ValueError, match="Africa, Europe not known; expected of here, there"):
        made(archives, tmp_path / "no", regions=str(own))


@pytest.mark.parametrize("continents, scenes", [("Africa", (5, 2)), ("Asia,Oceania", (5, 2)), (["South America"], (6, 1))])
def test_continents(continents, scenes, archives, tmp_path):
    got = made(archives, tmp_path, target_continents=continents)
    assert tuple(s["scenes"] for s in got.values()) == scenes


def test_xbd_labels_are_counted_and_come_in_with_their_images(archives, tmp_path):
    with pytest.warns(PrepareWarning, match="1 labels in 1 regions are left out"):
        before = made(archives, tmp_path / "a")
    source = unpack(archives, tmp_path / "in")
    top = source / "OpenEarthMap/OpenEarthMap/OpenEarthMap_wo_xBD"
    (top / "les_cayes/images").mkdir()
    shutil.copy(top / "tonga/images/tonga_1.tif", top / "les_cayes/images/les_cayes_7.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*published")
        after = made(source, tmp_path / "b")
    assert after["source_continents"]["scenes"] == before["source_continents"]["scenes"] + 1
    (top / "xbd_files.csv").unlink()
    (top / "les_cayes/images/les_cayes_7.tif").unlink()
    with pytest.raises(FileNotFoundError, match="no image .les_cayes_7"): made(source, tmp_path / "c")


def test_test_images_are_excused_by_the_list_alone(archives, tmp_path):
    source = unpack(archives, tmp_path / "in")
    made(source, tmp_path / "with")
    assert not list((tmp_path / "with").rglob("images/*_2.tif"))
    next(source.rglob("test.txt")).unlink()
    with pytest.raises(FileNotFoundError, match="7 of 14 images have no mask .accra_2, al_qurnah_2"):
        made(source, tmp_path / "to")


def test_pictures_of_odd_sizes(tmp_path):
    source = write_openearthmap(tmp_path / "in", side=150)
    got = made(source, tmp_path, tile=100)
    assert got["target_continents"]["tiles"] == 4 + 1 + 4  # khartoum is 93 pixels wide
