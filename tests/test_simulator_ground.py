"The ground over many seeds: what no single picture on a page shows."
from dataclasses import replace

import pytest
import torch

from spectralmoe.simulator.domains import REGIONS, Region
from spectralmoe.simulator.ground import CLASSES, LEGEND, blocks, lake, layouts, river, sea
from spectralmoe.simulator.parcels import Grid, districts

WET = Region("wet", river=1.0, lake=1.0, town=0.3, village=0.2)


def of(layout, name): return layout.label == CLASSES.index(name)


def grown(mask):
    "A mask and its neighbours to all sides, two cells wide."
    return torch.nn.functional.max_pool2d(mask[:, None].float(), 5, 1, 2)[:, 0] > 0


def test_the_same_ground_at_two_cell_sizes():
    fine, coarse = layouts(Region(), [5], 128, 2.0), layouts(Region(), [5], 64, 4.0)
    same = fine.label[:, ::2, ::2] == coarse.label
    assert same.float().mean() > 0.8


def test_a_lake_keeps_out_of_the_river_and_of_the_sea():
    grid = Grid(tuple(range(24)), 96, 4.0)
    region = replace(WET, sea=1.0)
    other = torch.maximum(river(grid, region), sea(grid, region))
    alone, beside = lake(grid, region), lake(grid, region, other)
    assert ((beside > 0) & (other > -24)).sum() == 0 and (beside > 0).any(2).any(1).float().mean() > 0.5
    assert ((alone > 0) & (other > 0)).any() # without the second argument they meet
    ground = layouts(WET, range(24), 96, 4.0)
    assert (of(ground, "lake") & grown(of(ground, "river"))).sum() == 0
    course = river(ground.grid, WET) > 2 # nothing but a bridge stands in the river
    assert (of(ground, "river") | of(ground, "road"))[course].all() and of(ground, "river")[course].float().mean() > 0.85


@pytest.mark.parametrize("cell", (2.0, 10.0))
def test_a_river_is_whole(cell):
    region = Region(river=1.0, river_width=20.0)
    water = river(Grid(tuple(range(12)), 96, cell), region) > 0
    rim = torch.zeros_like(water)
    rim[:, (0, -1)], rim[:, :, (0, -1)] = True, True
    reached = water & rim
    for _ in range(400): reached = water & (torch.nn.functional.max_pool2d(reached[:, None].float(), 3, 1, 1)[:, 0] > 0)
    assert reached.sum() >= 0.999 * water.sum() # every part flows in and out at the rim


def test_a_beach_does_not_close_the_mouth_of_a_river():
    region = replace(REGIONS["coast"], river=1.0, sea=1.0, river_width=60.0)
    ground = layouts(region, range(16), 96, 4.0)
    course = river(ground.grid, region) > 0
    assert (of(ground, "sand") & course).sum() == 0


def test_no_street_or_house_stands_at_a_lake():
    ground = layouts(replace(WET, town=0.9), range(16), 96, 3.0)
    for name in ("urban_building", "rural_building", "industrial_building", "road"):
        assert not (of(ground, name) & grown(of(ground, "lake"))).any(), name


def test_villages_show():
    for name in ("countryside", "orchard_valley", "terraces", "steppe", "plain"):
        ground = layouts(REGIONS[name], range(16), 128, 4.0)
        share = of(ground, "rural_building").float().mean()
        assert share > 0.01, (name, share)
    village = blocks(ground.grid, ground.region, districts(ground.grid, ground.region)).village
    assert 0.08 < of(ground, "rural_building")[village].float().mean() < 0.5
    assert not of(ground, "rural_building")[~village].any()


def test_forms_of_blocks_change_the_houses_alone():
    town = replace(REGIONS["city"], town=1.0, industry=0.0, river=0.0, lake=0.0)
    houses, courts, slabs = (layouts(replace(town, forms=f), range(4), 96, 2.0) for f in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    built = [of(ground, "urban_building") for ground in (houses, courts, slabs)]
    assert (built[0] != built[1]).float().mean() > 0.1 < (built[1] != built[2]).float().mean()
    torch.testing.assert_close(houses.ground, slabs.ground)


def test_every_region_is_rich_and_every_class_common_somewhere():
    most = torch.zeros(len(LEGEND))
    for region in REGIONS.values():
        label = layouts(region, range(12), 96, 4.0).label
        share = label.flatten().bincount(minlength=len(LEGEND)) / label.numel()
        assert (share > 0.01).sum() >= 8, region.name
        most = torch.maximum(most, share)
    assert (most > 0.01).all(), [c for c, m in zip(CLASSES, most) if m <= 0.01]
