"A model whose bands were matched by wavelength predicts scenes of any sensor; maps of unlabelled targets; weights that are not here."
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from typer.testing import CliRunner

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.benchmarks import benchmark
from spectralmoe.cli import app
from spectralmoe.explorer import look_inside
from spectralmoe.inference import beside, predict_scene, scene_for, trained_on
from spectralmoe.own.matched import MatchedBands
from spectralmoe.own.spectra import response
from spectralmoe.runs import PROFILES, choose_profile, planned, require_weights, run_folder, run_grid, run_method
from spectralmoe.segmentor import Segmentor

CUBE = Sensor("cube", [Band(f"c{i}", round(0.45 + 0.01 * i, 3), 0.012) for i in range(46)])
OTHER = Sensor("other", [Band(f"d{i}", round(0.446 + 0.012 * i, 3), 0.014) for i in range(40)])
AT = np.linspace(0.4, 1.0, 1201)
RNG = np.random.default_rng(0)
GROUND = np.cumsum(RNG.normal(0, 0.02, (4, 1201)), 1) + 0.4  # a spectrum per corner of a scene


def seen(sensor, side=64, seed=0):
    "The same ground through the responses of a sensor, as digital numbers."
    weights = response(sensor.bands, AT)
    spectra = GROUND @ (weights / weights.sum(1, keepdims=True)).T  # (4, bands)
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    parts = np.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y])
    return np.clip(10000 * np.einsum("kyx,kb->byx", parts, spectra), 1, 65000).astype("uint16")


def write(path, pixels, sensor=None, unit="nm", bad=(), left=5e5, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = 1000 if unit == "nm" else 1
    with rasterio.open(path, "w", driver=how.pop("driver", "GTiff"), count=len(pixels), height=pixels.shape[1], width=pixels.shape[2], dtype=pixels.dtype, crs="EPSG:32631",
                       transform=rasterio.Affine(10, 0, left, 0, -10, 4e6), **how) as file:
        file.write(pixels)
        for i, b in enumerate(sensor.bands if sensor else (), 1):
            file.update_tags(i, wavelength=f"{b.center * factor:g}", fwhm=f"{b.width * factor:g}", wavelength_units=unit, bbl=str(int(b.name not in bad)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A tiny model of a spectrometer and a camera of four bands; the target has no labels."
    home = tmp_path_factory.mktemp("matched")
    for i in range(4):
        write(home / f"a/images/{i}.tif", np.roll(seen(CUBE), i, 2), CUBE, left=5e5 + 9000 * i)
        write(home / f"a/masks/{i}.tif", (np.indices((64, 64)).sum(0)[None] // 16 % 2).astype("uint8"), left=5e5 + 9000 * i)
    for i in range(2): write(home / f"b/{i}.tif", seen(SENSORS["gf2"])[:, :, i:], left=8e5 + 9000 * i)
    (home / "mine.toml").write_text("""
name = "matched"
bands = { from = 440, to = 900, match = "wavelength" }
crop = 48
[labels]
0 = "land"
1 = "water"
[source]
images = "a/images"
masks = "a/masks"
sensor = "tags"
[targets.camera]
images = "b"
sensor = "gf2"
""")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = run_method(home / "mine.toml", "frozen", 0, choose_profile("smoke", inflate="by_wavelength"), home / "runs", progress=None)
    return home, run_folder(record, home / "runs"), Segmentor.from_pretrained(run_folder(record, home / "runs") / "model")


def by_hand(home, model, mix, pixels, names, name):
    "A scene resampled first, and predicted with bands by name by a model that knows nothing of wavelengths."
    made = np.tensordot(mix.weights(names), pixels.astype("float32"), 1)
    scene = write(home / f"{name}.tif", made)
    plain = Segmentor.from_pretrained(home / "plain")
    plain.task = {k: v for k, v in plain.task.items() if k not in ("matched", "sensor")}
    return predict_scene(plain, scene, home / f"{name}_map.tif", layers=["probabilities"], window=48, sensor=replace(trained_on(model), nodata=None))


def test_a_scene_is_read_as_in_training_and_one_of_another_sensor_by_its_wavelengths(trained, tmp_path):
    home, _, model = trained
    model.save_pretrained(home / "plain")
    known = MatchedBands.from_dict(model.task["matched"])
    assert known.out.names == ("B1", "B2", "B3", "B4") and list(known.sensors) == ["source", "camera"] and known.asked.low == 440
    um = write(tmp_path / "um.tif", seen(OTHER), OTHER, "um")
    for path, names in ((home / "a/images/0.tif", known.sensors["source"].names), (um, None)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scene = scene_for(model, path)
        names = names or [f"w{round(1e4 * b.center):05d}" for b in OTHER.bands]
        assert (scene.mix == known.mixes["source"]) == (path != um)
        assert any("40 bands of 'tags of um.tif' became the 4 of the model" in str(w.message) for w in said) == (path == um)
        ours = predict_scene(model, path, tmp_path / f"{path.stem}_map.tif", layers=["probabilities"], window=48)
        with rasterio.open(path) as file: hand = by_hand(home, model, scene.mix, file.read(), names, path.stem)
        with rasterio.open(beside(ours.path, "probabilities")) as a, rasterio.open(beside(hand.path, "probabilities")) as b: np.testing.assert_allclose(a.read(), b.read(), atol=1)
        with rasterio.open(ours.path) as a, rasterio.open(hand.path) as b: assert (a.read() == b.read()).mean() > 0.999
    with rasterio.open(home / "a/images/0.tif") as file: physical = np.tensordot(known.mixes["source"].weights(known.sensors["source"].names), file.read().astype("float32"), 1)
    with scene_for(model, home / "a/images/0.tif").reading() as read: np.testing.assert_allclose(read(3, 5, 40, 30), physical[:, 3:43, 5:35], rtol=1e-5)


def test_bad_bands_envi_headers_stacks_and_names(trained, tmp_path):
    home, _, model = trained
    bad = write(tmp_path / "bad.tif", seen(CUBE), CUBE, bad=("c20", "c21"))
    with pytest.warns(UserWarning, match=r"2 of 46 bands are called bad \(bbl = 0\) and left out"): scene = scene_for(model, bad)
    assert len(scene.mix.bands) < len(scene_for(model, home / "a/images/0.tif").mix.bands)
    cube = write(tmp_path / "cube.dat", seen(CUBE), driver="ENVI")
    listed = lambda key: f"{key} = {{{', '.join(f'{1000 * getattr(b, k):g}' for b in CUBE.bands)}}}\n" if (k := {"wavelength": "center", "fwhm": "width"}[key]) else ""
    header = cube.with_suffix(".hdr")
    header.write_text(header.read_text() + "wavelength units = Nanometers\n" + listed("wavelength") + listed("fwhm"))
    assert scene_for(model, cube).mix == scene_for(model, home / "a/images/0.tif").mix
    with pytest.raises(ValueError, match="What became what:"): predict_scene(model, write(tmp_path / "red.tif", seen(CUBE)[:15], Sensor("some", CUBE.bands[:15])), tmp_path / "no.tif")
    with pytest.warns(UserWarning, match="became the 4 of the model"): assert len(scene_for(model, write(tmp_path / "s2.tif", seen(SENSORS["sentinel2"].select(["B2", "B3", "B4", "B8"]))),
                                                                                          SENSORS["sentinel2"].select(["B2", "B3", "B4", "B8"])).mix.bands) == 4
    files = [write(tmp_path / f"x_{b}.tif", seen(SENSORS["sentinel2"].select([b]))) for b in ("B02", "B03", "B04", "B08")]
    with pytest.warns(UserWarning, match="4 bands of 'sentinel2' became the 4"): assert {p.path for p in scene_for(model, files, "sentinel2").parts} == {*map(str, files)}
    assert scene_for(model, home / "b/0.tif", "camera").mix == MatchedBands.from_dict(model.task["matched"]).mixes["camera"]


def test_the_command_line_names_what_fails_and_makes_the_rest(trained, tmp_path):
    home, run, _ = trained
    scenes = [home / "a/images/0.tif", tmp_path / "torn.tif", tmp_path / "text.tif", tmp_path / "nowhere.tif", home / "a/images/1.tif"]
    scenes[1].write_bytes(scenes[0].read_bytes()[:200_000])
    scenes[2].write_text("no image")
    result = CliRunner().invoke(app, ["predict", str(run / "model"), *map(str, scenes), "--to", str(tmp_path / "maps"), "--window", "48"])
    assert result.exit_code == 1 and sorted(p.name for p in (tmp_path / "maps").glob("*.tif")) == ["0.tif", "1.tif"]
    for name in ("torn", "text", "nowhere"): assert f"Error: {name}: " in result.output and f"{name}.tif" in result.output
    result = CliRunner().invoke(app, ["predict", str(run / "model"), str(home / "b/0.tif"), "--to", str(tmp_path / "camera"), "--task", str(home / "mine.toml"), "--sensor", "camera"])
    assert result.exit_code == 0 and (tmp_path / "camera/0.tif").is_file(), result.output


def test_maps_of_what_has_no_labels_are_those_of_predict(trained, tmp_path):
    home, run, model = trained
    maps = sorted((run / "maps/camera").glob("*.tif"))
    assert [p.name for p in maps] == ["0.tif", "1.tif"] and (run / "maps/camera/0.qml").is_file()
    alone = predict_scene(model, home / "b/1.tif", tmp_path / "1.tif", sensor="camera", window=48)
    with rasterio.open(maps[1]) as a, rasterio.open(alone.path) as b, rasterio.open(home / "b/1.tif") as image:
        np.testing.assert_array_equal(a.read(), b.read())
        assert (a.shape, a.transform, a.crs, a.nodata) == (image.shape, image.transform, image.crs, 255)
        assert [a.colormap(1)[i][:3] for i in (0, 1)] == [tuple(c) for c in model.task["palette"]]
        assert json.loads(a.tags()["SPECTRALMOE_CLASSES"]) == ["land", "water"] and a.tags()["SPECTRALMOE_TASK"] == "matched"


def test_published_weights_that_are_not_here_are_never_drawn_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: None)
    monkeypatch.setenv("SPECTRALMOE_CACHE", str(tmp_path / "cache"))
    drawn = []
    monkeypatch.setattr("spectralmoe.backbones.draw_weights", lambda *a: drawn.append(a))
    asks = dict(profile=replace(PROFILES["paper"], vfm=dict(name="dinov3-vitl16", weights="no/vfm"), dfm=dict(name="prompt-depth-anything-vitl", weights="no/dfm")), method="spectralmoe", seed=0)
    with pytest.raises(FileNotFoundError, match=r"(?s)weights no/vfm of dinov3-vitl16.*weights no/dfm of prompt.*vfm_weights=random"): run_method("made_tiles", folder=tmp_path / "runs", **asks)
    with pytest.raises(FileNotFoundError, match="nothing was started"): run_grid([dict(benchmark="fbp_cross_sensor", **asks)], tmp_path / "runs")
    assert planned("fbp_cross_sensor", **asks).config["weights"] == {"vfm": "not here", "dfm": "not here"} and not drawn
    assert run_method("fbp_cross_sensor", folder=tmp_path / "runs", train=False, **asks) is None
    result = CliRunner().invoke(app, ["run", "benchmark", "-p", "profile=paper", "-f", str(tmp_path / "runs")])
    assert result.exit_code == 1 and all(f"weights of {name}: model.safetensors" in result.output for name in ("dinov3-vitl16", "prompt-depth-anything-vitl")), result.output
    result = CliRunner().invoke(app, ["run", "benchmark", "-p", "profile=paper", "-p", "vfm_weights=no/vfm", "-p", "dfm_weights=random", "-f", str(tmp_path / "runs")])
    assert result.exit_code == 1 and "weights no/vfm of dinov3-vitl16" in result.output and "nothing was started" in result.output
    assert not list((tmp_path / "runs").rglob("*.ipynb")) and not drawn
    require_weights([(choose_profile("paper", "random", "random"), "spectralmoe"), (asks["profile"], "raw_conv"), *((PROFILES[n], "spectralmoe") for n in ("smoke", "demo", "tiny", "mini"))])


def test_the_saved_model_keeps_what_a_task_asked_for(trained):
    home, run, _ = trained
    config = json.loads((run / "model/config.json").read_text())["task"]["matched"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = benchmark(home / "mine.toml")
    assert config == task.matched and config["asked"] == {"low": 440, "high": 900, "overlap": 0.5, "without": []}


def test_the_explorer_reads_a_scene_as_prediction_does(trained, tmp_path):
    _, _, model = trained
    scene = write(tmp_path / "um.tif", seen(OTHER), OTHER, "um")
    made = predict_scene(model, scene, tmp_path / "map.tif", sensor="tags", window=64, overlap=0)
    inside = look_inside(model, scene, sensor="tags")
    with rasterio.open(made.path) as file: np.testing.assert_array_equal(file.read(1), inside.prediction)
    np.testing.assert_allclose([b.center for b in inside.sensor.bands], [b.center for b in trained_on(model).bands])
    part = look_inside(model, scene, sensor="tags", window=(8, 16, 32, 40))
    np.testing.assert_allclose(part.image, inside.image[:, 8:40, 16:56], rtol=1e-4)
    with pytest.raises(ValueError, match="more|wavelength|sensor"): look_inside(model, write(tmp_path / "untold.tif", seen(OTHER)))
