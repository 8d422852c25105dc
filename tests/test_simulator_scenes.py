"Scenes: full grids of factors, sensors and refusals, and pixels that must not change from release to release."
from dataclasses import replace

import pytest
import torch

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.simulator.domains import REGIONS, Domain, change
from spectralmoe.simulator.ground import CLASSES, layouts
from spectralmoe.simulator.scenes import observe, render, stretch_of

INSIDE = ("gf2", "gf1", "planetscope", "ohs", "aerial_rgb", "aerial_rgbn", "aerial_irrg")
RAW = Domain("raw", stretch=None)


@pytest.mark.parametrize("other", (dict(day=300), dict(sun_zenith=65, sun_azimuth=250), dict(haze=0.6), dict(sensor="ohs"), dict(noise=0.02)))
def test_light_season_and_sensor_leave_the_ground_alone(other):
    start = change(RAW, region=REGIONS["delta"])
    ground = layouts(start.region, [2, 3], 64)
    for x, y in zip(observe(ground, start), observe(ground, change(start, **other))):
        assert torch.equal(x.label, y.label) and torch.equal(x.height, y.height)
        assert x.image.shape != y.image.shape or (x.image - y.image).abs().mean() > 1e-3


def test_coarse_pixels_keep_the_mean_height():
    start = change(RAW, region=REGIONS["delta"])
    ground = layouts(start.region, [2, 3], 64)
    coarse = observe(ground, change(start, sensor="gf1", gsd=6))
    assert coarse[0].label.shape == (32, 32)
    torch.testing.assert_close(coarse[0].height.mean(), ground.height[0].mean(), rtol=1e-3, atol=1e-3)


def test_vegetation_is_not_black_in_a_product():
    for name in ("delta", "plain", "savanna"):
        scene = torch.cat([s.image.flatten(1) for s in render(Domain(name, REGIONS[name]), range(4), 96)], 1)
        assert 60 < scene[1].median() < 170, (name, scene[1].median())


def test_products_are_whole_numbers_of_their_depth():
    stretched = render(change(RAW, stretch="own"), [1], 64)[0]
    assert torch.equal(stretched.image, stretched.image.round()) and 0 <= stretched.image.min() and stretched.image.max() <= 255
    raw = render(RAW, [1], 64)[0].image * (2**RAW.bits - 1)
    torch.testing.assert_close(raw, raw.round(), atol=1e-3, rtol=0)
    for name in INSIDE: assert render(Domain(sensor=name), [0], 32)[0].rgb().shape == (32, 32, 3)


@pytest.mark.parametrize("wrong, error, said", (
    (dict(sun_zenith=float("nan")), ValueError, "expected 0"), (dict(haze=-1), ValueError, "haze = -1"), (dict(day=0), ValueError, "day = 0"),
    (dict(rain=2), ValueError, "rain = 2"), (dict(gsd=0), ValueError, "gsd = 0"), (dict(noise=-0.1), ValueError, "noise"),
    (dict(bits=1), ValueError, "bits = 1"), (dict(roofs=()), ValueError, "roofs"), (dict(meadow=-1), ValueError, "meadow = -1"),
    (dict(calendar=float("nan")), ValueError, "calendar = nan"), (dict(sensor="gf3"), KeyError, "gf3"),
    (dict(sensor="sentinel2"), ValueError, "B11"), (dict(sun_zenit=3), TypeError, "Did you mean 'sun_zenith'")))
def test_bad_domains(wrong, error, said):
    with pytest.raises(error, match=said): change(Domain(), **wrong)


def test_bad_requests():
    with pytest.raises(TypeError, match="unexpected keyword"): Domain(fog=1)
    with pytest.raises(ValueError, match="size 0"): render(RAW, [0], 0)
    with pytest.raises(TypeError, match=r"\[4\]"): render(RAW, 4)
    blind = Sensor("blind", [Band("a", 0.5, 0.05), Band("b", 0.8, 0.05)])
    with pytest.raises(ValueError, match="of 4 bands for 2"):
        render(change(RAW, sensor=blind, stretch=stretch_of(RAW)), [0], 32)
    selected = SENSORS["sentinel2"].select(["blue", "green", "red", "nir"])
    assert render(replace(RAW, sensor=selected), [0], 32)[0].wavelengths == selected.wavelengths


# A scene of 64 pixels per sensor, seed 3, as version 0.1.0 rendered it: means of the product and of the reflectance per band (every eighth
# of the hyperspectral camera), mean height, pixels per class. Aerial cameras at 2 m, the others at their own pixel size. Rounding stays below
# the tolerances; anything more is another simulator, and needs another `tiles.SIMULATOR`.
AS_RENDERED = (
    ("gf2", "plain", [129.1, 130.8, 106.5, 157.7], [0.1011, 0.1011, 0.0832, 0.2972], 0.16,
     {"irrigated": 889, "dry_crop": 1536, "forest": 9, "shrub": 385, "river": 688, "lake": 470, "bare": 51, "sand": 68}),
    ("gf1", "delta", [123.9, 115.9, 92.2, 146.1], [0.0971, 0.0931, 0.069, 0.238], 0.89,
     {"paddy": 1620, "irrigated": 365, "dry_crop": 79, "orchard": 13, "forest": 330, "shrub": 154, "meadow": 113, "lawn": 9, "tree": 2, "river": 763, "lake": 155, "pond": 234, "industrial_building": 5, "road": 180, "square": 3, "bare": 16, "sand": 55}),
    ("planetscope", "hills", [133.4, 129.5, 104.3, 121.6], [0.0937, 0.0895, 0.0689, 0.2107], 3.61,
     {"paddy": 110, "irrigated": 108, "dry_crop": 88, "orchard": 37, "forest": 1349, "shrub": 386, "meadow": 72, "river": 832, "lake": 881, "road": 3, "bare": 24, "sand": 206}),
    ("ohs", "coast", [110.5, 80.2, 88.1, 88.3], [0.1154, 0.0913, 0.1065, 0.1546], 1.08,
     {"paddy": 6, "irrigated": 274, "dry_crop": 16, "orchard": 168, "forest": 97, "shrub": 17, "meadow": 66, "lawn": 60, "tree": 11, "lake": 172, "pond": 16, "sea": 2485, "urban_building": 72, "rural_building": 5, "industrial_building": 219, "road": 150, "square": 122, "bare": 34, "sand": 106}),
    ("aerial_rgb", "old_town", [149.2, 155.5, 147.5], [0.1403, 0.1274, 0.119], 1.03,
     {"irrigated": 118, "dry_crop": 766, "lawn": 299, "tree": 120, "river": 580, "urban_building": 465, "road": 351, "square": 242, "bare": 905, "sand": 250}),
    ("aerial_rgbn", "city", [97.1, 117.2, 117.1, 92.2], [0.0777, 0.0982, 0.1054, 0.1293], 0.13,
     {"dry_crop": 64, "meadow": 13, "lawn": 482, "tree": 71, "river": 323, "lake": 2118, "road": 10, "bare": 925, "sand": 90}),
    ("aerial_irrg", "suburb", [87.9, 74.5, 91.3], [0.137, 0.0621, 0.0813], 0.31,
     {"irrigated": 292, "lawn": 497, "tree": 167, "lake": 2339, "road": 18, "bare": 783}),
    ("sentinel2", "dryland", [133.3, 134.5, 108.2, 188.4], [0.1122, 0.1233, 0.1032, 0.3677], 0.52,
     {"irrigated": 1294, "dry_crop": 709, "orchard": 288, "shrub": 576, "meadow": 36, "lawn": 17, "tree": 3, "river": 390, "pond": 91, "industrial_building": 56, "road": 166, "square": 20, "bare": 422, "sand": 28}),
)


@pytest.mark.parametrize("name, region, product, reflectance, height, pixels", AS_RENDERED, ids=[row[0] for row in AS_RENDERED])
def test_pixels_are_those_of_the_first_release(name, region, product, reflectance, height, pixels):
    sensor = SENSORS[name]
    if name == "sentinel2": sensor = sensor.select(["B2", "B3", "B4", "B8"])
    domain = Domain(name, REGIONS[region], sensor=sensor, gsd=2.0 if name.startswith("aerial") else sensor.gsd)
    ground = layouts(domain.region, [3], 64, domain.gsd)
    seen, raw = (observe(ground, d)[0] for d in (domain, change(domain, stretch=None)))
    bands = slice(None, None, 8 if name == "ohs" else 1)
    torch.testing.assert_close(seen.image.mean((1, 2))[bands], torch.tensor(product), atol=0.3, rtol=0)
    torch.testing.assert_close(raw.image.mean((1, 2))[bands], torch.tensor(reflectance), atol=2e-4, rtol=0)
    assert abs(seen.height.mean().item() - height) < 0.03
    counts = seen.label.flatten().bincount(minlength=len(CLASSES))
    expected = torch.tensor([pixels.get(c, 0) for c in CLASSES])
    assert (counts - expected).abs().sum() <= 16, {c: n for c, n in zip(CLASSES, counts.tolist()) if n}
