"Potsdam and Vaihingen: both kinds of labels, areas, order of bands, damage."
import json
import shutil
import zipfile

import pytest
import rasterio

from spectralmoe.archives.isprs import ISPRS_BROKEN, POTSDAM_VAIHINGEN, write_potsdam_vaihingen
from spectralmoe.archives.recipes import prepare_with
from spectralmoe.benchmarks import benchmark
from spectralmoe.reading.manifest import read_manifest

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore:.*(published|part of xBD):spectralmoe.archives.recipes.PrepareWarning")]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A small copy, not to be changed."
    return write_potsdam_vaihingen(tmp_path_factory.mktemp("in"), side=64)


def made(source, to, **options):
    "Domains of a preparation."
    return read_manifest(prepare_with(POTSDAM_VAIHINGEN, source, to, {"compress": "none", **options}, workers=1).parent)["domains"]


def unpack(source, to):
    "Every zip into a folder of its own."
    for path in sorted(source.glob("*.zip")): shutil.unpack_archive(path, to / path.stem)
    return to


@pytest.mark.parametrize("broken, error, message", [
    ("truncated", ValueError, "2_Ortho_RGB.zip.*get it again"),
    ("bands", RuntimeError, "4 bands, expected 3"),
    ("label", RuntimeError, "colours that are in no table"),
    ("missing_mask", FileNotFoundError, "Vaihingen: 1 of 3 .*area1.*eroded_COMPLETE.zip"),
    ("participants", FileNotFoundError, "3 of 3 .*5_Labels_all_noBoundary.zip.*only the part given to participants"),
    ("area", ValueError, "Potsdam: 9_9 is no area")])
def test_damage_is_refused(broken, error, message, tmp_path):
    with pytest.raises(error, match=message): made(write_potsdam_vaihingen(tmp_path / "in", side=64, broken=broken), tmp_path / "to")
    assert not list(tmp_path.rglob("manifest.json"))
    assert ISPRS_BROKEN.keys() == {"truncated", "bands", "label", "missing_mask", "participants", "area"}


@pytest.mark.parametrize("broken, skip, left", [("missing_mask", "area1", 5), ("label", "2_10", 5)])
def test_what_is_damaged_can_be_skipped(broken, skip, left, tmp_path):
    source = write_potsdam_vaihingen(tmp_path / "in", side=64, broken=broken)
    assert sum(d["scenes"] for d in made(source, tmp_path / "to", skip=skip).values()) == left


def test_nothing_is_left_of_the_source(tmp_path):
    source = write_potsdam_vaihingen(tmp_path / "in", side=64)
    with pytest.raises(FileNotFoundError, match="nothing was found for potsdam"): made(source, tmp_path / "to", skip="2_10,2_13,7_10")


def test_full_labels_have_no_border(archives, tmp_path):
    full = made(archives, tmp_path / "full", labels="full")
    eroded = made(archives, tmp_path / "eroded")
    for city in full:
        assert full[city]["off_palette"] == full[city]["labels"]["0"] == 4 * 3
        assert eroded[city]["off_palette"] == 0 and eroded[city]["labels"]["0"] > 100
    ids = {}
    for kind in ("full", "eroded"):
        with rasterio.open(tmp_path / kind / "potsdam_vaihingen/potsdam/masks/2_10.tif") as mask: ids[kind] = mask.read()
    both = (ids["full"] > 0) & (ids["eroded"] > 0)
    assert both.any() and (ids["full"] == ids["eroded"])[both].all()


@pytest.mark.parametrize("target, areas", [("all", {"area1", "area2", "area3"}), ("val", {"area2"})])
def test_target_areas(target, areas, archives, tmp_path):
    made(archives, tmp_path, target_areas=target)
    assert {p.stem for p in (tmp_path / "potsdam_vaihingen/vaihingen/images").iterdir()} == areas


def test_labels_of_each_kind_can_be_missing(archives, tmp_path):
    source = shutil.copytree(archives, tmp_path / "in")
    (source / "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE.zip").unlink()
    with pytest.raises(FileNotFoundError, match="Vaihingen: 3 of 3 .*labels=eroded.*eroded_COMPLETE.zip, or choose the other"):
        made(source, tmp_path / "to")
    assert made(source, tmp_path / "to", labels="full")["vaihingen"]["scenes"] == 3
    (source / "2_Ortho_RGB.zip").unlink()
    with pytest.raises(FileNotFoundError, match="Potsdam: no image .only RGBIR, label, mask.; get 2_Ortho_RGB.zip"):
        made(source, tmp_path / "no")


def test_labels_inside_a_folder_of_their_archive(archives, tmp_path):
    source = shutil.copytree(archives, tmp_path / "in")
    path = source / "5_Labels_all_noBoundary.zip"
    with zipfile.ZipFile(path) as z: inside = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, data in inside.items(): z.writestr(f"5_Labels_all_noBoundary/{name}", data)
    assert made(source, tmp_path / "a") == made(archives, tmp_path / "b")


def test_a_renamed_image_is_named(archives, tmp_path):
    source = unpack(archives, tmp_path / "in")
    path = next(source.rglob("top_potsdam_7_10_RGB.tif"))
    path.rename(path.with_name("top_potsdam_07_10_rgb.tif"))
    with pytest.raises(ValueError, match="top_potsdam_07_10_rgb.tif.*expected top_potsdam_2_10_RGB.tif"):
        made(source, tmp_path / "to")


def test_vaihingen_is_fed_near_infrared_first(archives, tmp_path):
    from spectralmoe.datasets import SegmentationTiles
    made(archives, tmp_path)
    for protocol, order in (("default", [0, 1, 2]), ("authors", [2, 1, 0])):
        task = benchmark("real_potsdam_vaihingen", protocol).at(tmp_path)
        tiles = SegmentationTiles.from_domain(task.targets[0], task, role="target")
        with zipfile.ZipFile(archives / "ISPRS_semantic_labeling_Vaihingen.zip") as z:
            data = z.read("top/top_mosaic_09cm_area1.tif")
        with rasterio.MemoryFile(data) as memory, memory.open() as source: stored = source.read()
        assert (tiles[0]["image"].numpy() == stored[order]).all()


def test_manifest_is_plain_json(archives, tmp_path):
    path = prepare_with(POTSDAM_VAIHINGEN, archives, tmp_path, {"skip": "7_10"}, workers=1)
    said = json.loads(path.read_text(encoding="utf-8"))
    assert said["plan"]["options"]["skip"] == ["7_10"] and said["domains"]["potsdam"]["scenes"] == 2
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
