"What goes wrong with bands, and what the user is told."
from dataclasses import replace

import pytest

from spectralmoe.bands import SENSORS, Band, Sensor, match_bands
from spectralmoe.benchmarks import BENCHMARKS, IGNORE, Domain, benchmark


@pytest.mark.parametrize("name", SENSORS)
def test_permuting_bands_with_their_names_changes_nothing(name):
    sensor = SENSORS[name]
    shuffled = sensor.select(sensor.names[1::2][::-1] + sensor.names[::2])
    pixel = dict(zip(sensor.names, range(len(sensor))))
    moved = [pixel[n] for n in shuffled.names]
    assert moved != list(range(len(sensor)))
    assert [moved[i] for i in match_bands(shuffled, sensor)] == list(range(len(sensor)))
    assert [moved[i] for i in shuffled.rgb_index] == list(sensor.rgb_index)
    assert shuffled.select(sensor.names) == sensor


@pytest.mark.parametrize("alias", ["B2", "B02", "b2", "blue"])
def test_names_of_one_band(alias):
    assert SENSORS["sentinel2"].index(alias) == 1


@pytest.mark.parametrize("alias", ["B8A", "B8a", "B08A", "nir08"])
def test_narrow_near_infrared_is_not_the_wide_one(alias):
    assert SENSORS["sentinel2"].index(alias) == 8


@pytest.mark.parametrize("band, told", [
    (dict(center=664.6, width=31), "divide by 1000"), (dict(center=0.66, width=0), "width 0"),
    (dict(center=0.66, width=0.03, scale=0), "scale 0"), (dict(center=float("nan"), width=0.03), "center nan")])
def test_impossible_band(band, told):
    with pytest.raises(ValueError, match=told):
        Band("B4", **band)


def test_display_and_reflectance_meet_by_name_in_another_order():
    task = BENCHMARKS["wildfire_cross_product"]
    display, reflectance = (task.source.sensor, task.targets[0].sensor)
    file = SENSORS[reflectance].select(["B2", "B3", "B4", "B8", "B12"])
    assert match_bands(SENSORS[display], task.bands) == (0, 1, 2, 3, 4)
    assert match_bands(file, task.bands) == (2, 1, 0, 3, 4)


@pytest.mark.parametrize("change, told", [
    (dict(label_map={0: 0, 1: 1, 7: 9}), "{7: 9}"), (dict(label_map={0: 0, 1: IGNORE}), "leads to \\['burned'\\]"),
    (dict(palette=[(0, 0, 0)]), "1 colours for 2"), (dict(bands=["red", "green", "blue", "swir11"]), "swir11"),
    (dict(targets=[BENCHMARKS["wildfire_cross_product"].source]), "used once")])
def test_benchmark_is_refused_when_made(change, told):
    with pytest.raises(ValueError, match=told):
        replace(BENCHMARKS["wildfire_cross_product"], **change)


def test_missing_data_shows_the_tree_and_the_variable(tmp_path, monkeypatch):
    (tmp_path / "wildfire_ca" / "images").mkdir(parents=True)
    monkeypatch.setenv("SPECTRALMOE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as e:
        benchmark("wildfire_cross_region").at()
    for part in ("found   ", "MISSING", "index.csv", "SPECTRALMOE_DATA", str(tmp_path)):
        assert part in str(e.value)


def test_where_without_csv_is_refused():
    with pytest.raises(ValueError, match="expected a .csv"):
        Domain("north", "images", where={"region": "north"})
