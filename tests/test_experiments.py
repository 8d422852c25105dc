"Experiments can be run with other parameters, and decide by rules that are code."
import math
from pathlib import Path

import nbformat
import pytest

from spectralmoe.reporting.records import RunRecord
from spectralmoe.reporting.studies import (area_table, curve_area, plot_curves, plot_shift, regime_decision, shift_curves, size_curve, smaller,
                                           validity_checks)
from spectralmoe.reporting.tables import pooled_scores
from spectralmoe.reproduce import read_parameters

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs" / "experiments").glob("[!_.]*.ipynb"))


def test_there_are_experiments():
    assert NOTEBOOKS, "nbs/experiments holds no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_parameters_cell_of_bare_literals_near_the_top(path):
    cells = nbformat.read(path, as_version=4).cells
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] < 6
    assert cells[0].source.startswith("# "), "the first cell gives the title"
    parameters = read_parameters(path)
    assert parameters and not [p.name for p in parameters.values() if not p.help], "every parameter says what it means"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_logic_lives_in_the_package(path):
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    defining = [c for c in code if any(line.startswith(("def ", "class ")) for line in c.splitlines())]
    assert len(defining) <= max(2, 0.05 * len(code))


def made(method, seed, benchmark="flair", tiles=64, steps=600, **right):
    "A record with so many of 100 pixels right in each domain."
    metrics = {d: pooled_scores([dict(classes=["a", "b"], confusion=[[k, 100 - k], [100 - k, k]])]) for d, k in right.items()}
    return RunRecord("x", benchmark, method, seed, config=dict(train_tiles=tiles, steps=steps), metrics=metrics, status="done", device="", code={}, versions={})


def filed(*records): return {Path(f"{r.id}.json"): r for r in records}


def regime(full_ahead_from, spectralmoe=50):
    "`full` is ahead on the target from so many tiles; `frozen` is done learning at 600 steps."
    return filed(*(made(m, s, tiles=n, steps=k, source=80 + (k >= 600) * 5, far=spectralmoe if m == "spectralmoe" else
                        70 + 4 * (m == "full") * (1 if n >= full_ahead_from else -1))
                   for m in ("frozen", "full", "spectralmoe") for s in (0, 1, 2) for n in (16, 64, 256) for k in (200, 600, 2000)))


@pytest.mark.parametrize("ahead, tiles, wins", [(16, 16, True), (64, 16, False), (256, 64, False), (999, 256, False)])
def test_the_regime_is_the_largest_size_at_which_frozen_is_not_behind(ahead, tiles, wins):
    found = regime_decision(regime(ahead), ["far"])
    assert (found.tiles, found.steps, found.full_wins) == (tiles, 600, wins)
    assert ("wins at every size" in str(found)) == wins


def test_how_spectralmoe_fares_has_no_say():
    a, b = (regime_decision(regime(256, score), ["far"]) for score in (1, 99))
    assert a[:3] == b[:3] and a.table.equals(b.table)


def test_the_decision_needs_both_methods_at_one_seed():
    records = regime(256)
    with pytest.raises(ValueError, match="run them first"):
        regime_decision({p: r for p, r in records.items() if (r.method == "frozen") == (r.seed == 0)}, ["far"])
    assert len(plot_curves(records, ["far"]).axes) == 6


def test_checks_pass_miss_or_were_not_run():
    records = filed(*(made("frozen", s, source=90, far=80) for s in (0, 1)), made("frozen", 0, "flair-oracle-far", source=85, far=60),
                    made("random", 0, source=85, far=70))
    shift, learnable, foundation = validity_checks(records, ["far"])
    assert (shift.verdict, shift.seeds, learnable.verdict, learnable.seeds, foundation.verdict) == ("pass", 2, "MISS", 1, "MISS")
    assert shift.value.half_width == 0 and math.isnan(learnable.value.half_width)
    assert {c.verdict for c in validity_checks({}, ["far"])} == {"not run"}


def test_areas_are_means_over_the_way():
    assert curve_area([0, 1, 3], [10, 20, 20]) == pytest.approx(55 / 3)
    assert curve_area([0.1, 0.2, 0.6], [40, 40, 40]) == pytest.approx(40)
    records = filed(*(made(m, s, "shift_lab", source=90, none=90, soil_1=90 - f, soil_2=90 - 2 * f, haze_1=90, haze_2=90)
                      for m, f in (("frozen", 2), ("full", 6)) for s in (0, 1)), made("full", 2, "shift_lab", none=90))
    soil, haze = shift_curves(records, ["soil", "haze"], 2, ["frozen", "full", "released"])
    assert soil.x == [0, 1, 2] and haze.x == [0.1, 0.2, 0.32]
    assert list(soil.scores["full"]) == [0, 1], "a seed without all severities has no curve"
    table = area_table([soil, haze])
    assert table.loc["frozen", "soil"].mean > table.loc["full", "soil"].mean and str(table.loc["released", "haze"]) == "not run"
    assert table.loc["frozen", "haze"].mean == pytest.approx(soil.scores["frozen"][0][0])
    assert len(plot_shift([soil, haze]).axes) == 2


def test_source_size_is_a_factor_from_many_to_few():
    curve = size_curve(filed(*(made("frozen", 0, "shift_lab", tiles=n, none=50 + n // 8) for n in (16, 256, 64))), ["frozen"])
    assert curve.severities == (256, 64, 16) and curve.x == [0, 1, 2] and curve.scores["frozen"][0] == sorted(curve.scores["frozen"][0], reverse=True)


def test_a_smaller_task_is_another_task():
    task = smaller("fbp_cross_sensor", 4)
    assert task.name == "fbp_cross_sensor_4" and task.world == "mini"
    assert all("/fbp_cross_sensor_4/" in str(path) for d in task.domains for path in (d.images, d.masks, d.names))
    assert {n: sum(v.tiles for v in views) for n, views in task.simulated.items()} == {"gf2": 4, "gf1": 3, "planetscope": 3, "sentinel2": 3}
