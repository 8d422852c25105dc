"The simulated world: physics that must hold, one ground for all sensors, and bad input that must not pass."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.simulator.ground import (
    CLASSES, LEGEND, REGIONS, SWATCHES, WAVELENGTHS, Domain, Grid, Region, air, band_responses, blocks, canopy,
    canopy_library, cast_shadow, change, districts, divide, grow, illuminate, lake, layouts, noise, observe,
    point_spread, reflectance, render, river, sea, slope_light, soil_spectrum, stretch_of, swatches, water_spectrum)

INSIDE = ("gf2", "gf1", "planetscope", "ohs", "aerial_rgb", "aerial_rgbn", "aerial_irrg")
RAW = Domain("raw", stretch=None)


def of(layout, name): return layout.label == CLASSES.index(name)


def test_spectra_are_reflectances():
    for soil in ("loam", "sand", "humus"):
        table = swatches(soil)
        assert table.shape == (len(SWATCHES), len(WAVELENGTHS)) and (table > 0).all() and (table < .8).all()
    black, share = canopy_library()
    assert (black > -1e-4).all() and (black < .75).all() and (share >= -.01).all()
    assert WAVELENGTHS.diff().max() <= .0101 and (WAVELENGTHS[0], WAVELENGTHS[-1]) == (pytest.approx(.4), pytest.approx(1.))


def test_a_canopy_over_any_ground_is_prosail_over_that_ground():
    from prosail import run_prosail
    n, water, dry, angle, hot = 1.6, .018, .005, 38, .1
    direct = run_prosail(n, 40., 10., 0., water, dry, 1.5, angle, hot, 35., 0., 0., rsoil0=np.full(2101, .12))[:601:5]
    black, share = canopy("broad", 40., 1.5)
    assert np.abs(direct - (black + .12 * share).numpy()).max() < .006


@pytest.mark.parametrize("name", INSIDE)
def test_a_constant_spectrum_stays_constant(name):
    weights = band_responses(name)
    assert weights.shape == (len(SENSORS[name]), len(WAVELENGTHS))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    torch.testing.assert_close(weights @ WAVELENGTHS, torch.tensor(SENSORS[name].wavelengths), atol=.006, rtol=0)


def test_water_is_dark_in_the_near_infrared_and_soil_is_not():
    water, soil = water_spectrum(5, 3), soil_spectrum("loam")
    near = WAVELENGTHS > .85
    assert water[near].max() < .05 < soil[near].min()
    assert water_spectrum(sediment=60)[50] > water_spectrum(sediment=2)[50]


@pytest.mark.parametrize("zenith", (20, 45, 65))
def test_shadow_length_follows_the_tangent(zenith):
    tower = torch.zeros(1, 96, 96)
    tower[:, 60:70, 40:50] = 15.
    length = cast_shadow(tower, zenith, 180, 1.)[0, :60, 45].sum()
    assert abs(length - 15 * math.tan(math.radians(zenith))) < 1.6
    east = cast_shadow(tower, zenith, 90, 1.)[0]  # the sun in the east throws it westward
    assert east[65, :40].sum() > 3 and east[65, 50:].sum() == 0


def test_flat_ground_is_lit_evenly_and_walls_are_no_slopes():
    box = torch.zeros(1, 32, 32)
    box[:, 10:20, 10:20] = 12.
    torch.testing.assert_close(slope_light(box, 50, 130, 2.), torch.ones(1, 32, 32))


def test_air():
    for zenith in (0, 40, 75):
        clear, hazy = air(zenith, 0.), air(zenith, .6)
        for light in (clear, hazy):
            assert all(((x >= 0) & (x <= 1)).all() for x in light) and (light.direct + light.diffuse <= 1).all()
            assert (light.path.diff() < 0).all()
        assert (hazy.path > clear.path).all() and (hazy.direct < clear.direct).all() and (hazy.up < clear.up).all()
    red = WAVELENGTHS > .55
    slope = np.polyfit(WAVELENGTHS[red].log(), air(30, 0.).path[red].log(), 1)[0]
    assert abs(slope + 4) < .15


def test_a_scene_is_its_seed():
    alone, among = render(RAW, [7], 64)[0], render(RAW, [3, 7, 9], 64)
    for name in ("image", "label", "height", "ground"):
        torch.testing.assert_close(getattr(alone, name), getattr(among[1], name))
    assert (alone.label != among[0].label).any() and alone.seed == 7
    assert alone.image.shape == (4, 64, 64) and alone.image.dtype == torch.float32 and alone.label.dtype == torch.int64


def test_light_season_and_sensor_leave_the_ground_alone():
    start = change(RAW, region=REGIONS["delta"])
    ground = layouts(start.region, [2, 3], 64)
    for other in (dict(day=300), dict(sun_zenith=65, sun_azimuth=250), dict(haze=.6), dict(sensor="ohs"), dict(noise=.02)):
        a, b = observe(ground, start), observe(ground, change(start, **other))
        for x, y in zip(a, b):
            assert torch.equal(x.label, y.label) and torch.equal(x.height, y.height)
            assert x.image.shape != y.image.shape or (x.image - y.image).abs().mean() > 1e-3
    coarse = observe(ground, change(start, sensor="gf1", gsd=6))
    assert coarse[0].label.shape == (32, 32)
    torch.testing.assert_close(coarse[0].height.mean(), ground.height[0].mean(), rtol=1e-3, atol=1e-3)


def test_the_same_ground_at_two_cell_sizes():
    fine, coarse = layouts(Region(), [5], 128, 2.), layouts(Region(), [5], 64, 4.)
    same = fine.label[:, ::2, ::2] == coarse.label
    assert same.float().mean() > .8


def test_confusions_exist():
    city, delta, hills = (layouts(REGIONS[n], range(12)) for n in ("city", "delta", "hills"))
    roof, road = (of(city, n) & (city.swatch == SWATCHES.index("asphalt")) for n in ("urban_building", "road"))
    assert roof.sum() > 200 and road.sum() > 200 and city.height[roof].min() > 2.9 and city.height[road].median() == 0
    rho = reflectance(delta, grow(delta, 150), "gf2")
    flooded = of(delta, "paddy") & (grow(delta, 150).swatch >= SWATCHES.index("flood0")) & (delta.plant > 0)
    water = rho[:, 3][of(delta, "pond")].mean()
    assert (rho[:, 3][flooded] - water).abs().median() < .06
    assert hills.height[of(hills, "shrub")].max() <= 3 and hills.height[of(hills, "forest")].min() >= 6


def test_every_class_occurs_somewhere():
    there = torch.zeros(len(LEGEND), dtype=torch.long)
    for region in REGIONS.values():
        there += layouts(region, range(16), 96, 4.).label.flatten().bincount(minlength=len(LEGEND))
    assert (there > 0).all(), [c for c, n in zip(CLASSES, there) if not n]


WET = Region("wet", river=1., lake=1., town=.3, village=.2)


def grown(mask):
    "A mask and its neighbours to all sides, two cells wide."
    return torch.nn.functional.max_pool2d(mask[:, None].float(), 5, 1, 2)[:, 0] > 0


def test_a_lake_keeps_out_of_the_river_and_of_the_sea():
    grid = Grid(tuple(range(24)), 96, 4.)
    region = replace(WET, sea=1.)
    other = torch.maximum(river(grid, region), sea(grid, region))
    alone, beside = lake(grid, region), lake(grid, region, other)
    assert ((beside > 0) & (other > -24)).sum() == 0 and (beside > 0).any(2).any(1).float().mean() > .5
    assert ((alone > 0) & (other > 0)).any()  # without the second argument they meet
    ground = layouts(WET, range(24), 96, 4.)
    assert (of(ground, "lake") & grown(of(ground, "river"))).sum() == 0
    course = river(ground.grid, WET) > 2  # nothing but a bridge stands in the river
    assert (of(ground, "river") | of(ground, "road"))[course].all() and of(ground, "river")[course].float().mean() > .85


@pytest.mark.parametrize("cell", (2., 10.))
def test_a_river_is_whole(cell):
    region = Region(river=1., river_width=20.)
    water = river(Grid(tuple(range(12)), 96, cell), region) > 0
    rim = torch.zeros_like(water)
    rim[:, (0, -1)], rim[:, :, (0, -1)] = True, True
    reached = water & rim
    for _ in range(400): reached = water & (torch.nn.functional.max_pool2d(reached[:, None].float(), 3, 1, 1)[:, 0] > 0)
    assert reached.sum() >= .999 * water.sum()  # every part flows in and out at the rim


def test_a_beach_does_not_close_the_mouth_of_a_river():
    region = replace(REGIONS["coast"], river=1., sea=1., river_width=60.)
    ground = layouts(region, range(16), 96, 4.)
    course = river(ground.grid, region) > 0
    assert (of(ground, "sand") & course).sum() == 0


def test_no_street_or_house_stands_in_a_lake():
    ground = layouts(replace(WET, town=.9), range(16), 96, 3.)
    depth = lake(ground.grid, ground.region, river(ground.grid, ground.region))
    assert of(ground, "lake")[depth > 0].all()
    houses = of(ground, "urban_building") | of(ground, "rural_building") | of(ground, "industrial_building")
    assert not (houses & grown(of(ground, "lake"))).any()
    assert (of(ground, "road") & grown(of(ground, "lake"))).sum() == 0


def test_villages_show():
    for name in ("countryside", "orchard_valley", "terraces", "steppe", "plain"):
        ground = layouts(REGIONS[name], range(16), 128, 4.)
        share = of(ground, "rural_building").float().mean()
        assert share > .01, (name, share)
    village = blocks(ground.grid, ground.region, districts(ground.grid, ground.region)).village
    assert .08 < of(ground, "rural_building")[village].float().mean() < .5
    assert not of(ground, "rural_building")[~village].any()


def test_parcels_differ_in_size():
    grid = Grid(tuple(range(8)), 128, 4.)
    parts = districts(grid, Region())
    area = lambda pieces: torch.stack([(pieces.width * pieces.length)[i].log().std() for i in range(8)])
    assert area(divide(grid, parts, "parcel", 50, 100)).min() > .5
    assert area(divide(grid, parts, "parcel", 50, 100, uneven=0, spread=0)).max() < .3


def test_forms_of_blocks_change_the_houses_alone():
    town = replace(REGIONS["city"], town=1., industry=0., river=0., lake=0.)
    one = {k: layouts(replace(town, forms=f), range(4), 96, 2.) for k, f in
           dict(houses=(1, 0, 0), courts=(0, 1, 0), slabs=(0, 0, 1)).items()}
    built = {k: of(v, "urban_building") for k, v in one.items()}
    assert all(.1 < b.float().mean() < .6 for b in built.values())
    assert (built["houses"] != built["courts"]).float().mean() > .1 < (built["courts"] != built["slabs"]).float().mean()
    torch.testing.assert_close(one["houses"].ground, one["slabs"].ground)
    with pytest.raises(ValueError, match="three weights"): Region(forms=(1, 0))


def test_every_region_is_rich_and_every_class_common_somewhere():
    most = torch.zeros(len(LEGEND))
    for region in REGIONS.values():
        label = layouts(region, range(12), 96, 4.).label
        share = label.flatten().bincount(minlength=len(LEGEND)) / label.numel()
        assert (share > .01).sum() >= 8, region.name
        most = torch.maximum(most, share)
    assert (most > .01).all(), [c for c, m in zip(CLASSES, most) if m <= .01]


def test_haze_takes_contrast_and_adds_path():
    ground = layouts(Region(), [3], 64)
    rho = reflectance(ground, grow(ground, 190), "gf2")
    seen = torch.stack([illuminate(rho, ground, change(RAW, haze=h))[0] for h in (0., .1, .3, .6, 1., 2.)])
    contrast = seen.flatten(2).std(2)
    assert (contrast.diff(dim=0) < 0).all() and contrast[3, 0] < .6 * contrast[0, 0]
    zenith, haze, wave = 40., .6, torch.tensor([.55])
    mu, g, omega = math.cos(math.radians(zenith)), .5, .93  # the aerosol's part of the path, by hand
    phase = omega * (1 - g**2) / (1 + g**2 + 2 * g * mu)**1.5
    path = phase / (4 * (mu + 1)) * (1 - math.exp(-haze * (1 / mu + 1)))
    extra = air(zenith, haze, wave).path - air(zenith, 0., wave).path
    torch.testing.assert_close(extra, torch.tensor([path]), atol=1e-6, rtol=1e-4)
    assert ((air(zenith, haze).sharp > 0) & (air(zenith, haze).sharp <= air(zenith, haze).up)).all()


def test_vegetation_is_not_black_in_a_product():
    for name in ("delta", "plain", "savanna"):
        scene = torch.cat([s.image.flatten(1) for s in render(Domain(name, REGIONS[name]), range(4), 96)], 1)
        assert 60 < scene[1].median() < 170, (name, scene[1].median())


def test_season_moves_the_near_infrared():
    ground = layouts(REGIONS["plain"], range(6), 96)
    nir = {day: reflectance(ground, grow(ground, day), "gf2")[:, 3][of(ground, "dry_crop")].mean() for day in (20, 125)}
    assert nir[125] > 1.2 * nir[20]


@pytest.mark.parametrize("pixels, width", ((32, 0.), (24, 1.2), (64, 2.), (9, .5)))
def test_point_spread_conserves_energy(pixels, width):
    weights = point_spread(64, pixels, width)
    torch.testing.assert_close(weights.sum(1), torch.ones(pixels))
    assert (weights >= 0).all()


def test_noise_is_tied_to_metres():
    fine, coarse = noise(Grid((5,), 128, 2.), "a", 80), noise(Grid((5,), 64, 4.), "a", 80)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(fine, 2), coarse, atol=.01, rtol=0)


def test_products():
    stretched = render(change(RAW, stretch="own"), [1], 64)[0]
    assert torch.equal(stretched.image, stretched.image.round()) and 0 <= stretched.image.min() and stretched.image.max() <= 255
    raw = render(RAW, [1], 64)[0].image * (2**RAW.bits - 1)
    torch.testing.assert_close(raw, raw.round(), atol=1e-3, rtol=0)
    low, high = stretch_of(RAW)
    assert all(l < h for l, h in zip(low, high)) and len(low) == 4
    for name in INSIDE: assert render(Domain(sensor=name), [0], 32)[0].rgb().shape == (32, 32, 3)


@pytest.mark.parametrize("wrong, error, said", (
    (dict(sun_zenith=95), ValueError, "below the horizon"), (dict(sun_zenith=float("nan")), ValueError, "expected 0"),
    (dict(haze=-1), ValueError, "haze = -1"), (dict(haze="thick"), TypeError, "expected a number"),
    (dict(day=0), ValueError, "day = 0"), (dict(rain=2), ValueError, "rain = 2"), (dict(gsd=0), ValueError, "gsd = 0"),
    (dict(noise=-.1), ValueError, "noise"), (dict(bits=1), ValueError, "bits = 1"), (dict(stretch="auto"), ValueError, "'auto'"),
    (dict(forest=2), ValueError, "forest = 2"), (dict(soil="mud"), ValueError, "'mud'"), (dict(roofs=()), ValueError, "roofs"),
    (dict(crops=(1, 2)), ValueError, "five weights"), (dict(region="plain"), TypeError, "REGIONS"),
    (dict(sensor="gf3"), KeyError, "gf3"), (dict(sensor="sentinel2"), ValueError, "B11"),
    (dict(sun_zenit=3), TypeError, "closest: sun_zenith")))
def test_bad_domains(wrong, error, said):
    with pytest.raises(error, match=said): change(Domain(), **wrong)


def test_bad_requests():
    with pytest.raises(TypeError, match="unexpected keyword"): Domain(fog=1)
    with pytest.raises(ValueError, match="size 0"): render(RAW, [0], 0)
    with pytest.raises(ValueError, match="0 seeds"): render(RAW, [])
    with pytest.raises(TypeError, match=r"\[4\]"): render(RAW, 4)
    with pytest.raises(ValueError, match="cell 0"): layouts(Region(), [0], 16, 0)
    with pytest.raises(ValueError, match="not smaller than a cell"): observe(layouts(RAW.region, [0], 32, 4.), RAW)
    with pytest.raises(ValueError, match="same region"): observe(layouts(RAW.region, [0], 32), change(RAW, forest=.5))
    with pytest.raises(KeyError, match="no canopy"): canopy("moss", 30, 1)
    blind = Sensor("blind", [Band("a", .5, .05), Band("b", .8, .05)])
    scene = render(change(RAW, sensor=blind), [0], 32)[0]
    with pytest.raises(ValueError, match="red, green, blue"): scene.rgb()
    with pytest.raises(ValueError, match="of 4 bands for 2"):
        render(change(RAW, sensor=blind, stretch=stretch_of(RAW)), [0], 32)
    selected = SENSORS["sentinel2"].select(["blue", "green", "red", "nir"])
    assert render(replace(RAW, sensor=selected), [0], 32)[0].wavelengths == selected.wavelengths
