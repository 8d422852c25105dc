"Whole scenes: odd rasters, kills, and files that other software reads. The page `inference` holds the rest."
import multiprocessing
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from torch import nn

from spectralmoe.bands import Band, Sensor
from spectralmoe.files import read_json
from spectralmoe.inference import LAYERS, beside, evaluate_scene, predict_scene, predict_scenes, seam_changes, write_polygons

cog_validate = pytest.importorskip("rio_cogeo").cog_validate
BANDS = ("red", "green", "blue", "nir")
CAMERA = Sensor("camera", [Band(n, c, .08, n) for n, c in zip(BANDS, (.665, .56, .49, .83))])
PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning", "ignore:.*looks wrong")


class Model(nn.Module):
    "Four classes, one per band: the strongest after blurring, so that a pixel's class depends on its surroundings."
    patch = 8

    def __init__(self, blur=9, constant=False, kill_after=None, bands=BANDS):
        super().__init__()
        self.blur, self.constant, self.kill_after, self.sizes = blur, constant, kill_after, []
        self.task = dict(name="own", classes=["a & b", "b", "c", "d"], palette=PALETTE, bands=list(bands), rgb=list(bands[:3]))
        n = len(bands)
        self.statistics = dict(bands=list(bands), mean=[100.] * n, std=[50.] * n)

    def probabilities(self, images):
        self.sizes.append(len(images))
        if self.kill_after is not None and len(self.sizes) > self.kill_after: os.kill(os.getpid(), signal.SIGKILL)
        if self.constant: return torch.tensor([0.1, 0.2, 0.4, 0.3])[:, None, None].expand(len(images), 4, *images.shape[-2:])
        return nn.functional.avg_pool2d(images[:, :4], self.blur, 1, self.blur // 2, count_include_pad=False).mul(3).softmax(1)


def pixels(height, width, bands=4, seed=0):
    noise = torch.rand(1, bands, -(-height // 12), -(-width // 12), generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(noise, (height, width), mode="bilinear")[0] * 200 + 1).numpy().astype("uint16")


def write(path, image, names=BANDS, interp=None, **how):
    count, height, width = image.shape
    how = dict(crs="EPSG:32631", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 4e6)) | how
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=image.dtype, **how) as file:
        if interp: file.colorinterp = interp
        file.write(image)
        for i, name in enumerate(names or (), 1): file.set_band_description(i, name)
    return path


def predict(tmp_path, scene, model=None, **how):
    how = dict(sensor=CAMERA, window=64, batch_size=4) | how
    return predict_scene(model or Model(), scene, tmp_path / "out" / "map.tif", **how)


def read(path):
    with rasterio.open(path) as file: return file.read()


def whole(image, model=None):
    "Class of every pixel, with the whole image seen at once."
    return (model or Model()).probabilities((torch.tensor(image[None].astype("float32")) - 100) / 50).argmax(1)[0].numpy()


@pytest.mark.parametrize("size", [(150, 203), (64, 64), (65, 300)])
def test_a_constant_model_gives_an_exactly_constant_map(tmp_path, size):
    made = predict(tmp_path, write(tmp_path / "a.tif", pixels(*size)), Model(constant=True), layers=["probabilities", "entropy", "margin"], overlap=0.3)
    values = {layer: np.unique(read(beside(made.path, layer)).reshape(-1, size[0] * size[1]), axis=1).ravel().tolist() for layer in ("classes", "probabilities", "margin")}
    assert values == {"classes": [2], "probabilities": [1000, 2000, 4000, 3000], "margin": [1000]}
    assert len(np.unique(read(beside(made.path, "entropy")))) == 1


@pytest.mark.parametrize("size", [(45, 70), (128, 128), (1, 90), (90, 1), (1, 1)])
def test_a_scene_smaller_than_a_window_is_seen_whole(tmp_path, size):
    image = pixels(*size)
    made = predict(tmp_path, write(tmp_path / "a.tif", image), Model(blur=1), window=128)
    assert (read(made.path)[0] == whole(image, Model(blur=1))).all()


def test_windows_agree_with_the_whole_image_and_with_windows_elsewhere(tmp_path):
    image = pixels(230, 310)
    maps = [read(predict(tmp_path, write(tmp_path / f"{i}.tif", image[:, r:, c:]), overlap=0.4, again=True).path)[0] for i, (r, c) in enumerate([(0, 0), (17, 23)])]
    assert (maps[0] == whole(image)).mean() > 0.99
    assert (maps[0][17:, 23:] == maps[1]).mean() > 0.99


def test_the_average_of_eight_positions_turns_with_the_image(tmp_path):
    image = pixels(64, 96)
    straight = read(predict(tmp_path, write(tmp_path / "a.tif", image), average=True, again=True).path)[0]
    turned = read(predict(tmp_path, write(tmp_path / "b.tif", np.ascontiguousarray(np.rot90(image, 2, (1, 2)))), average=True, again=True).path)[0]
    assert (np.rot90(turned, 2) == straight).mean() > 0.98


def test_killed_three_times_and_resumed_gives_the_same_bytes(tmp_path):
    image = pixels(400, 260)
    image[:, 100:180, :] = 0
    scene = write(tmp_path / "a.tif", image, nodata=0)
    how = dict(sensor=CAMERA, window=64, batch_size=4, layers=["entropy"])
    fork, strips = multiprocessing.get_context("fork"), []
    for after in (5, 7, 9):  # a strip is two batches, and is surely on the disk when the next but one begins
        process = fork.Process(target=predict_scene, args=(Model(kill_after=after), scene, tmp_path / "killed.tif"), kwargs=how)
        process.start(); process.join(60)
        assert process.exitcode == -signal.SIGKILL
        strips.append(read_json(tmp_path / ".killed.draft" / "journal.json")["strips"])
    assert strips == sorted(strips) and 0 < strips[0] < strips[-1]
    last, straight = (predict_scene(Model(), scene, tmp_path / f"{name}.tif", **how) for name in ("killed", "straight"))
    assert 0 < last.strips[0] < straight.strips[0] and not (tmp_path / ".killed.draft").exists()
    for layer in ("classes", "entropy"): assert beside(last.path, layer).read_bytes() == beside(straight.path, layer).read_bytes()


def test_empty_windows_are_not_computed(tmp_path):
    image = pixels(256, 256)
    image[:, :, 70:] = 0
    model = Model()
    made = predict(tmp_path, write(tmp_path / "a.tif", image, nodata=0), model, overlap=0)
    assert sum(model.sizes) == 8
    assert made.valid == 70 / 256 and (read(made.path)[0, :, 70:] == 255).all() and read(made.path)[0, :, :70].max() < 4


PLACES = {
    "rotated": dict(transform=rasterio.Affine(8, 2, 5e5, 2, -8, 4e6)),
    "south up": dict(transform=rasterio.Affine(10, 0, 5e5, 0, 10, 4e6)),
    "across the antimeridian": dict(crs="EPSG:4326", transform=rasterio.Affine(0.01, 0, 179.5, 0, -0.01, -16)),
    "no place": dict(crs=None, transform=rasterio.Affine.identity()),
    "BigTIFF, tiled": dict(BIGTIFF="YES", tiled=True, blockxsize=32, blockysize=32, compress="deflate"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_place_and_bytes_of_the_scene_are_kept(tmp_path, place):
    image = pixels(100, 130)
    scene = write(tmp_path / "a.tif", image, **place)
    made = predict(tmp_path, scene, layers=["margin"])
    for layer in ("classes", "margin"):
        path = beside(made.path, layer)
        with rasterio.open(scene) as a, rasterio.open(path) as b: assert (a.shape, a.crs, a.transform) == (b.shape, b.crs, b.transform)
        assert cog_validate(path) == (True, [], [])
    assert (read(made.path)[0] == whole(image)).mean() > 0.99


def test_points_and_rpcs_are_kept(tmp_path):
    points = [GroundControlPoint(row, col, 5e5 + 10 * col, 4e6 - 10 * row, 1.5) for row, col in ((0, 0), (0, 99), (79, 0), (79, 99))]
    scene = tmp_path / "points.tif"
    with rasterio.open(scene, "w", "GTiff", 100, 80, 4, dtype="uint16", gcps=points, crs="EPSG:32631") as file: file.write(pixels(80, 100))
    made = predict(tmp_path, scene)
    with rasterio.open(made.path) as file: found, crs = file.gcps
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points] and crs.to_epsg() == 32631
    with pytest.raises(ValueError, match="warp the map first"): write_polygons(made.path, tmp_path / "a.gpkg", "abcd")
    rpc = RPC(height_off=100., height_scale=500., lat_off=40., lat_scale=.1, line_den_coeff=[1.] + [0.] * 19, line_num_coeff=[0., 0., -1.] + [0.] * 17, line_off=40.,
              line_scale=40., long_off=3., long_scale=.1, samp_den_coeff=[1.] + [0.] * 19, samp_num_coeff=[0., 1.] + [0.] * 18, samp_off=50., samp_scale=50.)
    scene = tmp_path / "rpc.tif"
    with rasterio.open(scene, "w", "GTiff", 100, 80, 4, dtype="uint16", rpcs=rpc) as file: file.write(pixels(80, 100))
    with rasterio.open(predict(tmp_path, scene, again=True).path) as file: assert file.rpcs.to_dict() == rpc.to_dict() | dict(err_bias=file.rpcs.err_bias, err_rand=file.rpcs.err_rand)


def test_alpha_nan_and_masks_are_nothing(tmp_path):
    image, gone = pixels(90, 90), np.s_[:, 20:50, 30:60]
    alpha = np.full((1, 90, 90), 65535, "uint16")
    alpha[gone] = 0
    scenes = [write(tmp_path / "alpha.tif", np.concatenate([image, alpha]), (), [ColorInterp.gray, *[ColorInterp.undefined] * 3, ColorInterp.alpha])]
    floats = image.astype("float32")
    floats[2:3][gone] = np.nan
    scenes.append(write(tmp_path / "nan.tif", floats, nodata=np.nan))
    for scene in scenes:
        found = read(predict(tmp_path, scene, again=True).path)
        assert (found[gone] == 255).all() and (found == 255).sum() == 900


@pytest.mark.parametrize("count", [224, 426])
def test_hundreds_of_bands_with_bad_ones(tmp_path, count):
    sensor = Sensor("spectrometer", [Band(f"b{i}", 0.4 + 2.1 * i / count, .01) for i in range(1, count + 1)], nodata=0)
    image = pixels(40, 50, count)
    image[count // 2:count // 2 + 20] = 0
    scene, wanted = write(tmp_path / "a.tif", image, ()), ("b5", "b90", "b30", f"b{count}")
    made = predict(tmp_path, scene, Model(blur=1, bands=wanted), sensor=sensor)
    assert (read(made.path)[0] == whole(image[[4, 89, 29, count - 1]], Model(blur=1))).all()
    bad = f"b{count // 2 + 3}"
    with pytest.raises(ValueError, match=rf"no pixel has a value in all 4 bands: 1 of 4 bands have no value at all \({bad}\)"), pytest.warns(UserWarning, match="leave them out"):
        predict(tmp_path, scene, Model(bands=("b5", "b90", "b30", bad)), sensor=sensor, again=True)


def test_what_is_no_scene_is_refused_with_the_reason(tmp_path):
    with rasterio.open(tmp_path / "palette.tif", "w", "GTiff", 20, 20, 1, dtype="uint8") as file:
        file.write(np.zeros((1, 20, 20), "uint8")); file.write_colormap(1, {0: (255, 0, 0, 255)})
    with pytest.raises(ValueError, match="positions in a colour table"): predict(tmp_path, tmp_path / "palette.tif")
    (tmp_path / "empty.tif").touch()
    with pytest.raises(OSError, match="empty.tif is empty"): predict(tmp_path, tmp_path / "empty.tif")
    torn = write(tmp_path / "torn.tif", pixels(300, 300), ())
    torn.write_bytes(torn.read_bytes()[:400_000])
    with pytest.raises(OSError, match="torn.tif cannot be read at row"): predict(tmp_path, torn)
    with pytest.raises(ValueError, match="3 bands, named nowhere"): predict(tmp_path, write(tmp_path / "three.tif", pixels(30, 30, 3), ()))
    with pytest.raises(ValueError, match="no pixel has a value"): predict(tmp_path, write(tmp_path / "none.tif", pixels(30, 30) * 0, nodata=0))
    a, b = (write(tmp_path / f"{n}.tif", pixels(30, 30 + i)[:1], (n,)) for i, n in enumerate(BANDS[:2]))
    with pytest.raises(ValueError, match=r"green.tif lies on another grid than .*red.tif: 30 x 31 px"): predict(tmp_path, [a, b])
    assert not list((tmp_path / "out").glob("*"))


def test_the_map_is_what_other_software_expects(tmp_path):
    image = pixels(700, 1100)
    image[:, :40, :40] = 0
    made = predict(tmp_path, write(tmp_path / "a.tif", image, nodata=0), window=256, layers=["probabilities"], vector=50)
    assert all(cog_validate(p) == (True, [], []) for p in made.files if p.suffix == ".tif")
    with rasterio.open(made.path) as file:
        assert (file.block_shapes[0], file.overviews(1), file.nodata, file.descriptions) == ((512, 512), [2, 4], 255, ("class",))
        assert [file.colormap(1)[i] for i in range(4)] == [(*c, 255) for c in PALETTE] and file.colormap(1)[255][3] == 0
        classes = file.read(1)
    with rasterio.open(made.path, overview_level=0) as file: assert set(np.unique(file.read(1))) <= {0, 1, 2, 3, 255}  # no class in between
    assert "<Category>a &amp; b</Category>" in Path(f"{made.path}.aux.xml").read_text() and 'label="a &amp; b"' in made.path.with_suffix(".qml").read_text()
    with rasterio.open(beside(made.path, "probabilities")) as file:
        assert (file.descriptions, file.scales[0], file.nodata) == (("a & b", "b", "c", "d"), 1e-4, 65535)
        assert (file.read().argmax(0) == classes)[classes != 255].mean() > 0.999
    import pyogrio.raw
    about, _, _, (names, values, sizes) = pyogrio.raw.read(beside(made.path, "polygons", ".gpkg"))
    assert sizes.min() >= 50 and sizes.sum() == (classes != 255).sum() and set(values) == {0, 1, 2, 3} and names[values == 0][0] == "a & b"


def test_borders_of_windows_do_not_show(tmp_path):
    image = pixels(512, 512, seed=3)
    plain, blended = (predict(tmp_path, write(tmp_path / f"{overlap}.tif", image), Model(blur=25), overlap=overlap, again=True) and
                      seam_changes(tmp_path / "out" / "map.tif", range(64, 512, step), range(64, 512, step)) for overlap, step in ((0, 64), (0.25, 48)))
    assert blended[0] < 1.5 * blended[1] < plain[0]


def test_scores_of_a_scene_are_those_of_its_map(tmp_path):
    image = pixels(200, 150)
    scene, label = write(tmp_path / "a.tif", image), whole(image).astype("uint8")
    label[:30] = 9
    mask = write(tmp_path / "mask.tif", label[None], ())
    scores = evaluate_scene(Model(), scene, mask, {0: 0, 1: 1, 2: 2, 3: 3, 9: 255}, CAMERA, window=64)
    found = read(predict(tmp_path, scene, overlap=0).path)[0]
    assert (scores.n_pixels, scores.oa) == (170 * 150, (found == label)[30:].mean())


def test_several_scenes_through_any_map(tmp_path):
    scenes = [write(tmp_path / f"{i}.tif", pixels(40, 40, seed=i)) for i in range(3)] + [tmp_path / "gone.tif"]
    handed = []
    each = lambda job, paths: [handed.append(p) or job(p) for p in paths]
    made = predict_scenes(Model(), scenes, tmp_path / "maps", each, sensor=CAMERA, window=64)
    assert handed == scenes and [type(v).__name__ for v in made.values()] == [*["ScenePrediction"] * 3, "FileNotFoundError"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="0.0 GB free, and draft and maps of 40 x 40 px"): predict(tmp_path, write(tmp_path / "a.tif", pixels(40, 40)))
