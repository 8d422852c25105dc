"Data of one's own: a task file read, looked at, trained on and predicted."
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch

from spectralmoe.bands import SENSORS, Band, Sensor, as_sensor
from spectralmoe.benchmarks import BENCHMARKS, Benchmark, benchmark
from spectralmoe.datasets import DomainDataModule, StepBatches, Statistics
from spectralmoe.own.check import check_task
from spectralmoe.own.proposal import propose_task, write_task_file

RNG = np.random.default_rng(0)


def write(path, pixels, left=5e5, top=4e6, step=10, crs="EPSG:32631", tags=(), **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype=pixels.dtype, crs=crs,
                       transform=rasterio.Affine(step, 0, left, 0, -step, top), **how) as file:
        file.write(pixels)
        for i, some in enumerate(tags, 1): file.update_tags(i, **some)
    return path


def image(bands=4, side=48): return RNG.integers(100, 3000, (bands, side, side)).astype("uint16")


def mask(side=48): return RNG.integers(0, 2, (1, side, side)).astype("uint8")


def folder(home, n=6, bands=4, far=0.0, masks=True, tags=()):
    for i in range(n):
        write(home / "images" / f"{i}.tif", image(bands), left=5e5 + far + 9000 * i, tags=tags)
        if masks: write(home / "masks" / f"{i}.tif", mask(), left=5e5 + far + 9000 * i)


def module(said, home, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DomainDataModule(Benchmark.from_dict({"name": "own", "labels": {"0": "land", "1": "water"}, "crop": 48, **said}, "mine.toml", home), batch_size=2, **options)


def test_a_csv_says_what_is_for_validation_and_what_is_grouped(tmp_path):
    folder(tmp_path, 6)
    rows = ["image,part,flight", *(f"{i}.tif,{'VAL' if i > 3 else 'train'},f{i // 2}" for i in range(6))]
    (tmp_path / "images/index.csv").write_text("\n".join(rows))
    source = dict(names="images/index.csv", masks="masks", sensor="gf2", split="part", group="flight")
    m = module(dict(source=source), tmp_path)
    assert [f.name for f in m._val.files] == ["4", "5"] and {f.scene for f in m.source.files} == {"f0", "f1", "f2"}
    (tmp_path / "images/index.csv").write_text("\n".join(rows).replace("4.tif,VAL", "4.tif,test"))
    with pytest.raises(ValueError, match="holds 'test': .*expected train or val"): module(dict(source=source), tmp_path)
    held = dict(images=["images/*.tif"], masks="masks", sensor="gf2", validation="[01].tif")
    assert sorted(f.name for f in module(dict(source=held), tmp_path)._val.files) == ["0", "1"]


def test_regions_are_validated_one_by_one_and_drawn_in_turn(tmp_path):
    folder(tmp_path / "big", 9)
    folder(tmp_path / "small", 3, bands=5, far=5e5)
    source = dict(big=dict(images="big/images", masks="big/masks", sensor="gf2"),
                  small=dict(images="small/images", masks="small/masks", sensor="sentinel2", file_bands=["B12", "B8", "B4", "B3", "B2"]))
    m = module(dict(source=source, bands=["red", "green", "blue"]), tmp_path)
    assert list(m.validation_regions()) == ["big", "small"]
    regions = [f.region for f in m.source_train.files]
    keys = [k for step in range(40) for k in StepBatches(len(regions), 4, 40, regions=regions).keys(step)]
    assert Counter(regions[i] for i, _ in keys) == {"big": 80, "small": 80}
    assert len({i for i, _ in keys}) == len(regions)
    small = next(i for i, f in enumerate(m.source.files) if f.region == "small")
    with rasterio.open(m.source.files[small].image) as file: stored = file.read([3, 4, 5])
    np.testing.assert_allclose(m.source.reader.read(small).image, stored * 1e-4, rtol=1e-5)
    assert m.train_dataloader().batch_sampler.regions and next(iter(m.train_dataloader()))["image"].shape == (2, 3, 48, 48)


def test_bands_are_matched_by_wavelength_and_read_so(tmp_path):
    folder(tmp_path / "a", 4)
    spectrometer = [dict(wavelength=f"{w}", fwhm="12", wavelength_units="nm") for w in range(450, 910, 10)]
    folder(tmp_path / "b", 2, bands=len(spectrometer), far=5e5, tags=spectrometer)
    said = dict(bands={"from": 440, "to": 900, "match": "wavelength"}, source=dict(images="a/images", masks="a/masks", sensor="gf2"),
                targets=dict(cube=dict(images="b/images", masks="b/masks", sensor="tags")))
    m = module(said, tmp_path)
    target, (name, mix) = m._targets["cube"], ("cube", m.benchmark.targets[0].layout.mix)
    with rasterio.open(target.files[0].image) as file: stored = file.read().astype("float64")
    names = [b.name for b in as_sensor(m.benchmark.targets[0].sensor).bands]
    for made, row in zip(target.reader.read(0).image, mix.of):
        np.testing.assert_allclose(made, sum(w * stored[names.index(n)] for n, w in row), rtol=1e-4)
        assert abs(sum(w for _, w in row) - 1) < 1e-5
    assert m.benchmark.reading["layout"] and m.benchmark.source_sensor["mix"]
    with pytest.raises(ValueError, match="What became what"): module(said | {"bands": said["bands"] | {"overlap": 0.999}}, tmp_path)


@pytest.mark.parametrize("bands", [1, 2, 430])
def test_any_number_of_bands(tmp_path, bands):
    from spectralmoe.runs import PROFILES
    from spectralmoe.segmentor import Segmentor
    tags = [dict(wavelength=f"{400 + 4.8 * i:.1f}", fwhm="5", bbl=str(int(i != 7)), wavelength_units="nm") for i in range(bands)]
    folder(tmp_path, 3, bands=bands, tags=tags)
    m = module(dict(source=dict(images="images", masks="masks", sensor="tags")), tmp_path)
    assert len(m.benchmark.bands) == bands - (bands > 7)
    p = PROFILES["smoke"]
    model = Segmentor.build(m.benchmark, p.vfm, p.dfm, "frozen", "pixel_shuffle")
    assert model.predict(m.source_train[0]["image"][None]).shape == (1, 48, 48)


def test_length_of_a_spectrum_does_not_count_where_it_is_normalised(tmp_path):
    folder(tmp_path, 4)
    m = module(dict(source=dict(images="images", masks="masks", sensor="gf2"), normalise="l2"), tmp_path)
    s = m.statistics
    x = torch.rand(4, 5, 5) + 0.1
    torch.testing.assert_close(s.standardise(x), s.standardise(7 * x))
    assert Statistics.from_dict(s.to_dict()).normalise == "l2" and "normalise" not in Statistics(("a",), (1,), (1,)).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.look_at_numbers()
    plain = replace(s, normalise="")
    m = module(dict(source=dict(images="images", masks="masks", sensor="gf2"), normalise="l2"), tmp_path, statistics=plain)
    with pytest.raises(ValueError, match="expected the same"): m.statistics


def test_one_scene_with_shapes_is_cut_split_and_scored(tmp_path):
    gpd = pytest.importorskip("geopandas")
    from shapely.geometry import box
    for name, left in (("north", 5e5), ("south", 6e5)): write(tmp_path / f"data/{name}.tif", image(4, 192), left=left, tags=[dict(wavelength=str(w), fwhm="60", wavelength_units="nm") for w in (485, 560, 660, 830)])
    cells = [(a, box(x, y, x + 300, y + 240)) for x0 in (5e5, 6e5) for a, x, y in ((("land", "water")[(i + j) % 2], x0 + 320 * i, 4e6 - 1920 + 240 * j) for i in range(6) for j in range(8))]
    gpd.GeoDataFrame({"kind": [a for a, _ in cells]}, geometry=[s for _, s in cells], crs="EPSG:32631").to_crs(4326).to_file(tmp_path / "data/drawn.gpkg")
    file, = write_task_file(tmp_path / "data", tmp_path / "mine.toml")
    task = benchmark(file)
    assert (task.source.layout.attribute, set(task.classes), task.targets[0].name) == ("kind", {"land", "water"}, "south")
    found = check_task(file)
    assert found.ok, found.errors
    assert any("labels are drawn from the shapes of drawn.gpkg" in d for d in found.doubts)
    table = found.tables["Labelled pixels"]
    assert (table.loc[["land", "water"]] > 0).all(axis=None) and table.sum().sum() == 2 * 192**2


def test_a_mask_in_another_system_is_warped_and_said(tmp_path):
    from rasterio.warp import transform_bounds
    folder(tmp_path, 4, masks=False)
    labels = np.kron(np.arange(4).reshape(2, 2) % 2, np.ones((60, 60))).astype("uint8")[None]
    for i in range(4):
        west, south, east, north = transform_bounds("EPSG:32631", "EPSG:4326", 5e5 + 9000 * i - 100, 4e6 - 580, 5e5 + 9000 * i + 580, 4e6 + 100)
        path = tmp_path / "masks" / f"{i}.tif"
        path.parent.mkdir(exist_ok=True)
        with rasterio.open(path, "w", driver="GTiff", count=1, height=120, width=120, dtype="uint8", crs="EPSG:4326",
                           transform=rasterio.transform.from_bounds(west, south, east, north, 120, 120)) as file: file.write(labels)
    (tmp_path / "mine.toml").write_text('name = "warped"\ncrop = 48\n[labels]\n0 = "a"\n1 = "b"\n[source]\nimages = "images"\nmasks = "masks"\nsensor = "gf2"\n')
    found = check_task(tmp_path / "mine.toml")
    assert found.ok, found.errors
    assert any("warped to the image's by nearest neighbour" in d for d in found.doubts)
    assert found.tables["Labelled pixels"].loc["(ignored)"].sum() == 0


def test_single_band_files_are_one_image(tmp_path):
    for i in range(3):
        for k, band in enumerate(("B02", "B03", "B04")): write(tmp_path / f"s2/{i}_{band}.tif", image(1), left=5e5 + 9000 * i)
        write(tmp_path / f"masks/{i}.tif", mask(), left=5e5 + 9000 * i)
    stack = ["*_B02.tif", "*_B03.tif", "*_B04.tif"]
    m = module(dict(source=dict(images="s2", masks="masks", stack=stack, sensor="sentinel2", file_bands=["B2", "B3", "B4"])), tmp_path)
    with rasterio.open(tmp_path / "s2/1_B03.tif") as file: np.testing.assert_allclose(m.source.reader.read(1).image[1], file.read(1) * 1e-4, rtol=1e-6)
    before = m.source.fingerprint()
    write(tmp_path / "s2/2_B04.tif", image(1), left=5e5 + 18000)
    assert m.source.fingerprint() != before  # a change in any of the files is another data set


def test_a_run_scores_regions_and_maps_what_has_no_labels(tmp_path, capsys):
    from spectralmoe.runs import choose_profile, planned, run_folder, run_method
    folder(tmp_path / "a", 4)
    folder(tmp_path / "b", 4, far=3e5)
    folder(tmp_path / "c", 2, far=6e5, masks=False)
    (tmp_path / "mine.toml").write_text('name = "parts"\ncrop = 48\n[labels]\n0 = "land"\n1 = "water"\n[source]\nsensor = "gf2"\n[source.a]\nimages = "a/images"\n'
                                        'masks = "a/masks"\n[source.b]\nimages = "b/images"\nmasks = "b/masks"\n[targets.new]\nimages = "c/images"\nsensor = "gf2"\n')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = run_method(tmp_path / "mine.toml", "frozen", 0, choose_profile("smoke", inflate="by_wavelength"), tmp_path / "runs", progress=None)
        assert list(record.metrics) == ["source"] and list(record.metrics["source"]["regions"]) == ["a", "b"]
        maps = sorted((run_folder(record, tmp_path / "runs") / "maps/new").glob("*.tif"))
        with rasterio.open(maps[0]) as made, rasterio.open(tmp_path / "c/images/0.tif") as scene:
            assert (made.shape, made.transform, made.crs) == (scene.shape, scene.transform, scene.crs) and set(np.unique(made.read(1))) <= {0, 1}
        assert len(maps) == 2 and record.config["profile"]["vfm"]["inflate"] == "by_wavelength"
        again = run_method(tmp_path / "mine.toml", "frozen", 0, choose_profile("smoke", inflate="by_wavelength"), tmp_path / "runs", progress=None, train=False)
    assert again.id == record.id
    config = planned("fbp_cross_sensor", "frozen", 0, "smoke").config
    assert "reading" not in config and "inflate" not in config["profile"]["vfm"]  # ids of older records stay


def test_the_check_names_every_damaged_file_and_the_same_ground(tmp_path):
    folder(tmp_path, 6)
    for name in ("images/1.tif", "masks/3.tif"): (tmp_path / name).write_bytes(b"nothing")
    text = 'name = "bad"\ncrop = 48\n[labels]\n0 = "land"\n1 = "water"\n[source]\nimages = "images"\nmasks = "masks"\nsensor = "gf2"\n'
    (tmp_path / "mine.toml").write_text(text)
    found = check_task(tmp_path / "mine.toml")
    assert not found.ok and [n in e for n, e in zip(("1.tif", "3.tif"), found.errors)] == [True, True] and len(found.errors) == 2
    for name in ("1", "3"):
        write(tmp_path / f"images/{name}.tif", image(), left=5e5 + 9000 * int(name))
        write(tmp_path / f"masks/{name}.tif", mask(), left=5e5 + 9000 * int(name))
    write(tmp_path / "zoom/z.tif", image(4, 24), left=5e5 + 9000 * 2, step=20)  # the same ground at another zoom and date
    (tmp_path / "mine.toml").write_text(text + '[targets.zoomed]\nimages = "zoom"\nsensor = "gf2"\n')
    assert any("lie on ground of the source" in d for d in check_task(tmp_path / "mine.toml").doubts)


def test_what_a_folder_holds_is_found(tmp_path):
    folder(tmp_path / "d/town", 9)
    folder(tmp_path / "d/village", 2, far=4e5, masks=False)
    text, _ = propose_task(tmp_path / "d", tmp_path / "mine.toml")
    assert "[targets.village]" in text and 'images = "d/town/images"' in text and "no masks were found: it is predicted" in text
    assert 'sensor = ""  # CHOOSE' in text and "# gf2: it has 4 bands as well" in text
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=r"key source.sensor = ''"): Benchmark.from_file(tmp_path / "mine.toml")


def test_tasks_of_the_package_read_as_before():
    assert all(task.reading == {} for task in BENCHMARKS.values())
    with pytest.raises(KeyError, match="path of a task file"): benchmark("lovedaa")
