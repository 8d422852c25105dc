"Simulated tasks as files: what is written, checked, refused, and shared by processes."
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from spectralmoe.bands import as_sensor
from spectralmoe.benchmarks import BENCHMARKS, SIMULATED, benchmark, oracle, shift_laboratory
from spectralmoe.datasets import DomainDataModule
from spectralmoe.reading.manifest import noted
from spectralmoe.simulator import tiles as mini
from spectralmoe.simulator.scenes import render

SEVEN = [k for k, t in BENCHMARKS.items() if t.simulated]


def small(task, tiles=2, size=48):
    task = benchmark(task)
    return replace(task, crop=32, train_tiles=None, simulated={k: [replace(v, tiles=tiles, size=size) for v in views]
                                             for k, views in task.simulated.items()})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRALMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    task = small("fbp_cross_sensor")
    mini.build(task, root)
    return task, root


def folder(task, root, domain):
    return next(Path(d.images).parent for d in mini.located(task, root).domains if d.name == domain)


def leftovers(root): return [p for p in root.rglob("*") if p.name.startswith(".making") or p.name == ".lock.json"]


def edited(root, change):
    "Change the manifest of the one task below a folder."
    path, = root.glob("mini/*/manifest.json")
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return path


# ---- what is written

def test_files_hold_what_the_simulator_gives(built):
    task, root = built
    for domain in task.domains:
        place, sensor = folder(task, root, domain.name), as_sensor(domain.sensor)
        for number, view in enumerate(task.simulated[domain.name]):
            seen = mini.scene_domain(task, domain.name, view)
            for scene in render(seen, view.seeds, view.size):
                name = f"{domain.name}_{number}_{scene.seed}.tif"
                with rasterio.open(place / "images" / name) as file:
                    assert file.descriptions == sensor.names and file.dtypes[0] == "uint8"
                    assert np.array_equal(file.read(), scene.image.numpy())
                    assert file.transform.a == -file.transform.e == seen.gsd and file.crs.is_projected
                    image_at = file.bounds
                with rasterio.open(place / "masks" / name) as file:
                    assert np.array_equal(file.read(1), scene.label.numpy()) and file.bounds == image_at


def test_tiles_of_a_view_do_not_overlap(built):
    task, root = built
    boxes = [rasterio.open(p) for p in sorted(folder(task, root, "gf2").glob("images/*.tif"))]
    assert len({(b.crs.to_string(), b.bounds.left, b.bounds.top) for b in boxes}) == len(boxes)


def test_reflectance_is_stored_by_the_scale_of_the_sensor(tmp_path):
    task = small("whu_ohs", 1, 32)
    mini.build(task, tmp_path, ["source_cities"])
    data = next(folder(task, tmp_path, "source_cities").glob("images/*_0_*.tif"))
    view = task.simulated["source_cities"][0]
    scene = render(mini.scene_domain(task, "source_cities", view), view.seeds, 32)[0]
    with rasterio.open(data) as file:
        assert file.dtypes[0] == "uint16" and file.count == 32
        got = file.read() * 1e-4
    assert np.abs(got - np.maximum(scene.image.numpy(), 1e-4)).max() < 6e-5


def test_the_index_selects_views(built):
    task, root = built
    place = mini.located(task, root).source
    one = replace(mini.located(task, root), source=replace(place, where={"view": "1"}))
    from spectralmoe.datasets import SegmentationTiles
    tiles = SegmentationTiles.from_domain(one.source, one)
    assert len(tiles) == 2 and all(f.name.startswith("gf2_1_") for f in tiles.files)


@pytest.mark.parametrize("key", SEVEN)
def test_every_task_is_read_and_checked(key, cache):
    data = DomainDataModule(mini.build_tiles(small(key, 2, 32)), num_workers=0)
    labels, bands = data.check()
    assert set(labels) == set(data.benchmark.simulated) and not leftovers(cache)
    assert tuple(bands.index) == data.benchmark.bands
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (len(data.benchmark.bands), 32, 32) and batch["valid"].all()


def test_infrared_comes_in_place_of_red(cache):
    data = DomainDataModule(mini.build_tiles(small("potsdam_vaihingen")))
    tiles = data._targets["vaihingen"]
    assert "nir as red" in repr(tiles) and tiles.bands == ("red", "green", "blue")
    with rasterio.open(tiles.files[0].image) as file:
        assert file.descriptions == ("N", "R", "G")
        assert np.array_equal(tiles[0]["image"].numpy(), file.read().astype("float32"))


# ---- the same files again

def test_building_again_does_nothing(built):
    task, root = built
    place = folder(task, root, "gf1")
    before = [(p, p.stat().st_mtime_ns) for p in sorted(place.parent.rglob("*"))]
    mini.build(task, root)
    assert [(p, p.stat().st_mtime_ns) for p in sorted(place.parent.rglob("*"))] == before


def test_another_label_map_needs_no_other_files(built):
    task, root = built
    other = replace(task, label_map={**task.label_map, 12: 255})
    assert folder(other, root, "gf1") == folder(task, root, "gf1"), "what decides no pixel decides no folder"


@pytest.mark.parametrize("task, domain, key", (("whu_ohs", "source_cities", "82ceecdb183c2edd28567245591885ee439c0be139456041d213096736991fb7"),
                                               ("potsdam_vaihingen", "vaihingen", "160fd1f1dcdd8d2aba0de41585c3be2dac8587990f474db600c011a93c4792b7")))
def test_recipes_of_the_first_release_are_still_found(task, domain, key, monkeypatch):
    monkeypatch.setattr(mini, "__version__", "99")
    assert mini.fingerprint(task, domain) == f"recipe {key}", "records are found by it, whatever the version of the package"
    assert "99" in Path(mini.located(task).source.images).parts, "another version keeps its own files"


def test_recipes_of_oracles_and_of_the_laboratory_are_still_found():
    best = oracle(benchmark("loveda"), "urban")
    assert mini.fingerprint(best, "urban_oracle") == "recipe 6e1624626d24935cf4ad9ee54dd20d63c37cd3330b710362031ed34c52f522a2"
    lab = "recipe 5a7bc1224b6c689b9092ba818f90f353240c6be64b4be073ea630bfd34d5756a"
    assert mini.fingerprint(shift_laboratory(), "haze_4") == lab


def test_another_edition_of_the_simulator_lies_elsewhere(built, monkeypatch):
    task, root = built
    place = folder(task, root, "gf1")
    monkeypatch.setattr(mini, "SIMULATOR", "another")
    assert folder(task, root, "gf1") != place


def test_the_same_bytes_twice(tmp_path):
    task = small("loveda", 2, 32)
    entries = []
    for k in "ab":
        mini.build(task, tmp_path / k)
        entries.append([noted(d.images)[1] for d in mini.located(task, tmp_path / k).domains])
    assert entries[0] == entries[1] and {e["tiles"] for e in entries[0]} == {8}


def test_what_is_not_in_the_manifest_is_built_again(tmp_path):
    "A kill between rename and manifest leaves such a folder, version 0.1 one with a manifest of its own."
    task = small("loveda", 1, 32)
    mini.build(task, tmp_path)
    place, other = folder(task, tmp_path, "rural"), folder(task, tmp_path, "urban")
    entry = noted(place / "images")[1]
    edited(tmp_path, lambda said: said["domains"].pop(place.name))
    (place / "manifest.json").write_text("{}")
    next((place / "images").iterdir()).unlink()
    before = [p.stat().st_mtime_ns for p in sorted(other.rglob("*"))]
    mini.build(task, tmp_path)
    assert mini.verify(place) == 8 and noted(place / "images")[1] == entry and not (place / "manifest.json").exists()
    assert [p.stat().st_mtime_ns for p in sorted(other.rglob("*"))] == before


def test_a_folder_that_was_deleted_is_built_again(tmp_path):
    task = small("loveda", 1, 32)
    mini.build(task, tmp_path)
    shutil.rmtree(folder(task, tmp_path, "urban"))
    mini.build(task, tmp_path)
    assert mini.verify(folder(task, tmp_path, "urban")) == 8


def test_two_processes_at_once(tmp_path):
    code = ("import sys, torch; torch.set_num_threads(1)\n"
            "from dataclasses import replace\nfrom spectralmoe.simulator import tiles as mini\n"
            "from spectralmoe.benchmarks import benchmark\nt = benchmark('loveda')\n"
            "t = replace(t, simulated={k: [replace(v, tiles=2, size=32) for v in w] for k, w in t.simulated.items()})\n"
            "mini.build(t, sys.argv[1], sys.argv[2:] or None)")
    run = lambda *domains: subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *domains], stderr=subprocess.PIPE)
    both = [run(), run("urban", "rural")]
    assert [p.wait() for p in both] == [0, 0], [p.stderr.read().decode()[-500:] for p in both]
    task = small("loveda", 2, 32)
    assert [mini.verify(folder(task, tmp_path, d)) for d in ("rural", "urban")] == [16, 16], "neither entry was lost"
    assert not leftovers(tmp_path)


def test_a_process_that_comes_second_keeps_what_is_there(tmp_path, monkeypatch):
    task = small("loveda", 1, 32)
    place, real = folder(task, tmp_path, "rural"), mini.write_tiles
    first = []

    def overtaken(*args):
        yield from real(*args)
        monkeypatch.setattr(mini, "write_tiles", real)
        mini.build(task, tmp_path)
        first.append([p.stat().st_ino for p in sorted(place.rglob("*"))])
    monkeypatch.setattr(mini, "write_tiles", overtaken)
    mini.build(task, tmp_path, ["rural"])
    assert [p.stat().st_ino for p in sorted(place.rglob("*"))] == first[0] and not leftovers(tmp_path)
    assert [mini.verify(folder(task, tmp_path, d)) for d in ("rural", "urban")] == [8, 8]


def test_an_oracle_shares_the_target(built):
    task, root = built
    best = oracle(task, "gf1")
    assert folder(best, root, "gf1") == folder(task, root, "gf1")
    mini.build(best, root)
    assert mini.verify(folder(best, root, "gf1_oracle")) == 12 and mini.verify(folder(task, root, "gf2")) == 16
    data = DomainDataModule(mini.build_tiles(best, root))
    assert len(data.source) == 6 and list(data.targets) == ["gf1"]


def test_a_bar_is_shown_when_asked_for(tmp_path, capsys):
    task = small("loveda", 1, 32)
    mini.build(task, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    mini.build(task, tmp_path / "b", progress=True)
    assert "loveda: rural" in "".join(capsys.readouterr())


# ---- what is wrong is named

def test_missing_changed_and_new_files_are_named(built, tmp_path):
    task, root = built
    shutil.copytree(root, tmp_path / "copy")
    place = folder(task, tmp_path / "copy", "gf1")
    images = sorted((place / "images").iterdir())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError) as error: mini.build(task, tmp_path / "copy")
    for part in ("2 files are not as the manifest says", f"{images[0].name} is missing", f"{images[1].name} differs", f"Delete {place}, it is built again"):
        assert part in str(error.value)
    shutil.rmtree(place)
    mini.build(task, tmp_path / "copy")
    (place / "images/mine.tif").write_text("x")
    with pytest.raises(ValueError, match="mine.tif is not in the index"): mini.build_tiles(task, tmp_path / "copy")


def test_a_damaged_index_or_manifest_is_named(built, tmp_path):
    task, root = built
    shutil.copytree(root, tmp_path / "copy")
    index = folder(task, tmp_path / "copy", "gf1") / "index.csv"
    index.write_text(index.read_text().replace("gf1_0", "gf1_9", 1))
    with pytest.raises(ValueError, match="gf1-.*index.csv differs"): mini.build(task, tmp_path / "copy")
    (index.parent.parent / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not JSON.*delete .*fbp_cross_sensor"): mini.build(task, tmp_path / "copy")


@pytest.mark.parametrize("code, about", [(errno.ENOSPC, "the disk is full: free some space"),
                                         (errno.EACCES, "you may not write there"), (errno.EROFS, "read-only")])
def test_a_disk_that_takes_no_more(tmp_path, monkeypatch, code, about):
    task, count, real = small("loveda", 2, 32), [], mini._write_tif

    def failing(path, *args, **kwargs):
        count.append(path)
        if len(count) == 5: raise OSError(code, os.strerror(code), str(path))
        real(path, *args, **kwargs)
    monkeypatch.setattr(mini, "_write_tif", failing)
    with pytest.raises(OSError, match=f"{about}.*SPECTRALMOE_CACHE") as error: mini.build(task, tmp_path)
    assert error.value.errno == code and not leftovers(tmp_path)
    assert not folder(task, tmp_path, "rural").exists()
    monkeypatch.setattr(mini, "_write_tif", real)
    mini.build(task, tmp_path)
    assert mini.verify(folder(task, tmp_path, "rural")) == 16


def test_gdal_reports_a_full_disk_in_its_own_class(tmp_path, monkeypatch):
    def failing(path, *args, **kwargs): raise rasterio.errors.RasterioIOError("No space left on device")
    monkeypatch.setattr(mini, "_write_tif", failing)
    with pytest.raises(OSError, match="the disk is full.*SPECTRALMOE_CACHE"):
        mini.build(small("loveda", 1, 32), tmp_path)
    assert not leftovers(tmp_path)


def test_a_cache_that_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("here")
    monkeypatch.setenv("SPECTRALMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="SPECTRALMOE_CACHE"): mini.build(small("loveda", 1, 32))


def test_a_cache_that_cannot_be_written_can_be_read(built, monkeypatch):
    task, root = built
    def refuse(*args, **kwargs): raise PermissionError(errno.EACCES, "Permission denied")
    for name in ("tempfile.mkdtemp", "os.replace"): monkeypatch.setattr(f"spectralmoe.files.{name}", refuse)
    assert len(DomainDataModule(mini.build_tiles(task, root)).source) == 8
    with pytest.raises(OSError, match="you may not write there.*SPECTRALMOE_CACHE"):
        mini.build(oracle(task, "sentinel2"), root)


def test_an_unknown_field_region_or_domain(tmp_path):
    task = small("loveda")
    def with_view(**new):
        return replace(task, simulated={**task.simulated, "rural": [replace(task.simulated["rural"][0], **new)]})
    with pytest.raises(TypeError, match="domain 'rural', view of 'countryside'.*no field hase. Did you mean 'haze'"):
        mini.build(with_view(fields={"hase": 0.3}), tmp_path)
    with pytest.raises(ValueError, match="view of 'countryside'.*haze = -1"):
        mini.build(with_view(fields={"haze": -1}), tmp_path)
    with pytest.raises(ValueError, match="no such region"):
        mini.build(with_view(region="moon"), tmp_path)
    with pytest.raises(ValueError, match="no simulated domain 'suburban'. Did you mean 'urban'"):
        mini.build(task, tmp_path, ["suburban"])
    with pytest.raises(ValueError, match="files of your own"): mini.build("wildfire_cross_region", tmp_path)
    assert not list(tmp_path.rglob("*.tif"))


# ---- what is in them

@pytest.mark.parametrize("key", SEVEN)
def test_every_class_occurs_in_every_domain(key):
    shares = mini.class_shares(key, 12)
    assert (shares > 0.005).all().all(), shares[shares <= 0.005].stack()
    assert (shares.sum() - 1).abs().max() < 0.002


def test_heights_belong_to_the_tiles(built):
    task, root = built
    seen = mini.heights(task, "sentinel2", 3)
    assert seen.rgb.shape == (3, 3, 48, 48) and seen.rgb.min() >= 0 and seen.rgb.max() <= 1
    assert seen.height.min() >= 0 and seen.height.max() > 4 and seen.label.max() < task.n_classes
    tile = sorted(folder(task, root, "sentinel2").glob("images/sentinel2_0_*.tif"))[0]
    with rasterio.open(tile) as file: rgb = file.read([3, 2, 1])
    assert torch.equal(seen.rgb[0], torch.from_numpy(rgb).float() / 255)
    fed = mini.heights(small("potsdam_vaihingen"), "vaihingen", 1)
    view = small("potsdam_vaihingen").simulated["vaihingen"][0]
    scene = render(mini.scene_domain("potsdam_vaihingen", "vaihingen", view), view.seeds[:1], 48)[0]
    assert torch.equal(fed.rgb[0], scene.image / 255), "infrared first, as it is fed"


def test_a_contact_sheet_has_a_row_per_kind():
    rows = lambda key: len(mini.contact_sheet(small(key, 1, 32), 2, dpi=20).axes) / 2
    assert (rows("loveda"), rows("fbp_cross_region"), rows("potsdam_vaihingen")) == (4, 6, 4)


def test_the_laboratory_is_built_from_one_ground(tmp_path):
    lab = shift_laboratory(["haze", "band_shift"], tiles=4, steps=1)
    lab = small(lab, 1, 32)
    mini.build(lab, tmp_path)
    masks = {}
    for d in mini.located(lab, tmp_path).targets:
        masks[d.name] = [rasterio.open(p).read() for p in sorted(Path(d.masks).iterdir())]
    for other in ("haze_1", "band_shift_1"):
        assert all(np.array_equal(a, b) for a, b in zip(masks["none"], masks[other], strict=True))


def test_masks_hold_the_classes_of_the_simulator(built):
    task, root = built
    said, entry = noted(folder(task, root, "gf2") / "images")
    assert tuple(said["classes"]) == SIMULATED and said["task"] == "fbp_cross_sensor" and entry["versions"]["rasterio"] == rasterio.__version__
    masks = np.stack([rasterio.open(p).read() for p in folder(task, root, "gf2").glob("masks/*")])
    values, pixels = np.unique(masks, return_counts=True)
    assert entry["labels"] == {str(v): n for v, n in zip(values.tolist(), pixels.tolist())} and set(values) <= set(task.label_map)


def test_a_run_is_known_by_its_recipe_on_any_machine():
    task = small("loveda")
    found = DomainDataModule(mini.build_tiles(task)).fingerprints
    assert found == {d.name: mini.fingerprint(task, d.name) for d in task.domains}
    moved = replace(task, simulated={k: [replace(v, first_seed=v.first_seed + 7) for v in vs] for k, vs in task.simulated.items()})
    assert all(mini.fingerprint(moved, name) != before for name, before in found.items())


# ---- before a run

def test_made_tiles_are_made_once_and_whole(cache, monkeypatch):
    monkeypatch.setattr(mini.make_tiles, "__defaults__", (4, 32, 0))
    places = [Path(mini.build_tiles("made_tiles", root).source.images) for root in (None, cache / "nowhere")]
    assert places[0] == places[1] and cache in places[0].parents and not leftovers(cache)
    own = mini.make_tiles(cache.parent / "data" / "made_tiles")
    assert Path(mini.build_tiles("made_tiles", own.parent).source.images) == own / "source" / "images"


def test_data_that_the_package_cannot_make_are_only_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError): mini.build_tiles("wildfire_cross_region", tmp_path)
    assert not list(tmp_path.iterdir())
