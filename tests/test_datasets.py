"Reading data: bands by name, units, nodata, labels, domains, batches that depend on the step alone."
import pickle
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.benchmarks import benchmark
from spectralmoe.datasets import (DomainDataModule, SegmentationTiles, Statistics, collate,
                                  first_batch_report, read_image)
from spectralmoe.simulator.tiles import make_tiles
from spectralmoe.tasks import IGNORE
from spectralmoe.transforms import Compose, FlipRotate, RandomCrop

FIVE = ("red", "green", "blue", "nir", "swir22")
CLASSES = ("field", "forest", "water", "built-up", "road")


def write(path, array, names=None, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = {".png": "PNG", ".jpg": "JPEG"}.get(path.suffix, "GTiff")
    if driver == "GTiff": tags.setdefault("transform", (10, 0, 500, 0, -10, 900))
    count, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver, width, height, count, dtype=array.dtype, **tags) as out:
            out.write(array)
            if names: out.descriptions = tuple(names)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_tiles(tmp_path_factory.mktemp("data") / "made_tiles", n=6, size=48)


@pytest.fixture
def tiles(made):
    return SegmentationTiles(made / "source/images", made / "source/masks", sensor="sentinel2", bands=FIVE,
                             classes=CLASSES)


def module(made, **options):
    return DomainDataModule("made_tiles", root=made.parent, **{"crop": 32, "batch_size": 4, "steps": 6} | options)


# ---- bands by name

def test_four_bands_for_a_five_band_model_names_both_lists(tmp_path):
    for names in (None, ["B2", "B3", "B4", "B8"]):
        write(tmp_path / "four.tif", np.ones((4, 20, 20), "uint16"), names)
        with pytest.raises(ValueError) as error:
            SegmentationTiles(tmp_path, sensor="sentinel2", bands=FIVE)[0]
        message = str(error.value)
        assert "four.tif" in message and "B8" in message and ("B12" in message or "swir22" in message)
    write(tmp_path / "four.tif", np.ones((4, 20, 20), "uint16"))
    with pytest.raises(ValueError, match="column `bands`, for example B1.B2.B3.B4, or say another sensor"):
        SegmentationTiles(tmp_path, sensor="sentinel2", bands=FIVE)[0]
    with pytest.raises(ValueError, match=r"'gf2' has .*missing \[swir22\]"):
        SegmentationTiles(tmp_path, sensor="gf2", bands=FIVE)


@pytest.mark.parametrize("by", ["descriptions", "csv"])
def test_permuting_bands_with_their_names_changes_nothing(tmp_path, by):
    rng = np.random.default_rng(0)
    names, dn = ["B2", "B3", "B4", "B8", "B12"], rng.integers(0, 9000, (5, 40, 50)).astype("uint16")
    label = rng.integers(0, 2, (1, 40, 50)).astype("uint8")
    batches, scaled = [], []
    for k, order in enumerate([[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]]):
        folder, stored = tmp_path / str(k), [names[i] for i in order]
        write(folder / "images/a.tif", dn[order], stored if by == "descriptions" else None)
        write(folder / "masks/a.tif", label)
        (folder / "index.csv").write_text(f"image,bands\na.tif,{'|'.join(stored)}\n", encoding="utf-8")
        own = SegmentationTiles(folder / "images", folder / "masks", folder / "index.csv" if by == "csv" else None,
                                {0: 0, 1: 1}, "sentinel2", FIVE)
        batches.append(collate([own[0]]))
        scaled.append(own.standardised(Statistics.fit(own)).crops(32)[0, 5])
    for one, other in (batches, scaled):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    red = dn[2].astype("float32") * np.float32(1e-4)
    assert np.array_equal(batches[1]["image"][0, 0].numpy(), np.where((dn == 0).any(0), 0, red))


def test_infrared_flagged_as_transparency_is_still_a_band(tmp_path):
    dn = np.arange(4 * 64, dtype="uint8").reshape(4, 8, 8) % 60
    path = write(tmp_path / "a.tif", dn, photometric="RGB", alpha="yes")
    with rasterio.open(path) as file: assert file.colorinterp[3] == rasterio.enums.ColorInterp.alpha
    as_band = read_image(path, SENSORS["aerial_rgbn"], ["nir", "red"])
    assert np.array_equal(as_band.image, dn[[3, 0]].astype("float32"))
    as_mask = read_image(path, SENSORS["aerial_rgb"], ["red"])
    assert np.array_equal(np.isnan(as_mask.image[0]), dn[3] == 0) and np.isnan(as_mask.image).any()


# ---- units, nodata

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_any_type_becomes_physical_units(tmp_path, dtype):
    sensor = Sensor("two", [Band("a", 0.5, 0.05, scale=0.01, offset=-0.2), Band("b", 0.6, 0.05)])
    dn = np.arange(2 * 30).reshape(2, 5, 6).astype(dtype)
    path = write(tmp_path / "a.tif", dn, tiled=True, blockxsize=16, blockysize=16)
    image = read_image(path, sensor, ["b", "a"]).image
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, [dn[1], dn[0] * 0.01 - 0.2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_read_too(tmp_path, suffix):
    dn = np.full((3, 16, 16), 7, "uint8")
    dn[0] = 200
    write(tmp_path / f"images/a{suffix}", dn)
    write(tmp_path / "masks/a.png", np.ones((1, 16, 16), "uint8"))
    item = SegmentationTiles(tmp_path / "images", tmp_path / "masks", label_map={1: 0}, sensor="aerial_rgb")[0]
    assert (item["image"][0] - 200).abs().max() < 6 and (item["image"][1:] - 7).abs().max() < 6
    assert (item["label"] == 0).all() and item["crs"] == ""


@pytest.mark.parametrize("kind", ["nan", "tag", "sensor"])
def test_nothing_is_masked_everywhere(tmp_path, kind):
    rng = np.random.default_rng(1)
    dn = rng.integers(100, 3000, (2, 20, 20)).astype("float32")
    hole, nothing = dn.copy(), {"nan": np.nan, "tag": -9999, "sensor": 0}[kind]
    hole[1, 3:7, 4:9] = nothing  # one of the used bands is enough
    write(tmp_path / "images/a.tif", hole, ["B4", "B3"], **({"nodata": -9999} if kind == "tag" else {}))
    write(tmp_path / "masks/a.tif", np.ones((1, 20, 20), "uint8"))
    own = SegmentationTiles(tmp_path / "images", tmp_path / "masks", classes=["a", "b"], sensor="sentinel2",
                            bands=["red", "green"])
    gone = np.zeros((20, 20), bool)
    gone[3:7, 4:9] = True
    statistics = Statistics.fit(own)
    np.testing.assert_allclose(statistics.mean, dn[:, ~gone].mean(1) * 1e-4, rtol=1e-6)
    assert statistics.pixels == 380
    item = own.standardised(statistics)[0]
    assert np.array_equal(item["valid"].numpy(), ~gone)
    assert (item["label"][gone] == IGNORE).all() and (item["label"][~gone] == 1).all()
    assert not item["image"][:, gone].any() and item["image"].isfinite().all()
    assert first_batch_report(own)["nodata"].tolist() == pytest.approx([0.05, 0.05])
    only_red = SegmentationTiles(tmp_path / "images", sensor="sentinel2", bands=["red"])
    assert only_red[0]["valid"].all(), "a hole in a band that is not used does not matter"


# ---- labels

def test_unlisted_label_values_are_refused_with_their_counts(tmp_path, made):
    label = np.zeros((1, 10, 10), "uint8")
    label[0, 0, :3], label[0, 1, 0] = 7, 9
    write(tmp_path / "images/a.tif", np.ones((3, 10, 10), "uint8"))
    write(tmp_path / "masks/a.tif", label)
    own = SegmentationTiles(tmp_path / "images", tmp_path / "masks", classes=["a", "b"], sensor="aerial_rgb")
    for look in (own.label_counts, lambda: own[0]):
        with pytest.raises(ValueError, match=r"7: 3, 9: 1.*label_map="): look()
    narrow = replace(benchmark("made_tiles"), label_map={0: 0, 1: 1, 2: 2, 3: 3}, classes=CLASSES[:4],
                     palette=benchmark("made_tiles").palette[:4])
    with pytest.raises(ValueError, match=r"\(value: pixels\): 4: \d+"):
        DomainDataModule(narrow, root=made.parent).train_dataloader()
    listed = SegmentationTiles(tmp_path / "images", tmp_path / "masks", sensor="aerial_rgb",
                               label_map={0: 1, 7: 0, 9: IGNORE})
    assert listed.label_counts().pixels.tolist() == [96, 3, 1]
    assert listed[0]["label"][0, :4].tolist() == [0, 0, 0, 1] and listed[0]["label"][1, 0] == IGNORE


def test_colour_masks(tmp_path):
    write(tmp_path / "images/a.png", np.full((3, 4, 4), 9, "uint8"))
    colours = np.zeros((3, 4, 4), "uint8")
    colours[0, 2:] = 255
    write(tmp_path / "masks/a.png", colours)
    own = SegmentationTiles(tmp_path / "images", tmp_path / "masks", label_map={(0, 0, 0): 0, (255, 0, 0): 1},
                            sensor="aerial_rgb")
    assert own[0]["label"].tolist() == [[0] * 4] * 2 + [[1] * 4] * 2
    half = SegmentationTiles(tmp_path / "images", tmp_path / "masks", label_map={(0, 0, 0): 0}, sensor="aerial_rgb")
    with pytest.raises(ValueError, match="#ff0000: 8"): half.label_counts()


# ---- the first batch

def test_input_divided_by_255_warns(tmp_path, tiles):
    for file in tiles.files:
        with rasterio.open(file.image) as source: dn = source.read()
        write(tmp_path / "images" / file.image.name, dn / 255, ["B2", "B3", "B4", "B8", "B12"])
        write(tmp_path / "masks" / file.mask.name, rasterio.open(file.mask).read())
    wrong = SegmentationTiles(tmp_path / "images", tmp_path / "masks", sensor="sentinel2", bands=FIVE, classes=CLASSES)
    with pytest.warns(UserWarning, match="red is 0.0004.*in the statistics 0.1"):
        first_batch_report(wrong, Statistics.fit(tiles))
    with pytest.warns(UserWarning, match="mean reflectance"): first_batch_report(wrong, Statistics.fit(wrong))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_batch_report(tiles, Statistics.fit(tiles))


def test_clipped_pixels_are_counted(tmp_path):
    dn = np.random.default_rng(0).integers(0, 250, (3, 40, 40)).astype("uint8")
    dn[1, :10] = 255
    write(tmp_path / "a.png", dn)
    clipped = first_batch_report(SegmentationTiles(tmp_path, sensor="aerial_rgb"))["clipped"]
    assert clipped.iloc[1] == 0.25 and clipped.iloc[0] < 0.02


# ---- domains

def test_nothing_is_fitted_on_a_target(made):
    data = module(made)
    target = data.targets["target"]
    for fit in (Statistics.fit, lambda t: t.crops(32), lambda t: t.subset([0]).crops(32)):
        with pytest.raises(ValueError, match="role='target'"): fit(target)
    train = {f.image for f in data.source_train.files}
    assert train.isdisjoint(f.image for f in data.source_val.files)
    assert train.isdisjoint(f.image for f in target.files)
    used = [data.source.files.index(f) for f in data.source_train.files]
    assert data.statistics == Statistics.fit(data.source.subset(used)) != Statistics.fit(data.source)
    assert target.statistics is data.statistics


@pytest.mark.parametrize("size", [20, 48, 64])
def test_windows_count_every_pixel_once(tiles, size):
    counts = torch.zeros(256, dtype=torch.long)
    for window in tiles.windows(size):
        assert window["label"].shape == (size, size)
        counts += torch.bincount(window["label"].flatten(), minlength=256)
    whole = sum(torch.bincount(item["label"].flatten(), minlength=256) for item in tiles)
    assert torch.equal(counts[:5], whole[:5])


def test_windows_know_their_place(tiles):
    for window in tiles.windows(20):
        row, col, h, w = window["window"]
        x, y = window["transform"][2], window["transform"][5]
        with rasterio.open(tiles.files[window["index"]].image) as source: whole = source.transform
        assert (x, y) == (whole.c + whole.a * col, whole.f + whole.e * row)
        assert torch.equal(window["image"], tiles[window["index"]]["image"][:, row:row + h, col:col + w])


def test_odd_sizes_make_batches(tmp_path):
    for k, (h, w) in enumerate([(97, 107), (40, 225), (30, 30)]):
        write(tmp_path / f"images/{k}.tif", np.full((3, h, w), 5, "uint8"))
        write(tmp_path / f"masks/{k}.tif", np.zeros((1, h, w), "uint8"))
    own = SegmentationTiles(tmp_path / "images", tmp_path / "masks", classes=["a", "b"], sensor="aerial_rgb")
    crops = own.crops(64, Compose(RandomCrop(64), FlipRotate()))
    batch = collate([crops[i, draw] for i in range(3) for draw in range(3)])
    assert batch["image"].shape == (9, 3, 64, 64)
    assert ((batch["label"] == 0) == batch["valid"]).all()
    assert ((batch["image"] == 0) == ~batch["valid"][:, None]).all()
    assert batch["valid"].sum((1, 2)).tolist() == [64 * 64] * 3 + [40 * 64] * 3 + [30 * 30] * 3


@pytest.mark.parametrize("few", [1, 3])
def test_few_training_tiles_are_part_of_more(made, few):
    part, more, everything = (module(made, train_tiles=n) for n in (few, few + 1, None))
    names = [[f.name for f in m.source_train.files] for m in (part, more, everything)]
    assert (len(names[0]), len(names[1])) == (few, few + 1)
    assert set(names[0]) < set(names[1]) <= set(names[2])
    assert [f.name for f in part.source_val.files] == [f.name for f in everything.source_val.files]
    assert [f.name for f in module(made, train_tiles=few, seed=7).source_train.files] == names[0]
    assert part.statistics == Statistics.fit(part.source_train.standardised(None)) != everything.statistics


def test_the_number_of_training_tiles_is_the_benchmarks_unless_given(made):
    task = replace(benchmark("made_tiles"), train_tiles=2)
    count = lambda **more: len(DomainDataModule(task, root=made.parent, crop=32, **more).source_train)
    assert (count(), count(train_tiles=3)) == (2, 3)
    for wrong, about in ((0, "1 or more"), (99, "1 to 5")):
        with pytest.raises(ValueError, match=f"train_tiles={wrong}; expected {about}"): count(train_tiles=wrong)
    assert DomainDataModule(task, root=made.parent, train_tiles=3).benchmark.train_tiles == 3


# ---- batches

def same(one, other):
    assert one["name"] == other["name"]
    return torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_sees_the_batches_it_would_have_seen(made, workers):
    augment = Compose(RandomCrop(32), FlipRotate())
    through = list(module(made, micro_batch=2, seed=3, augment=augment).train_dataloader())
    restarted = module(made, micro_batch=2, seed=3, augment=augment, num_workers=workers, cache_mib=0)
    restarted.trainer = SimpleNamespace(global_step=4, max_steps=6)
    rest = list(restarted.train_dataloader())
    assert (len(through), len(rest)) == (12, 4)
    assert all(map(same, through[8:], rest))
    other = list(module(made, micro_batch=2, seed=4, augment=augment).train_dataloader())
    assert [b["name"] for b in other] != [b["name"] for b in through]


def test_a_data_set_travels_to_a_worker_without_its_pixels(tiles):
    crops = tiles.crops(32)
    here = crops[1, 9]
    sent = pickle.dumps(crops)
    assert len(sent) < 20_000 and same(pickle.loads(sent)[1, 9], here)


def test_more_steps_than_the_data_have_is_an_error(made):
    data = module(made)
    data.trainer = SimpleNamespace(global_step=0, max_steps=7)
    with pytest.raises(ValueError, match="max_steps=7, the data have steps=6"): data.train_dataloader()


# ---- the real thing

def test_two_products_meet_by_name(wildfire):
    data = DomainDataModule("wildfire_cross_product", root=wildfire.parent)
    labels, bands = data.check()
    assert (len(data.source_train) + len(data.source_val), len(data.targets["reflectance"])) == (20, 21)
    assert set(labels) == {"display", "reflectance"}
    assert all(table["class"].tolist() == ["unburned", "burned"] for table in labels.values())
    for tiles, red in ((data.source, "TCI_R"), (data._targets["reflectance"], "B4")):
        with rasterio.open(tiles.files[0].image) as file: dn = file.read(file.descriptions.index(red) + 1)
        scale = tiles.sensor.bands[tiles.sensor.index("red")].scale
        np.testing.assert_allclose(tiles[0]["image"][0], dn * scale, rtol=1e-5)
    assert bands["mean"].between(0.05, 0.4).all()


def test_real_nan_pixels_are_left_out(wildfire):
    data = DomainDataModule("wildfire_cross_product", root=wildfire.parent)
    holes = {t["name"]: int((~t["valid"]).sum()) for t in data.targets["reflectance"] if not t["valid"].all()}
    with rasterio.open(wildfire / "images/BLUE_20240810.tif") as file: nan = np.isnan(file.read()).any(0)
    assert holes["BLUE_20240810"] >= nan.sum() > 0
    (loader,) = data.target_dataloaders().values()
    counted = sum((batch["label"] != IGNORE).sum() for batch in loader)
    assert counted == sum(item["valid"].sum() for item in data.targets["reflectance"])
    assert all(batch["image"].isfinite().all() for batch in data.train_dataloader())


def test_regions_are_disjoint(wildfire):
    data = DomainDataModule("wildfire_cross_region", root=wildfire.parent)
    places = [{f.name for f in t.files} for t in (data.source_train, data.source_val, data.targets["south"])]
    assert sum(map(len, places)) == len(set.union(*places)) and all(places)
