"LoveDA: splits, strays, damage."
import shutil

import pytest

from spectralmoe.archives.loveda import LOVEDA, LOVEDA_BROKEN, write_loveda
from spectralmoe.archives.recipes import prepare_with
from spectralmoe.reading.manifest import read_manifest

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore:.*(published|part of xBD):spectralmoe.archives.recipes.PrepareWarning")]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A small copy, not to be changed."
    return write_loveda(tmp_path_factory.mktemp("in"), side=64)


def made(source, to, **options):
    "Domains of a preparation."
    return read_manifest(prepare_with(LOVEDA, source, to, {"compress": "none", **options}, workers=1).parent)["domains"]


def unpack(source, to):
    "Every zip into a folder of its own."
    for path in sorted(source.glob("*.zip")): shutil.unpack_archive(path, to / path.stem)
    return to


@pytest.mark.parametrize("broken, error, message", [
    ("truncated", ValueError, "Val.zip.*get it again"),
    ("bands", RuntimeError, "4 bands, expected 3"),
    ("label", RuntimeError, r"\[\(8, 1\)\]"),
    ("missing_mask", FileNotFoundError, "LoveDA Train/Rural: 1 of 1 images have no mask"),
    ("name", ValueError, r"1 files fit no pattern \(Train.zip:Train/Rural/images_png/0 \(copy\).png\)"),
    ("split", FileNotFoundError, "Val/Rural.*get Val.zip")])
def test_damage_is_refused(broken, error, message, tmp_path):
    with pytest.raises(error, match=message): made(write_loveda(tmp_path / "in", side=64, broken=broken), tmp_path / "to")
    assert not list(tmp_path.rglob("manifest.json"))
    assert LOVEDA_BROKEN.keys() == {"truncated", "bands", "label", "missing_mask", "name", "split"}


@pytest.mark.parametrize("broken, skip, left", [("missing_mask", "train_0", 3), ("label", "train_0", 3)])
def test_what_is_damaged_can_be_skipped(broken, skip, left, tmp_path):
    source = write_loveda(tmp_path / "in", side=64, broken=broken)
    assert sum(d["scenes"] for d in made(source, tmp_path / "to", skip=skip).values()) == left


def test_loveda_splits(archives, tmp_path):
    some = made(archives, tmp_path, source_splits="train", target_splits="val")
    assert {d: s["scenes"] for d, s in some.items()} == {"rural": 1, "urban": 1}
    assert {p.name for p in (tmp_path / "loveda").glob("*/images/*")} == {"train_0.tif", "val_3514.tif"}
    assert made(archives, tmp_path / "twice", source_splits="train,train", target_splits="val") == some
    for options, message in ((dict(source_splits="test"), "expected of train, val"), (dict(source_splits=""), "source_splits is empty")):
        with pytest.raises(ValueError, match=message): made(archives, tmp_path / "to", **options)


def test_loveda_train_alone_is_enough_where_nothing_else_is_asked_for(archives, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(archives / "Train.zip", tmp_path / "in")
    assert made(tmp_path / "in", tmp_path, source_splits="train", target_splits="train")["urban"]["scenes"] == 1
    with pytest.raises(FileNotFoundError, match="target_splits is train,val; get Val.zip"):
        made(tmp_path / "in", tmp_path / "to", source_splits="train")


def test_loveda_masks_without_images(archives, tmp_path):
    source = unpack(archives, tmp_path / "in")
    (source / "Train/Train/Urban/images_png/1366.png").rename(source / "Train/Train/Urban/images_png/7.png")
    with pytest.raises(FileNotFoundError, match="images have no mask .train_7., 1 of 1 masks have no image .train_1366.; get the label and the image archive"):
        made(source, tmp_path / "to")


def test_strays_are_no_pictures(archives, tmp_path):
    source = unpack(archives, tmp_path / "in")
    for name in ("Thumbs.db", "readme.txt"): (source / "Train/Train/Urban/images_png" / name).write_text("stray")
    assert made(source, tmp_path / "to")["urban"]["scenes"] == 2
