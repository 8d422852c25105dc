"What is wrong with data is found before training, with domain, band or file, and what is right draws no warning."
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.benchmarks import benchmark
from spectralmoe.datasets import DomainDataModule, SegmentationTiles, Statistics
from spectralmoe.tasks import Benchmark, Domain

RGB = ("red", "green", "blue")
REFLECTANCE = SENSORS["sentinel2"].select(RGB)


def write(path, array, names=None, **tags):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", "GTiff", width, height, count, dtype=array.dtype, **tags) as out:
            out.write(array)
            if names: out.descriptions = tuple(names)
    return path


def scene(rng, side=48, low=300, high=3000):
    "Digital numbers (3, side, side) of reflectance x 10,000 with patches, as a landscape has."
    patches = rng.integers(low, high, (3, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    return (patches * rng.normal(1, 0.05, patches.shape)).clip(1, 10_000)


def domain(root, name, n=4, seed=0, change=lambda dn: dn, dtype="uint16", labels=(0, 1), side=48, **tags):
    rng = np.random.default_rng((seed, *name.encode()))
    for i in range(n):
        place = {k: v(i) if callable(v) else v for k, v in tags.items()}
        write(root / name / "images" / f"{name}{i}.tif", change(scene(rng, side)).astype(dtype), **place)
        if labels: write(root / name / "masks" / f"{name}{i}.tif", rng.choice(labels, (1, side, side)).astype("uint8"), **place)


def task(sensor=REFLECTANCE, source="s", targets=("t",), unlabelled=(), bands=RGB, csv=(), **more):
    def place(name):
        return Domain(name, f"{name}/images", None if name in unlabelled else f"{name}/masks", f"{name}/index.csv" if name in csv else None, sensor=sensor)
    return Benchmark("mine", "mine", **{**dict(classes=("a", "b"), palette=((9, 9, 9), (0, 9, 9)), label_map={0: 0, 1: 1}, bands=bands, crop=48, steps=2,
                                               batch_size=2), **more}, source=place(source), targets=tuple(map(place, targets)))


def said(module):
    "What `check` warns of."
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        module.check()
    return [str(n.message) for n in notes]


# ---- numbers

FAULTS = {"x 100": (lambda dn: dn * 100, "uint32", "red is"), "/ 10000": (lambda dn: dn / 10_000, "float32", "red is"),
          "8 bit": (lambda dn: dn * 255 / 3000, "uint8", "red is"), "/ 255": (lambda dn: dn / 255, "float32", "red is"),
          "+ 1000": (lambda dn: dn + 1000, "uint16", r"every band \(red, green, blue\).*baseline 04.00"),
          "fill": (lambda dn: np.where(np.arange(48) < 5, 65535, dn), "uint16", "65535|red is")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_target_on_another_scale_is_warned_about(tmp_path, fault):
    change, dtype, about = FAULTS[fault]
    domain(tmp_path, "s")
    domain(tmp_path, "fine", seed=1)
    domain(tmp_path, "t", seed=2, change=change, dtype=dtype)
    notes = said(DomainDataModule(task(targets=("fine", "t")), tmp_path))
    assert notes and not [n for n in notes if "target 'fine'" in n or "source" in n.split(":")[0]], notes
    assert any("target 't'" in n and re.search(about, n) for n in notes), notes


def test_one_band_on_another_scale_is_named(tmp_path):
    domain(tmp_path, "s")
    domain(tmp_path, "t", change=lambda dn: dn * np.array([1, 30, 1])[:, None, None], dtype="uint32")
    (note,) = said(DomainDataModule(task(), tmp_path))
    assert "target 't'" in note and "green is" in note and "red is" not in note


@pytest.mark.parametrize("key", ["whu_ohs", "fbp_cross_sensor", "potsdam_vaihingen"])
def test_shifts_between_simulated_sensors_are_no_fault(tmp_path, key):
    from spectralmoe.simulator.tiles import build, located
    small = replace(benchmark(key), simulated={n: tuple(replace(v, tiles=2, size=64) for v in views)
                                               for n, views in benchmark(key).simulated.items()}, train_tiles=None)
    build(small, tmp_path, progress=False)
    assert DomainDataModule(located(small, tmp_path), crop=64, batch_size=2).look_at_numbers()[1] == []


def test_two_real_products_are_no_fault(wildfire):
    for key in ("wildfire_cross_product", "wildfire_cross_region"):
        assert DomainDataModule(key, wildfire.parent).look_at_numbers()[1] == []


def test_reflectance_as_it_is_is_no_fault(tmp_path):
    own = Sensor("my reflectance", [Band("r", 0.66, 0.03, "red"), Band("g", 0.56, 0.03, "green"), Band("b", 0.49, 0.06, "blue")])
    for name in "st": domain(tmp_path, name, change=lambda dn: dn / 10_000, dtype="float32")
    assert said(DomainDataModule(task(own), tmp_path)) == []


def test_empty_bands_of_many_are_named(tmp_path):
    rng, gone = np.random.default_rng(0), [3, 40, 41, 42, 100, 223]
    sensor = Sensor("many", [Band(f"b{i}", 0.4 + i / 200, 0.005, scale=1e-4) for i in range(224)])
    for name in "st":
        for i in range(2):
            dn = rng.integers(100, 4000, (224, 16, 16)).astype("float32")
            dn[gone] = -9999
            write(tmp_path / name / "images" / f"{name}{i}.tif", dn, nodata=-9999)
            write(tmp_path / name / "masks" / f"{name}{i}.tif", rng.integers(0, 2, (1, 16, 16)).astype("uint8"))
    own = task(sensor, bands=sensor.names, rgb=("b60", "b30", "b10"), crop=16)
    with pytest.raises(ValueError) as error: said(DomainDataModule(own, tmp_path))
    assert all(f"b{i}" in str(error.value) for i in gone) and len(str(error.value)) < 1000
    left = tuple(b for i, b in enumerate(sensor.names) if i not in gone)
    assert not [n for n in said(DomainDataModule(replace(own, bands=left), tmp_path)) if "no value" in n]


def test_pixels_lost_to_one_band_are_warned_about(tmp_path):
    holes = lambda dn: np.where((np.arange(3)[:, None, None] == 1) & (np.arange(48) < 20), np.nan, dn)
    domain(tmp_path, "s")
    domain(tmp_path, "t", change=holes, dtype="float32")
    assert any("target 't'" in n and "in green" in n and "42%" in n for n in said(DomainDataModule(task(), tmp_path)))


# ---- labels

def test_a_target_without_labels_is_left_out_and_changes_no_record(tmp_path):
    for name in ("s", "t"): domain(tmp_path, name)
    domain(tmp_path, "blind", labels=())
    domain(tmp_path, "ignored", labels=(255,))
    less, more = (DomainDataModule(t, tmp_path) for t in (task(), task(targets=("t", "blind", "ignored"), unlabelled=("blind",))))
    notes = said(more)
    assert [n for n in notes if "target 'blind' has no labelled pixel" in n] and [n for n in notes if "target 'ignored' has no" in n]
    assert more.fingerprints == less.fingerprints and list(more.target_dataloaders()) == ["t"] and set(more.targets) == {"t", "blind", "ignored"}


@pytest.mark.parametrize("part", ["training", "held-out validation"])
def test_a_source_part_without_labels_is_found_before_training(tmp_path, part):
    for name in "st": domain(tmp_path, name)
    module = DomainDataModule(task(), tmp_path)
    for file in (module._train if part == "training" else module._val).files: write(file.mask, np.full((1, 48, 48), 255, "uint8"))
    with pytest.raises(ValueError, match=f"no pixel of the . {part} tiles is labelled.*val_fraction"):
        DomainDataModule(task(), tmp_path).train_dataloader()


def test_labels_under_nodata_do_not_count(tmp_path):
    domain(tmp_path, "s")
    domain(tmp_path, "t", change=lambda dn: np.where(np.arange(48) < 40, np.nan, dn), dtype="float32")
    for path in (tmp_path / "t/masks").glob("*.tif"): write(path, np.where(np.arange(48) < 40, 1, 255).astype("uint8")[None].repeat(48, 0)[None])
    with pytest.raises(ValueError, match="target 't': all labelled pixels are nodata"): said(DomainDataModule(task(), tmp_path))


def test_a_class_that_the_source_does_not_hold_is_named(tmp_path):
    for name in "st": domain(tmp_path, name)
    three = task(classes=("a", "b", "water"), palette=((9, 9, 9),) * 3, label_map={0: 0, 1: 1, 2: 2})
    assert any("no pixel of 1 of 3 classes (water)" in n for n in said(DomainDataModule(three, tmp_path)))


# ---- files

@pytest.mark.parametrize("place", ["s/images", "s/masks", "t/images", "t/masks"])
def test_a_damaged_file_is_found_and_named_before_training(tmp_path, place):
    for name in "st": domain(tmp_path, name, compress="deflate", side=96)
    path = sorted((tmp_path / place).glob("*.tif"))[-1]
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(Exception, match=path.name): said(DomainDataModule(task(), tmp_path))


def test_a_worker_names_the_damaged_file(tmp_path):
    for name in "st": domain(tmp_path, name, compress="deflate", side=96)
    module = DomainDataModule(task(), tmp_path, num_workers=1, cache_mib=0, steps=8)
    loader = module.train_dataloader()
    for file in module.source_train.files: file.image.write_bytes(file.image.read_bytes()[:file.image.stat().st_size // 2])
    with pytest.raises(Exception, match=r"s\d\.tif"): list(loader)


def test_a_large_scene_needs_the_memory_of_a_strip(tmp_path):
    code = """
import resource, sys, warnings; warnings.simplefilter("ignore")
from spectralmoe.datasets import SegmentationTiles, Statistics
tiles = SegmentationTiles(sys.argv[1] + "/images", sys.argv[1] + "/masks", classes=["a", "b"], sensor="aerial_rgb")
tiles.subset([0]).look(0)  # libraries are loaded
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = peak()
tiles.label_counts(); tiles.look(1); tiles.sample(); Statistics.fit(tiles)
print((peak() - start) / 4000**2)
"""
    rng = np.random.default_rng(0)
    for kind, bands in (("images", 3), ("masks", 1)):
        write(tmp_path / kind / "a.tif", rng.integers(0, 2, (bands, 64, 64)).astype("uint8"))
        (tmp_path / kind).mkdir(exist_ok=True)
        with rasterio.open(tmp_path / kind / "b.tif", "w", "GTiff", 4000, 4000, bands, dtype="uint8", tiled=True, blockxsize=512, blockysize=512,
                           compress="deflate", SPARSE_OK="TRUE", transform=from_origin(0, 0, 1, 1)): pass
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 12, "bytes per pixel of a scene of three bands and a mask"


# ---- leaks

def test_a_copy_of_the_source_under_other_names_is_no_target(tmp_path):
    domain(tmp_path, "s")
    domain(tmp_path, "t")
    for i, path in enumerate(sorted((tmp_path / "s/images").glob("*.tif"))[:2]):
        with rasterio.open(path) as file: write(tmp_path / "t/images" / f"t{i}.tif", file.read(), compress="lzw")
    with pytest.raises(ValueError, match=r"2 of 4 images of target 't' hold the pixels of source images \(t0 = s0"): said(DomainDataModule(task(), tmp_path))


def test_empty_tiles_are_no_copies(tmp_path):
    for name in "st":
        domain(tmp_path, name)
        write(tmp_path / name / "images" / f"{name}0.tif", np.full((3, 48, 48), 7, "uint16"))
    said(DomainDataModule(task(), tmp_path))


def test_an_image_listed_twice_is_refused(tmp_path):
    for name in "st": domain(tmp_path, name)
    twice = replace(task(), targets=(replace(task().targets[0], names=("t0", "t1", "t0")),))
    with pytest.raises(ValueError, match="t0"): DomainDataModule(twice, tmp_path)


def beside(i): return from_origin(5e5 + 480 * i, 4e6, 10, 10)


def test_neighbours_across_the_split_are_counted_unless_they_are_grouped(tmp_path):
    domain(tmp_path, "s", n=10, crs="EPSG:32631", transform=beside)
    domain(tmp_path, "t", crs="EPSG:32633", transform=beside)
    (note,) = said(DomainDataModule(task(), tmp_path))
    assert "2 of 2 validation images touch or overlap a training image" in note and "`group`" in note
    rows = "".join(f"s{i}.tif,{'east' if i > 6 else f'block {i // 2}'}\n" for i in range(10))
    (tmp_path / "s/index.csv").write_text(f"image,group\n{rows}", encoding="utf-8")
    assert said(DomainDataModule(task(csv=("s",)), tmp_path, val_fraction=0.25)) == []


def test_a_target_on_the_ground_of_the_source_is_warned_about(tmp_path):
    apart = lambda i: from_origin(5e5 + 2000 * i, 4e6, 10, 10)
    domain(tmp_path, "s", crs="EPSG:32631", transform=apart)
    domain(tmp_path, "t", n=5, seed=3, crs="EPSG:32631", transform=lambda i: from_origin(5e5 + 2000 * i, 4e6 - 240, 10, 10))
    (note,) = said(DomainDataModule(task(), tmp_path))
    assert "4 of 5 images of target 't' lie on ground of the source" in note


def test_unequal_groups_are_warned_about_with_their_shares(tmp_path):
    for name in "st": domain(tmp_path, name, n=10)
    (tmp_path / "s/index.csv").write_text("image,group\n" + "".join(f"s{i}.tif,{'big' if i < 8 else f'small{i}'}\n" for i in range(10)), encoding="utf-8")
    (note,) = said(DomainDataModule(task(csv=("s",)), tmp_path))
    assert "'big' 80%" in note


# ---- sensors that are not said

def test_a_target_may_leave_its_sensor_unsaid(tmp_path):
    domain(tmp_path, "s", change=lambda dn: dn)
    rng = np.random.default_rng(5)
    for i in range(2):
        write(tmp_path / "t/images" / f"t{i}.tif", scene(rng)[::-1].astype("uint16"), names=("blue", "green", "red"))
        write(tmp_path / "t/masks" / f"t{i}.tif", rng.integers(0, 2, (1, 48, 48)).astype("uint8"))
    own = Sensor("numbers", [replace(b, scale=1.0) for b in REFLECTANCE.bands])
    known = task(own)
    module = DomainDataModule(replace(known, targets=(replace(known.targets[0], sensor=None),)), tmp_path)
    with rasterio.open(tmp_path / "t/images/t0.tif") as file: red = file.read(3)
    assert np.array_equal(module._targets["t"][0]["image"][0].numpy(), red) and said(module) == []


def test_statistics_are_the_same_in_strips(tmp_path, monkeypatch):
    domain(tmp_path, "s")
    whole, strips = (SegmentationTiles(tmp_path / "s/images", sensor=REFLECTANCE, cache_mib=mib) for mib in (9, 0))
    monkeypatch.setattr(strips.reader, "strips", lambda i: [(row, 0, 16, 48) for row in (0, 16, 32)], raising=False)
    assert np.allclose(Statistics.fit(whole).mean, Statistics.fit(strips).mean, rtol=1e-12)


# ---- one file among many, and both directions

def test_one_file_on_another_scale_is_named(tmp_path):
    domain(tmp_path, "s", n=20)
    domain(tmp_path, "t", n=20, seed=1)
    write(tmp_path / "t" / "images" / "t7.tif", (scene(np.random.default_rng(5)) * 100).astype("uint32"))
    found = [n for n in said(DomainDataModule(task(), tmp_path)) if "another scale than the others" in n]
    assert len(found) == 1 and "domain 't': 1 of 20 images" in found[0] and "t7.tif" in found[0] and "uint32" in found[0]


def test_masks_of_0_and_255_in_a_target_are_named(tmp_path):
    domain(tmp_path, "s")
    domain(tmp_path, "t", seed=1, labels=(0, 255))
    assert any("target 't': the masks hold 0" in n and "label_map={0: 0, 255: 1}" in n for n in said(DomainDataModule(task(), tmp_path)))


def test_an_offset_of_the_source_is_found_beside_a_plain_target(tmp_path):
    domain(tmp_path, "s", change=lambda dn: dn + 1000)
    domain(tmp_path, "t", seed=1)
    assert any("source 's'" in n and "above those of target 't'" in n and "baseline 04.00" in n for n in said(DomainDataModule(task(), tmp_path)))


def test_copies_within_and_between_targets_are_named(tmp_path):
    for k, name in enumerate("stu"): domain(tmp_path, name, seed=k)
    for other in ("t9", "u9"):
        with rasterio.open(tmp_path / "t" / "images" / "t0.tif") as file: pixels = file.read()
        write(tmp_path / other[0] / "images" / f"{other}.tif", pixels, compress="deflate")
        write(tmp_path / other[0] / "masks" / f"{other}.tif", np.zeros((1, 48, 48), "uint8"))
    found = said(DomainDataModule(task(targets=("t", "u")), tmp_path))
    assert any("1 images of target 't' are there twice (t0 = t9)" in n for n in found)
    assert any("hold the pixels of target 'u'" in n for n in found)


def test_snow_in_a_target_is_no_wrong_scale(tmp_path):
    domain(tmp_path, "s")
    rng = np.random.default_rng(3)
    domain(tmp_path, "t", seed=1, change=lambda dn: 7000 + dn * 0.9 * rng.uniform(0.9, 1.1))
    assert not [n for n in said(DomainDataModule(task(), tmp_path)) if "looks wrong" in n]


def test_the_file_of_an_unlisted_value_is_named(tmp_path):
    domain(tmp_path, "s")
    domain(tmp_path, "t", seed=1)
    write(tmp_path / "t" / "masks" / "t2.tif", np.full((1, 48, 48), 7, "uint8"))
    with pytest.raises(ValueError, match=r"t2.tif \(1 of 4 masks\).*7: 2304"): DomainDataModule(task(), tmp_path).check()
