"Reading files of other people: every kind of TIFF, names as file systems write them, memory, what is warned about and what refused."
import struct
import subprocess
import sys
import textwrap
import unicodedata
import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp as CI

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.datasets import SegmentationTiles
from spectralmoe.reading.listing import list_files
from spectralmoe.reading.masks import count_labels, read_mask, to_classes
from spectralmoe.reading.rasters import check_header, look_at_image, open_raster, read_header, read_image, stream_image

RGB = ("red", "green", "blue")
RNG = np.random.default_rng(0)


def write(path, pixels, names=(), interp=None, scales=None, offsets=None, tags=(), driver="GTiff", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver=driver, count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype, **how) as out:
            out.write(pixels)
            if interp: out.colorinterp = interp
            if scales: out.scales = scales
            if offsets: out.offsets = offsets
            for i, name in enumerate(names, 1):
                if name: out.set_band_description(i, name)
            for i, tag in enumerate(tags, 1): out.update_tags(i, **tag)
    return path


def noise(bands=3, side=32, dtype="uint8", low=1, high=200): return RNG.integers(low, high, (bands, side, side)).astype(dtype)


def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in found]


# ---- band order

ORDERED = np.stack([np.full((8, 8), v, "uint16") for v in (10, 20, 30, 40)])


@pytest.mark.parametrize("names, red", [
    (["Red band", "Green band", "Blue band", "NIR band"], 10), (["B3 (660 nm)", "B2 (555 nm)", "B1 (485 nm)", "B4 (830 nm)"], 10),
    (["Band 4 - NIR", "Band 3 - Red", "Band 2 - Green", "Band 1 - Blue"], 20), (["485 nm", "555 nm", "660 nm", "830 nm"], 30),
    (["SR_B1", "SR_B2", "SR_B3", "SR_B4"], 30), (["Layer_1", "Layer_2", "Layer_3", "Layer_4"], 30), (["blue", None, None, None], 30)])
def test_descriptions_give_the_order(tmp_path, names, red):
    path = write(tmp_path / "a.tif", ORDERED, names)
    assert not warned(lambda: read_image(path, SENSORS["gf2"], ["red"]))
    assert read_image(path, SENSORS["gf2"], ["red"]).image[0, 0, 0] == red


@pytest.mark.parametrize("names", [["red", "green", None, "nir"], ["B3", None, "B1", "B4"], [None, None, "485 nm", None], ["B1 (660 nm)", None, None, None],
                                   ["SWIR 1", None, None, None], ["B1", "B2", "B3", "haze"], ["red", "red", "green", "blue"]])
def test_descriptions_that_contradict_the_sensor_are_refused_with_file_and_remedy(tmp_path, names):
    path = write(tmp_path / "odd.tif", ORDERED, names)
    with pytest.raises(ValueError, match="odd.tif.*csv column `bands`"): read_image(path, SENSORS["gf2"], ["red"])


def test_words_that_say_nothing_are_warned_about(tmp_path):
    path = write(tmp_path / "pc.tif", ORDERED, ["PC1", "PC2", "PC3", "PC4"])
    (said,) = warned(lambda: read_image(path, SENSORS["gf2"], ["red"]))
    assert "pc.tif: band descriptions 'PC1', 'PC2', 'PC3', 'PC4' cannot be understood" in said
    assert not warned(lambda: read_image(path, SENSORS["gf2"], ["red"], quiet=True))
    assert not warned(lambda: read_image(path, SENSORS["gf2"], ["red"], given=["B1", "B2", "B3", "B4"]))
    named = write(tmp_path / "named.tif", ORDERED, ["nir", "red", "green", "blue"])
    (said,) = warned(lambda: read_image(named, SENSORS["gf2"], ["red"], given=["B1", "B2", "B3", "B4"]))
    assert "band 1 is described as 'nir' and named 'B1'" in said


@pytest.mark.parametrize("tag", [lambda um: dict(wavelength=f"{1000 * um:.1f}", wavelength_units="Nanometers"), lambda um: dict(CENTRAL_WAVELENGTH_UM=f"{um:.3f}"),
                                 lambda um: dict(WAVELENGTH=f"{um:.3f}")])
def test_wavelength_tags_give_the_order(tmp_path, tag):
    path = write(tmp_path / "a.tif", ORDERED, tags=[tag(um) for um in (0.83, 0.66, 0.555, 0.485)])
    assert read_image(path, SENSORS["gf2"], ["red"]).image[0, 0, 0] == 20
    path = write(tmp_path / "b.tif", ORDERED, tags=[tag(0.83)])
    with pytest.raises(ValueError, match="b.tif contradicts sensor 'gf2'"): check_header(path, SENSORS["gf2"], ["red"])


@pytest.mark.parametrize("dtype, interp, sensor, found", [
    ("uint8", [CI.red, CI.green, CI.blue], "bgr", "warned"), ("uint16", [CI.red, CI.green, CI.blue], "bgr", "refused"), ("uint16", [CI.blue, CI.green, CI.red], "bgr", "silent"),
    ("uint8", [CI.blue, CI.green, CI.red], "aerial_rgb", "refused"), ("uint8", [CI.red, CI.green, CI.blue], "aerial_irrg", "silent"),
    ("uint16", [CI.gray, CI.undefined, CI.undefined], "bgr", "silent"), ("uint16", [CI.nir, CI.undefined, CI.undefined], "bgr", "refused")])
def test_colour_interpretation_is_evidence(tmp_path, dtype, interp, sensor, found):
    rgb = SENSORS["aerial_rgb"]
    sensor = rgb.select(["blue", "green", "red"]) if sensor == "bgr" else SENSORS[sensor]
    path = write(tmp_path / "a.tif", noise(dtype=dtype), interp=interp)
    look = lambda: read_image(path, sensor, ["red"])
    if found == "refused":
        with pytest.raises(ValueError, match="colour interpretation contradicts"): look()
    else: assert len(warned(look)) == (found == "warned")


# ---- alpha

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("at", range(5))
def test_alpha_is_transparency_wherever_it_stands(tmp_path, dtype, at):
    pixels, colours = noise(4, dtype=dtype), [CI.red, CI.green, CI.blue, CI.undefined]
    alpha = np.full((1, 32, 32), 1 if dtype == "float32" else np.iinfo(dtype).max, dtype)
    alpha[0, :4] = 0
    path = write(tmp_path / "a.tif", np.insert(pixels, at, alpha, 0), interp=[*colours[:at], CI.alpha, *colours[at:]])
    image = read_image(path, SENSORS["aerial_rgbn"], [*RGB, "nir"]).image
    assert np.isnan(image[:, :4]).all() and np.array_equal(image[:, 4:], pixels[:, 4:].astype("float32"))
    assert np.array_equal(read_image(path, SENSORS["aerial_rgbn"], ["nir"], window=(4, 0, 8, 32)).image[0], pixels[3, 4:12].astype("float32"))


def test_transparency_taken_for_near_infrared_is_found_by_its_values(tmp_path):
    pixels = noise(4)
    assert not warned(lambda: read_image(write(tmp_path / "nir.tif", pixels), SENSORS["aerial_rgbn"], ["nir"]))
    pixels[3] = 255
    path = write(tmp_path / "alpha.tif", pixels)
    (said,) = warned(lambda: read_image(path, SENSORS["aerial_rgbn"], ["nir"]))
    assert "alpha.tif: band 4 is flagged as alpha and holds 255 only" in said
    assert look_at_image(path, SENSORS["aerial_rgbn"], RGB).doubts


@pytest.mark.parametrize("how", [dict(), dict(compress="lzw", tiled=True, blockxsize=16, blockysize=16), dict(interleave="band")])
def test_cmyk_tags_change_no_number(tmp_path, how):
    pixels = noise(4)
    path = write(tmp_path / "a.tif", pixels, photometric="CMYK", transform=(10, 0, 5e5, 0, -10, 4e6), crs="EPSG:32631", **how)
    found = read_image(path, SENSORS["gf2"], ["B1", "B2", "B3", "B4"])
    assert np.array_equal(found.image, pixels.astype("float32")) and found.transform[2] == 5e5 and found.crs == "EPSG:32631"
    Image.fromarray(np.moveaxis(pixels, 0, -1), "CMYK").save(tmp_path / "pil.tif")
    assert np.array_equal(read_image(tmp_path / "pil.tif", SENSORS["gf2"], ["B4"]).image[0], pixels[3].astype("float32"))


# ---- units, turned images, fill

def test_scale_and_offset_tags_that_differ_from_the_sensor_are_warned_about(tmp_path):
    s2, pixels = SENSORS["sentinel2"], noise(3, dtype="uint16")
    path = write(tmp_path / "a.tif", pixels, ["B4", "B3", "B2"], scales=[1e-4] * 3, offsets=[-0.1] * 3)
    (said,) = warned(lambda: read_image(path, s2, RGB))
    assert "the file says physical value = DN * 0.0001 + -0.1, sensor 'sentinel2' says DN * 0.0001 + 0" in said and "sensor.rescale(0.0001, -0.1)" in said
    assert not warned(lambda: read_image(path, s2.rescale(1e-4, -0.1), RGB))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("turned", [1, 6])
def test_exif_orientation_is_warned_about_and_not_applied(tmp_path, suffix, turned):
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[274] = turned
    Image.fromarray(np.moveaxis(noise(3), 0, -1)[:20]).save(path, exif=exif)
    said = warned(lambda: read_image(path, SENSORS["aerial_rgb"], RGB))
    assert len(said) == (turned != 1) and all("orientation 6" in s for s in said)
    assert read_image(path, SENSORS["aerial_rgb"], RGB, quiet=True).image.shape == (3, 20, 32)


@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True), (">", True)])
def test_orientation_of_any_tiff(tmp_path, order, big):
    path = write(tmp_path / "a.tif", noise(), BIGTIFF="YES" if big else "NO", ENDIANNESS="LITTLE" if order == "<" else "BIG", photometric="RGB")
    assert not read_header(path, SENSORS["aerial_rgb"], RGB).doubts
    raw = bytearray(path.read_bytes())
    old = raw.find(struct.pack(f"{order}HH", 284, 3)) # planar configuration is there in every file; its tag becomes 274
    raw[old:old + 2] = struct.pack(f"{order}H", 274)
    value = old + (12 if big else 8)
    raw[value:value + 2] = struct.pack(f"{order}H", 3)
    from spectralmoe.reading.rasters import _exif
    path.write_bytes(raw)
    assert _exif(path) == 3


@pytest.mark.parametrize("dtype, fill, count", [("int16", -9999, 900), ("int16", -32768, 1), ("uint16", 65535, 300), ("float32", 1e20, 7), ("float32", 1e38, 1),
                                                ("float32", -3.4028235e38, 40), ("float64", -9999, 3)])
def test_undeclared_fill_is_counted_by_file_and_value(tmp_path, dtype, fill, count):
    pixels = RNG.normal(1500, 300, (3, 200, 210)).astype(dtype)
    pixels[1].flat[:count] = fill
    path = write(tmp_path / "a.tif", pixels, ["B4", "B3", "B2"], tiled=True, blockxsize=64, blockysize=64)
    (said,) = look_at_image(path, SENSORS["sentinel2"], RGB).doubts
    assert f"band B3 has {count} pixels of {np.dtype(dtype).type(fill).item():.6g}" in said
    path = write(tmp_path / "b.tif", pixels, ["B4", "B3", "B2"], nodata=float(np.dtype(dtype).type(fill)))
    found = look_at_image(path, SENSORS["sentinel2"], RGB)
    assert not found.doubts and found.lost == {"B4": 0, "B3": count, "B2": 0} and found.valid == 200 * 210 - count


def test_bands_without_any_value_are_named(tmp_path):
    pixels = RNG.integers(100, 3000, (40, 60, 60)).astype("int16")
    pixels[[3, 17, 30]] = -9999
    sensor = Sensor("hyper", [Band(f"h{i}", 0.4 + i / 50, 0.01) for i in range(40)], nodata=-9999)
    found = look_at_image(write(tmp_path / "a.tif", pixels), sensor, sensor.names)
    assert found.empty == ("h3", "h17", "h30") and found.valid == 0 and "bands h3, h17, h30 are nodata everywhere" in found.doubts


# ---- damaged files

def damaged(folder, kind):
    path = folder / f"bad.{ {'jpg': 'jpg', 'png': 'png', 'vrt': 'vrt'}.get(kind, 'tif')}"
    if kind == "vrt":
        write(folder / "part.tif", noise(side=128), compress="deflate")
        path.write_text("".join(["<VRTDataset rasterXSize='128' rasterYSize='128'>", *(
            f"<VRTRasterBand dataType='Byte' band='{b}'><SimpleSource><SourceFilename relativeToVRT='1'>part.tif</SourceFilename>"
            f"<SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>" for b in (1, 2, 3)), "</VRTDataset>"]))
        (folder / "part.tif").write_bytes((folder / "part.tif").read_bytes()[:20_000])
    else:
        write(path, noise(side=128), driver=dict(jpg="JPEG", png="PNG").get(kind, "GTiff"), **(dict(compress="deflate") if kind == "tif" else {}))
        path.write_bytes(path.read_bytes()[:{"empty": 0, "header": 40}.get(kind, path.stat().st_size // 2)])
    return path


@pytest.mark.parametrize("kind", ["tif", "plain", "jpg", "png", "vrt", "empty", "header"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(OSError, match=path.name) as error: read_image(path, SENSORS["aerial_rgb"], RGB)
    assert kind != "vrt" or "part.tif" in str(error.value)
    with pytest.raises(OSError, match=path.name): read_mask(path)
    with pytest.raises(OSError, match=path.name): count_labels(path)


# ---- masks

def test_255_is_a_class_for_who_lists_it_and_nan_is_nothing(tmp_path):
    write(tmp_path / "images/a.tif", noise())
    label = RNG.choice([0, 255], (1, 32, 32)).astype("float32")
    label[0, :3] = np.nan
    write(tmp_path / "masks/a.tif", label)
    own = SegmentationTiles(tmp_path / "images", tmp_path / "masks", label_map={0: 0, 255: 1}, classes=["ground", "house"], sensor="aerial_rgb")
    table = own.label_counts()
    assert table["value"].tolist() == ["NaN", "0", "255"] and table["class"].tolist() == ["ignored", "ground", "house"]
    assert (own[0]["label"][:3] == 255).all() and own[0]["label"][3:].tolist() == (label[0, 3:] == 255).astype(int).tolist()


def test_label_values_above_255(tmp_path):
    values = np.arange(1000, 1009, dtype="uint16").reshape(1, 3, 3)
    path = write(tmp_path / "a.tif", values)
    assert to_classes(read_mask(path), {v: v - 1000 for v in range(1000, 1009)}, path).tolist() == (values[0] - 1000).tolist()
    assert count_labels(path) == {v: 1 for v in range(1000, 1009)}


MEASURE = """
import resource, sys
from spectralmoe.bands import SENSORS
from spectralmoe.reading.masks import count_labels
from spectralmoe.reading.rasters import look_at_image, stream_image
mask, image = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # MiB
small = look_at_image(image + ".small.tif", SENSORS["aerial_rgb"], ["R"]) # loads what there is to load
start = peak()
assert sum(count_labels(mask).values()) == 6000 * 6000
one = peak() - start
look_at_image(image, SENSORS["aerial_rgb"], ["R", "G", "B"])
for part in stream_image(image, SENSORS["aerial_rgb"], ["R", "G", "B"]): pass
print(one, peak() - start)
"""


def test_looking_at_a_scene_takes_the_memory_of_a_window(tmp_path):
    sparse = dict(tiled=True, blockxsize=512, blockysize=512, SPARSE_OK="TRUE", compress="deflate")
    for name, bands in (("mask", 1), ("image", 3)):
        with rasterio.open(tmp_path / f"{name}.tif", "w", driver="GTiff", count=bands, height=6000, width=6000, dtype="uint8", transform=(1, 0, 9, 0, -1, 9), **sparse): pass
    write(tmp_path / "image.tif.small.tif", noise())
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "mask.tif", tmp_path / "image.tif"], capture_output=True, text=True,
                         env={"GDAL_CACHEMAX": "32", **__import__("os").environ})
    assert run.returncode == 0, run.stderr
    mask, image = map(float, run.stdout.split())
    assert mask < 150 and image < 400, f"{mask:.0f} MiB for a mask of 34, {image:.0f} for an image of 103; 10 to 20 times as much when read whole"


def test_windows_of_one_giant_block(tmp_path):
    pixels = noise(1, 700)
    path = write(tmp_path / "a.tif", pixels, blockysize=700, compress="deflate")
    with open_raster(path) as source: assert source.block_shapes == [(700, 700)]
    parts = list(stream_image(path, SENSORS["aerial_rgb"].select(["R"]), ["R"], values=70_000))
    assert len(parts) == 7 and np.array_equal(np.concatenate([p.image for p in parts], 1)[0], pixels[0])


# ---- names and lists

@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        for kind in ("images", "masks"): (tmp_path / kind).mkdir(exist_ok=True), (tmp_path / kind / f"{name}.tif").write_bytes(b"x")
    return tmp_path


def listed(folder, rows, where=None, name="i.csv", encoding="utf-8"):
    (folder / name).write_bytes(rows.encode(encoding))
    return list_files(folder / "images", folder / "masks", folder / name, where)


@pytest.mark.parametrize("rows, about", [
    ("image,mask\n2019/a.tif,a.tif\n2020/a.tif,b.tif\n", "no '2019/a.tif', '2020/a.tif' in"), ("image,mask\na.tif,version2/a.tif\n", "no 'version2/a.tif' in"),
    ("image\na.tif\na\n", "a.tif' is used 2 times"), ("image\na.tif\n/elsewhere/b.tif\n", "no '/elsewhere/b.tif' in"), ("image,note\n,x\n", "no '' in"),
    ("name\na.tif\n", "no column 'image'"), ("image\n", "a header and no rows"), ("image,mask\na.tif\n", "line 2")])
def test_a_row_means_one_file_or_none(folders, rows, about):
    with pytest.raises((ValueError, FileNotFoundError)) as error: listed(folders, rows)
    assert about in str(error.value) and len(str(error.value)) < 900


def test_one_mask_for_two_images_is_said(folders):
    assert "b.tif: is that meant?" in warned(lambda: listed(folders, "image,mask\na.tif,a.tif\nb.tif,a.tif\n"))[0]
    (folders / "images" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="name 'a' is used 2 times"): list_files(folders / "images", folders / "masks")
    with pytest.raises(ValueError, match="'a' can be .*a.jpg, .*a.tif"): list_files(folders / "images", folders / "masks", ["a"])


def test_a_path_in_a_csv_may_start_at_the_csv_or_repeat_the_folder(folders):
    for path in ("images/a.tif", f"{folders.name}/images/a.tif", str(folders / "images" / "a.tif"), "a"):
        (file,) = listed(folders, f"image\n{path}\n")
        assert file.image == folders / "images" / "a.tif" and file.name == "a" and file.mask == folders / "masks" / "a.tif"


def test_equal_names_in_two_folders_are_two_images(tmp_path):
    for city in ("rome", "oslo"):
        for kind in ("images", "masks"): (tmp_path / city / kind).mkdir(parents=True), (tmp_path / city / kind / "1.tif").write_bytes(b"x")
    (tmp_path / "i.csv").write_text("image,mask\nrome/images/1.tif,rome/masks/1.tif\noslo/images/1.tif,oslo/masks/1.tif\n")
    files = list_files(tmp_path / "rome/images", tmp_path / "rome/masks", tmp_path / "i.csv")
    assert [f.mask.parent.parent.name for f in files] == ["rome", "oslo"] and len({f.name for f in files}) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["i.csv", "I.CSV", "names.txt"])
def test_lists_in_any_encoding(folders, encoding, name):
    (folders / "images" / "Zürich.tif").write_bytes(b"x"), (folders / "masks" / "Zürich.tif").write_bytes(b"x")
    head = "" if name.endswith("txt") else "image \n"
    assert [f.name for f in listed(folders, f"{head}a.tif\n\nZürich\n", None, name, encoding)] == ["a", "Zürich"]


@pytest.mark.parametrize("where, names", [({"fold": 1}, ["b"]), ({"fold": "1"}, ["b"]), ({"fold": 1.0}, ["b"]), ({"fold": (0, 1)}, ["a", "b"]), ({"use": True}, ["a"]), ({"use": False}, ["b"])])
def test_where_compares_numbers_and_truth_values_with_text(folders, where, names):
    assert [f.name for f in listed(folders, "image, fold,use\na.tif, 0,TRUE\nb.tif,1,no\n", where)] == names


def test_where_that_matches_nothing_lists_what_there_is(folders):
    with pytest.raises(ValueError, match=r"no row left with fold = 5.*column 'fold' holds '0', '1'"): listed(folders, "image,fold\na,0\nb,1\n", {"fold": 5})
    with pytest.raises(ValueError, match="Did you mean 'fold'"): listed(folders, "image,fold\na,0\nb,1\n", {"flod": 0})
    with pytest.raises(ValueError, match="and 90 more") as error: listed(folders, "image,id\n" + "".join(f"x{i},{i}\n" for i in range(100)), {"id": "none"})
    assert len(str(error.value)) < 500


def test_names_as_file_systems_write_them(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Orléans") for form in ("NFC", "NFD"))
    for kind, name in (("images", f"{nfd}.TIF"), ("masks", f"{nfc}.png"), ("images", f"._{nfd}.TIF"), ("images", ".DS_Store"), ("images", "Thumbs.db")):
        (tmp_path / kind).mkdir(exist_ok=True), (tmp_path / kind / name).write_bytes(b"x")
    (tmp_path / "images" / "folder.tif").mkdir()
    (file,) = list_files(tmp_path / "images", tmp_path / "masks")
    assert (file.name, file.mask.name) == (nfc, f"{nfc}.png")
    assert list_files(tmp_path / "images", tmp_path / "masks", [f"{nfc}.tif"]) == [file]
    (tmp_path / "images" / "b.tif").symlink_to(tmp_path / "gone.tif")
    with pytest.raises(FileNotFoundError, match="b.tif is a link to .*gone.tif, which is not there"): list_files(tmp_path / "images")


def test_images_and_masks_in_one_folder(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"): (tmp_path / name).write_bytes(b"x")
    files = list_files(tmp_path, tmp_path, ["a.jpg", "b.jpg"])
    assert [f.mask.name for f in files] == ["a.png", "b.png"]


# ---- what is read today and has to go on being read

@pytest.mark.parametrize("how", [
    dict(BIGTIFF="YES"), dict(ENDIANNESS="BIG"), dict(compress="lzw", predictor=2), dict(compress="zstd"), dict(compress="lerc"), dict(compress="packbits"), dict(interleave="band"),
    dict(interleave="pixel", tiled=True, blockxsize=16, blockysize=16), dict(driver="COG"), dict(transform=(1.7, -1, 5, 1, 1.7, 9)),
    dict(gcps=[rasterio.control.GroundControlPoint(r, c, c, -r) for r, c in ((0, 0), (0, 32), (32, 0))], crs="EPSG:32631")])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_kinds_of_tiff(tmp_path, how, dtype):
    pixels = noise(dtype=dtype)
    if how.get("predictor") and dtype.startswith("float"): how = how | dict(predictor=3)
    path = write(tmp_path / "a.tif", pixels, **how)
    assert np.array_equal(read_image(path, SENSORS["aerial_rgb"], RGB).image, pixels.astype("float32"))
    assert not warned(lambda: check_header(path, SENSORS["aerial_rgb"], RGB))


@pytest.mark.parametrize("dtype, nodata", [("float32", np.nan), ("float32", -3.4028234663852886e38), ("int16", -32768), ("uint8", 255), ("float64", 1e300)])
def test_extreme_nodata(tmp_path, dtype, nodata):
    pixels = noise(dtype=dtype, high=100)
    pixels[1, :3] = nodata
    image = read_image(write(tmp_path / "a.tif", pixels, nodata=nodata), SENSORS["aerial_rgb"], RGB).image
    assert np.isnan(image[:, :3]).all() and np.array_equal(image[:, 3:], pixels[:, 3:].astype("float32"))


def test_mask_files_beside_an_image(tmp_path):
    path = write(tmp_path / "a.tif", noise())
    with rasterio.open(path, "r+") as file: file.write_mask(np.arange(32 * 32).reshape(32, 32) >= 64)
    image = read_image(path, SENSORS["aerial_rgb"], RGB).image
    assert np.isnan(image[:, :2]).all() and np.isfinite(image[:, 2:]).all()


def test_a_colour_table_is_no_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype("uint8")
    Image.fromarray(pixels).quantize(16).save(tmp_path / "table.png")
    with pytest.raises(ValueError, match="positions in a colour table"):
        read_image(tmp_path / "table.png", SENSORS["aerial_rgb"].select(["red"]), ("red",))
