"Benchmarks as data: recipes, merges, substitutes, oracles, the shift laboratory."
import json
from dataclasses import replace

import pytest

from spectralmoe.simulator import domains, ground
from spectralmoe.simulator.spectra import soil_spectrum
from spectralmoe.bands import as_sensor
from spectralmoe.benchmarks import (BENCHMARKS, SHIFTS, SIMULATED, Domain, View,
                                    oracle, shift_laboratory, with_heights)

SEVEN = ("whu_ohs", "fbp_cross_sensor", "fbp_cross_region", "flair", "loveda", "openearthmap", "potsdam_vaihingen")
MINI = [BENCHMARKS[k] for k in SEVEN]
each = pytest.mark.parametrize("task", MINI, ids=SEVEN)


def test_the_names_of_the_simulator_are_repeated_rightly():
    assert SIMULATED == ground.CLASSES


def test_seven_mini_tasks_and_no_other():
    assert tuple(k for k, t in BENCHMARKS.items() if t.world == "mini") == SEVEN
    assert all(t.title.startswith("mini: ") and t.paper == {} for t in MINI)
    assert {t.world for t in BENCHMARKS.values()} == {"mini", "real"}


@each
def test_a_recipe_is_plain_data_and_its_fields_exist(task):
    assert json.loads(json.dumps(task.to_dict()))["simulated"].keys() == task.simulated.keys()
    for views in task.simulated.values():
        for v in views:
            base = domains.Domain(region=domains.REGIONS[v.region])
            domains.change(base, **{k: tuple(x) if isinstance(x, list) else x for k, x in v.fields.items()})


@each
def test_targets_are_other_acquisitions_of_moderate_severity(task):
    source = task.simulated[task.source.name]
    total = sum(v.tiles for v in source)
    assert total == (192 if task.name == "whu_ohs" else 320)
    for d in task.targets:
        views = task.simulated[d.name]
        assert 2 <= len(views) <= 4 and sum(v.tiles for v in views) == 96
        for v in views:
            f = v.fields
            assert f["haze"] <= .6 and f["sun_zenith"] <= 62 and 90 <= f["day"] <= 300
            assert f["day"] > max(w.fields["day"] for w in source) + 10
            assert f["haze"] > max(w.fields["haze"] for w in source) - .05


def test_no_ground_is_used_twice():
    lab = shift_laboratory()
    tasks = [*MINI, *(oracle(t, d.name) for t in MINI for d in t.targets)]
    used = {}
    for t in tasks:
        for name, views in t.simulated.items():
            where = (str(dict((d.name, d.images) for d in t.domains)[name]))
            for v in views:
                for s in v.seeds: assert used.setdefault(s, where) == where
    lab_seeds = {s for views in lab.simulated.values() for v in views for s in v.seeds}
    assert lab_seeds.isdisjoint(used) and not set(range(10**6, 10**6 + 8)) & (lab_seeds | set(used))


def test_a_target_on_source_ground_is_refused():
    task = BENCHMARKS["loveda"]
    with pytest.raises(ValueError, match="80 seeds of target 'urban' are source seeds"):
        replace(task, simulated={**task.simulated, "urban": task.simulated["rural"][:1]})
    with pytest.raises(ValueError, match="expected every domain"): replace(task, simulated={"rural": ()})
    with pytest.raises(ValueError, match="no view of"): replace(task, simulated={**task.simulated, "urban": ()})


@pytest.mark.parametrize("wrong, about", [
    (dict(tiles=0), "0 tiles of 128"), (dict(size=0), "tiles of 0 pixels"), (dict(first_seed=-1), "from seed -1"),
    (dict(first_seed=10**6), "stretch is measured")])
def test_a_view_without_scenes_is_refused(wrong, about):
    with pytest.raises(ValueError, match=about): View(**dict(region="plain", tiles=4, first_seed=0) | wrong)


# ---- bands that change their meaning

def test_substitutes_are_said_wherever_the_task_is_shown():
    task = BENCHMARKS["potsdam_vaihingen"]
    said = "nir in place of red, red in place of green, green in place of blue"
    assert said in repr(task) and said in task._repr_html_() and task.bands == ("red", "green", "blue")
    assert json.loads(json.dumps(task.to_dict()))["targets"][0]["substitutes"]["red"] == "nir"
    fed = task.targets[0].fed_sensor
    assert "nir as red" in fed.name and fed.select(task.bands).wavelengths == (.83, .665, .56)
    assert task.input_sensor.wavelengths == (.665, .56, .49)


@pytest.mark.parametrize("name", [n for n, t in BENCHMARKS.items() if t.simulated])
def test_every_simulated_task_takes_a_band_of_heights(name):
    task = with_heights(name)
    assert all(d.fed_sensor.select(task.bands).names[-1] == "height" for d in task.domains)


def test_without_the_said_substitutes_infrared_is_refused():
    task = BENCHMARKS["potsdam_vaihingen"]
    with pytest.raises(ValueError, match=r"'aerial_irrg' has .*missing \[blue\]"):
        replace(task, targets=[replace(task.targets[0], substitutes={})])
    with pytest.raises(ValueError, match="sensor=None"): Domain("x", "images", substitutes={"red": "nir"})


def test_a_sensor_without_red_green_blue_needs_another_rgb():
    task, some = BENCHMARKS["fbp_cross_sensor"], as_sensor("gf2").select(["red", "nir"])
    with pytest.raises(ValueError, match=r"missing \[green, blue\]"):
        replace(task, source=replace(task.source, sensor=some))
    with pytest.raises(ValueError, match="rgb .* expected three of the bands red, nir"):
        replace(task, bands=("red", "nir"))


# ---- oracles

@each
def test_an_oracle_learns_the_target_and_meets_the_same_files(task):
    for d in task.targets:
        best = oracle(task.name, d.name)
        assert best.name == f"{task.name}-oracle-{d.name}" and best.targets == (d,)
        home, views = best.source, best.simulated[best.source.name]
        assert home.sensor == d.sensor and home.substitutes == d.substitutes
        assert [(v.region, v.fields) for v in views] == [(v.region, v.fields) for v in task.simulated[d.name]]
        total = sum(v.tiles for v in task.simulated[task.source.name])
        assert total - len(views) < sum(v.tiles for v in views) <= total
        kept = ("classes", "label_map", "bands", "rgb", "crop", "steps", "batch_size", "lr", "train_tiles")
        assert all(getattr(best, k) == getattr(task, k) for k in kept)


def test_only_a_simulated_target_has_an_oracle():
    with pytest.raises(ValueError, match="only a simulated target"): oracle("wildfire_cross_region", "south")
    with pytest.raises(ValueError, match="there are gf1, planetscope, sentinel2"): oracle("fbp_cross_sensor", "gf3")


# ---- the shift laboratory

def test_one_factor_at_a_time_on_the_same_ground():
    lab = shift_laboratory(tiles=8)
    assert [d.name for d in lab.targets] == ["none", *(f"{f}_{k}" for f in SHIFTS for k in range(1, 5))]
    none = lab.simulated["none"]
    for f, shift in SHIFTS.items():
        for k in range(1, 5):
            domain = next(d for d in lab.targets if d.name == f"{f}_{k}")
            for v, w in zip(none, lab.simulated[domain.name]):
                assert (v.seeds, v.region) == (w.seeds, w.region)
                moved = {x for x in w.fields if w.fields[x] != v.fields.get(x)}
                assert moved == (set() if f == "band_shift" else {shift.field})
                assert f == "band_shift" or w.fields[shift.field] == shift.severities[k]
            by = as_sensor(domain.sensor).wavelengths[0] - as_sensor("gf2").wavelengths[0]
            assert by == pytest.approx(shift.severities[k] if f == "band_shift" else 0)


def test_severity_zero_is_the_source():
    lab = shift_laboratory(["haze"], tiles=4, steps=2)
    assert [d.name for d in lab.targets] == ["none", "haze_1", "haze_2"]
    def first(view): return view.fields.get(shift.field, getattr(domains.Domain(), shift.field, None)) # gains are named where they are moved only
    for shift in SHIFTS.values():
        assert len(shift.severities) == 5 and len(set(shift.severities)) == 5
        if shift.field == "band_shift": continue
        assert {first(v) for v in lab.simulated["source"]} == {shift.severities[0]}
        assert {first(v) for v in lab.simulated["none"]} == {shift.severities[0]}


def test_soils_are_ordered_by_their_distance():
    spectra = [soil_spectrum(s) for s in SHIFTS["soil"].severities]
    far = [(s - spectra[0]).square().mean().sqrt().item() for s in spectra]
    assert far == sorted(far) and far[1] > 0
