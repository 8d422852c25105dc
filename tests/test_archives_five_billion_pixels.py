"What the page of Five-Billion-Pixels does not show: every option, every broken copy, archives against folders."
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import rasterio

from spectralmoe.archives import five_billion_pixels as fbp
from spectralmoe.archives.five_billion_pixels import (CITY_SCENES, FBP_BROKEN, FBP_CLASSES, FBP_CROSS_REGION, FBP_CROSS_SENSOR, FBP_TEST,
                                                      write_fbp_cross_region, write_fbp_cross_sensor, write_fbp_scene)
from spectralmoe.archives.fixtures import patchwork
from spectralmoe.archives.recipes import PrepareWarning, list_members, prepare_with
from spectralmoe.reading.manifest import read_manifest, verify_folder

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore:.*published:spectralmoe.archives.recipes.PrepareWarning")]
ONE = {"targets": FBP_TEST[1]}


@pytest.fixture(scope="module")
def region(tmp_path_factory): return write_fbp_cross_region(tmp_path_factory.mktemp("region"))


@pytest.fixture(scope="module")
def sensors(tmp_path_factory): return write_fbp_cross_sensor(tmp_path_factory.mktemp("sensors"), scenes=1)


def made(recipe, there, to, **options):
    "The manifest of a preparation."
    return read_manifest(prepare_with(recipe, there, to, options).parent)


def same(a, b): return a["domains"] == b["domains"] and a["statistics"] == b["statistics"]


def pixels(path):
    with rasterio.open(path) as source: return source.read()


def first(folder, pattern): return next(iter(sorted(folder.rglob(pattern))))


# Five-Billion-Pixels: names

def test_every_known_scene_is_read_by_name():
    for stem in (*FBP_TEST, *(s for stems in CITY_SCENES.values() for s in stems)):
        assert fbp._FBP_NAME.fullmatch(f"{stem}.tif")["stem"] == stem
        assert fbp._FBP_NAME.fullmatch(f"{stem}_dense.tif")["stem"] == stem
    assert fbp._FBP_NAME.fullmatch("GF2_PMS1_L1A0001064454-MSS1.tif") is None  # one underscore


def test_default_targets_are_24_of_the_published_30():
    default = FBP_CROSS_REGION.choose({})["targets"]
    assert default == list(FBP_TEST[:24]) and len(set(default)) == 24


def test_unconfirmed_options_say_so():
    assert "UNCONFIRMED" in FBP_CROSS_REGION.options["targets"].help and "UNCONFIRMED" in FBP_CROSS_SENSOR.options["crop"].help


def test_labels_whose_suffix_was_dropped_are_found(region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    for path in (tmp_path / "in").rglob("*_24label.*"): path.rename(path.with_name(path.name.replace("_24label", "")))
    assert same(made(FBP_CROSS_REGION, region, tmp_path / "a", **ONE), made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "b", **ONE))


def test_cities_beside_do_not_disturb_the_other_task(sensors, tmp_path):
    write_fbp_cross_region(tmp_path / "both")
    shutil.copytree(sensors / "C-megacities", tmp_path / "both" / "C-megacities")
    assert made(FBP_CROSS_REGION, tmp_path / "both", tmp_path / "out", **ONE)["domains"]["gf2_target"]["scenes"] == 1


def test_archive_and_what_was_unpacked_from_it_are_not_both_taken(region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "in" / "again.zip", "w") as z:
        z.write(first(region, "Image__8bit*/*.tif"), f"Image__8bit_NirRGB/{FBP_TEST[0]}.tif")
    with pytest.raises(ValueError, match="is there twice"): made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "out", **ONE)


def test_labels_without_images_are_left_out_with_a_warning(region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    for path in (tmp_path / "in").rglob(f"{FBP_TEST[2]}.tif*"): path.unlink()
    with pytest.warns(UserWarning, match="1 of 3 masks have no image .GF2.* and are left out"):
        said = made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "out", **ONE)
    assert said["domains"]["gf2_source"]["scenes"] == 1 and any("are left out" in w for w in said["warnings"])


# Five-Billion-Pixels: labels, archives, versions

@pytest.mark.parametrize("labels", ["index", "color"])
def test_index_and_colour_labels_give_the_same_tiles(labels, sensors, tmp_path):
    other = write_fbp_cross_sensor(tmp_path / "in", scenes=1, labels=labels)
    a, b = made(FBP_CROSS_SENSOR, sensors, tmp_path / "a"), made(FBP_CROSS_SENSOR, other, tmp_path / "b")
    assert same(a, b) and all(d["off_palette"] == 0 for d in b["domains"].values())


def test_zips_give_what_folders_give_and_twice_is_once(sensors, tmp_path):
    zipped = write_fbp_cross_sensor(tmp_path / "in", scenes=1, zipped=True)
    assert {m.holder.suffix for m in list_members(zipped) if m.path.suffix == ".tif"} == {".zip"}
    a, b = made(FBP_CROSS_SENSOR, sensors, tmp_path / "a"), made(FBP_CROSS_SENSOR, zipped, tmp_path / "b")
    assert same(a, b)
    path = tmp_path / "b" / "fbp_cross_sensor" / "manifest.json"
    before = path.read_bytes()
    assert prepare_with(FBP_CROSS_SENSOR, zipped, tmp_path / "b") == path and path.read_bytes() == before
    prepare_with(FBP_CROSS_SENSOR, zipped, tmp_path / "c", workers=1)
    assert (tmp_path / "c" / "fbp_cross_sensor" / "manifest.json").read_bytes() == before
    assert verify_folder(path.parent) == 2 * 6


def test_sixteen_bits_have_their_own_order_and_lose_the_black_that_reaches_in(tmp_path):
    source = write_fbp_cross_region(tmp_path / "in", scenes=4)
    said = made(FBP_CROSS_REGION, source, tmp_path / "out", version="16bit", **ONE)
    folder = tmp_path / "out" / "fbp_cross_region"
    for k, stem in enumerate(FBP_TEST[:4]):  # black columns at either side: 50, 55, 60, 65
        path = next(folder.rglob(f"images/{stem}.tif"))
        left, right = max(60, 50 + 5 * k), max(40, 50 + 5 * k)
        raw = pixels(source / "Five-Billion-Pixels" / "Image_16bit_BGRNir" / f"{stem}.tiff")
        assert (pixels(path) == raw[:, 54:-54, left:-right]).all() and pixels(path).dtype == "uint16"
        with rasterio.open(path) as tile: assert tile.descriptions == ("blue", "green", "red", "nir")
    nir = said["statistics"]["mean"][said["statistics"]["bands"].index("nir")]
    source8 = made(FBP_CROSS_REGION, source, tmp_path / "eight", **ONE)["statistics"]
    assert nir == pytest.approx(4 * source8["mean"][source8["bands"].index("nir")], rel=.1)


def test_a_version_that_is_not_there_points_at_the_other(region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "Five-Billion-Pixels" / "Image__8bit_NirRGB")
    with pytest.raises(FileNotFoundError, match="3 of the 16bit version"): made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "out", **ONE)


def test_sixteen_bits_beside_cities_of_eight_are_warned_of(sensors, tmp_path):
    with pytest.warns(PrepareWarning, match="another scale"): made(FBP_CROSS_SENSOR, sensors, tmp_path / "out", version="16bit")


@pytest.mark.parametrize("photometric", ["RGB", "MINISBLACK"])
def test_samples_are_read_as_stored_whatever_colours_the_tags_claim(photometric, region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    for path in (tmp_path / "in").rglob("Image__8bit*/*.tif"): fbp._save(path, pixels(f"GTIFF_RAW:{path}"), photometric=photometric)
    a, b = made(FBP_CROSS_REGION, region, tmp_path / "a", **ONE), made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "b", **ONE)
    assert same(a, b) # `region` is tagged CMYK


def test_suffixes_in_upper_case_are_read(region, tmp_path):
    shutil.copytree(region, tmp_path / "in")
    for path in [p for p in (tmp_path / "in").rglob("GF2*.*") if p.suffix in (".tif", ".tiff", ".png")]: path.rename(path.with_suffix(path.suffix.upper()))
    assert same(made(FBP_CROSS_REGION, region, tmp_path / "a", **ONE), made(FBP_CROSS_REGION, tmp_path / "in", tmp_path / "b", **ONE))


# Five-Billion-Pixels: borders and crops

@pytest.mark.parametrize("text", ["60,54,40", "a,b,c,d", "60;54;40;54", "-1,0,0,0"])
def test_a_border_is_four_numbers(text, region, tmp_path):
    with pytest.raises(ValueError, match="left,top,right,bottom"): made(FBP_CROSS_REGION, region, tmp_path / "out", border=text, **ONE)


def test_a_border_that_leaves_nothing_is_refused(region, tmp_path):
    with pytest.raises(RuntimeError, match="expected more than the border"):
        made(FBP_CROSS_REGION, region, tmp_path / "out", border="90,54,90,54", **ONE)


def test_a_border_may_be_kept(region, tmp_path):
    said = made(FBP_CROSS_REGION, region, tmp_path / "out", border="0,0,0,0", **ONE)
    path = first(tmp_path / "out", f"images/{FBP_TEST[1]}.tif")
    assert pixels(path).shape == (4, 180, 172) and (pixels(path)[:, 0] == 255).all()
    assert int(said["domains"]["gf2_target"]["labels"]["0"]) > 180 * 172 - 72 * 72


def test_scenes_whose_border_is_gone_stay_whole(tmp_path, monkeypatch):
    source = write_fbp_cross_region(tmp_path / "in", labels="index")
    for path in [*source.rglob("*.tif"), *source.rglob("*.png")]:
        raw = path.suffix == ".tif"
        inner = pixels(f"GTIFF_RAW:{path}" if raw else path)[:, 54:-54, 60:-40]
        fbp._save(path, inner, **(dict(photometric="CMYK") if raw else {}))
    monkeypatch.setattr(fbp, "WHOLE", (72, 72))
    made(FBP_CROSS_REGION, source, tmp_path / "out", **ONE)
    made(FBP_CROSS_REGION, write_fbp_cross_region(tmp_path / "full"), tmp_path / "full_out", **ONE)
    tiles = sorted((tmp_path / "out").rglob("*.tif"))
    assert len(tiles) == 6
    for path in tiles: assert (pixels(path) == pixels(tmp_path / "full_out" / path.relative_to(tmp_path / "out"))).all()


@pytest.mark.parametrize("crop, shape", [(0, (108, 124)), (1024, (108, 124)), (90, (90, 90)), (110, (108, 110))])
def test_city_crops(crop, shape, sensors, tmp_path):
    said = made(FBP_CROSS_SENSOR, sensors, tmp_path / "out", crop=crop)
    folder = tmp_path / "out" / "fbp_cross_sensor" / "beijing"
    assert pixels(first(folder, "images/*.tif")).shape[1:] == shape
    assert sum(n for v, n in said["domains"]["beijing"]["labels"].items() if v != "0") > .9 * 72 * 72


def test_a_crop_smaller_than_the_annotation_says_so(sensors, tmp_path):
    with pytest.warns(PrepareWarning, match="72 x 72 pixels .* crop=48 leaves some"): said = made(FBP_CROSS_SENSOR, sensors, tmp_path / "out", crop=48)
    assert sum("crop=48 leaves some" in w for w in said["warnings"]) == 5 # an image of every city
    with pytest.raises(ValueError, match="crop=-1; expected 1024"): made(FBP_CROSS_SENSOR, sensors, tmp_path / "x", crop=-1)


def test_the_crop_moves_into_the_image():
    class Mask:
        height, width, shape, name = 40, 40, (40, 40), "mask"
        def read(self, band, window=None):
            ids = np.zeros((40, 40), "uint8")
            ids[30:40, 0:4] = 1
            return ids[window.row_off:window.row_off + window.height]
    class Image:
        shape = (40, 40)
        def read(self, band, window): return np.zeros((1, 40), "uint8")
    layout = fbp.Layout(("nir",), FBP_CLASSES)
    assert fbp.around_labels(16)(Image(), Mask(), layout) == (24, 0, 16, 16)


# Five-Billion-Pixels: targets

def test_targets_may_be_a_text_file(region, tmp_path):
    (tmp_path / "list.txt").write_text(f"# mine\n{FBP_TEST[1]}.tif\n\n{FBP_TEST[2]}_24label.png\n", encoding="utf-8")
    said = made(FBP_CROSS_REGION, region, tmp_path / "out", targets=str(tmp_path / "list.txt"))
    assert said["domains"]["gf2_target"]["scenes"] == 2 and said["domains"]["gf2_source"]["scenes"] == 1
    with pytest.raises(FileNotFoundError, match="no such file"): made(FBP_CROSS_REGION, region, tmp_path / "x", targets="nowhere.txt")
    with pytest.raises(ValueError, match="option targets is empty"): made(FBP_CROSS_REGION, region, tmp_path / "x", targets="")


# Five-Billion-Pixels: what is broken

SAYS = {"truncated": "cut off or damaged", "bands": "has 3 bands, expected 4", "converted": "converted by a plain reader", "label": r"\(30, 20\)",
        "missing_mask": "1 of . images have no mask", "size": "expected the same", "border": "labels reach over rows 0",
        "name": "fit no pattern", "city": "none of the five cities", "unlabelled": "no labelled pixel"}


@pytest.mark.parametrize("broken", FBP_BROKEN)
def test_broken_copies_are_refused(broken, tmp_path):
    source = write_fbp_cross_sensor(tmp_path / "in", scenes=1, broken=broken)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=SAYS[broken]): made(FBP_CROSS_SENSOR, source, tmp_path / "out")
    assert not (tmp_path / "out" / "fbp_cross_sensor" / "manifest.json").exists()


@pytest.mark.parametrize("broken", list(FBP_BROKEN)[:-2])
def test_broken_copies_of_the_other_task_are_refused(broken, tmp_path):
    source = write_fbp_cross_region(tmp_path / "in", broken=broken)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=SAYS[broken]): made(FBP_CROSS_REGION, source, tmp_path / "out", **ONE)


@pytest.mark.parametrize("broken, skip", [("missing_mask", FBP_TEST[0]), ("truncated", FBP_TEST[0]), ("city", "20200102_024714_84_1069_3B_AnalyticMS_SR")])
def test_what_is_skipped_disturbs_nobody(broken, skip, tmp_path):
    source = write_fbp_cross_sensor(tmp_path / "in", scenes=2, broken=broken)
    said = made(FBP_CROSS_SENSOR, source, tmp_path / "out", skip=skip)
    assert said["domains"]["gf2"]["scenes"] == (2 if broken == "city" else 1)


def test_a_missing_city_shows_the_tree(sensors, tmp_path):
    shutil.copytree(sensors / "Five-Billion-Pixels", tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="nothing was found for beijing, guangzhou(.|\n)*C-megacities/"):
        made(FBP_CROSS_SENSOR, tmp_path / "in", tmp_path / "out")


def test_fixtures_refuse_what_they_cannot_write(tmp_path):
    for wrong in (dict(broken="city"), dict(labels="pink"), dict(scenes=31), dict(side=20), dict(labels="color", broken="label")):
        with pytest.raises(ValueError, match="expected|concerns"): write_fbp_cross_region(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
def test_a_scene_is_written_strip_by_strip(compress, tmp_path):
    tracemalloc.start()
    path = write_fbp_scene(tmp_path / "s.tif", 6000, 400, tmp_path / "s.png", compress)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 6000 * 400 / 2  # half of the samples; a strip needs about a quarter
    raw, ids = pixels(f"GTIFF_RAW:{path}"), pixels(tmp_path / "s.png")[0]
    assert raw.shape == (4, 6000, 400) and ids.shape == (6000, 400) and not (tmp_path / "s.label.tif").exists()
    inside = np.zeros(ids.shape, bool)
    inside[54:-54, 60:-40] = True
    assert (raw[:, ~inside] == 255).all() and raw[:, inside].max() < 255 and not ids[~inside].any()
    assert (ids[54:-54, 60:-40] == patchwork(range(6000 - 108), 300, 25, 300, 0)).all()
    with rasterio.open(path) as plain: assert plain.tags(ns="IMAGE_STRUCTURE")["SOURCE_COLOR_SPACE"] == "CMYK"
