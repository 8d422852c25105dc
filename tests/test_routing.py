"Routing maps: the right place, the right file, the right shares."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spectralmoe.benchmarks import IGNORE, BENCHMARKS
from spectralmoe.gating import Routing
from spectralmoe.routing import (expert_by_class, expert_by_domain, expert_colours, plot_layers, plot_shares, routing_maps,
                                 token_labels)

TASK = BENCHMARKS["made_tiles"].to_dict()
PLACE = (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_200_000.0)


class LeftRight(torch.nn.Module):
    "Tokens in the left half go to expert 0, the others to expert 1; the depth gate looks at top and bottom."
    def __init__(self, visual=4, depth=4, forced=None):
        super().__init__()
        self.scale, self.forced, self.task = torch.nn.Parameter(torch.ones(())), forced, TASK
        self.method, self.last_routing = "spectralmoe", []
        self.vfm, self.dfm = SimpleNamespace(patch_size=visual), SimpleNamespace(patch_size=depth)

    def predict(self, images):
        b, _, h, w = images.shape
        side = math.lcm(self.vfm.patch_size, self.dfm.patch_size if self.dfm else 1)  # filled up as the real model does
        def where(patch, axis):
            rows, columns = torch.meshgrid(*(torch.arange(0, -(-n // side) * side, patch) for n in (h, w)), indexing="ij")
            return ((columns >= w / 2) if axis == "x" else (rows >= h / 2)).expand(b, -1, -1)
        self.last_routing = [{"visual": self.routing(where(self.vfm.patch_size, "x")),
                              "depth": self.dfm and self.routing(where(self.dfm.patch_size, "y"))}] * 2
        return torch.zeros(b, h, w, dtype=torch.long)

    def routing(self, second):
        index = second.reshape(-1, 1).long() if self.forced is None else torch.full((second.numel(), 1), self.forced)
        scores = 5.0 * torch.nn.functional.one_hot(index[:, 0], 3)
        return Routing(index, torch.ones_like(index, dtype=torch.float), scores, scores.sum(0), scores.sum(0))


def sample(height=16, width=24):
    label = torch.zeros(height, width, dtype=torch.long)
    label[:, width // 2:] = 1
    label[:4] = IGNORE
    image = torch.rand(5, height, width, generator=torch.Generator().manual_seed(0))
    return {"image": image, "label": label, "valid": torch.ones(height, width, dtype=torch.bool), "name": "a.tif",
            "transform": PLACE, "crs": "EPSG:32610"}


def test_left_and_right_stay_left_and_right():
    routing = routing_maps(LeftRight(), sample())
    left = [[0, 0, 0, 1, 1, 1]] * 4
    assert routing.index["visual"].tolist() == [left] * 2
    assert routing.index["depth"][0].tolist() == [[0] * 6] * 2 + [[1] * 6] * 2
    assert routing.token_transform() == (40, 0, 500_000, 0, -40, 4_200_000)


def test_backbones_with_other_patches_keep_their_own_grid():
    routing = routing_maps(LeftRight(visual=4, depth=6), sample())  # filled up to 24 x 24, a multiple of both
    assert routing.index["visual"].tolist() == [[[0, 0, 0, 1, 1, 1]] * 4] * 2
    assert routing.index["depth"].tolist() == [[[0] * 4] * 2 + [[1] * 4]] * 2
    assert routing.token_transform("depth") == (60, 0, 500_000, 0, -60, 4_200_000)
    stale = LeftRight()
    stale.predict = lambda images: LeftRight.predict(stale, images[..., :8])
    with pytest.raises(ValueError, match="another forward pass"): routing_maps(stale, sample())


@pytest.mark.parametrize("height, width, grid", [(16, 24, (4, 6)), (13, 21, (4, 6))])
def test_geotiff_lies_where_the_image_lies(tmp_path, height, width, grid):
    rasterio = pytest.importorskip("rasterio")
    routing = routing_maps(LeftRight(), sample(height, width))
    files = {f.name: f for f in routing.to_geotiff(tmp_path / "maps")}
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == sorted(files)
    with rasterio.open(files["a-visual-experts.tif"]) as file:
        assert (file.count, file.shape, file.dtypes[0], file.crs.to_epsg()) == (2, grid, "uint8", 32610)
        for x, expert in ((5, 0), (width * 10 - 5, 1)):  # metres from the left edge
            assert next(file.sample([(500_000 + x, 4_200_000 - 5)])).tolist() == [expert] * 2
        assert file.bounds.right >= 500_000 + 10 * width > file.bounds.right - 40
    with rasterio.open(files["a-depth-entropy.tif"]) as file:
        assert file.dtypes[0] == "float32"
        np.testing.assert_array_equal(file.read(), routing.entropy["depth"])


def test_one_layer_carries_its_colours(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    model = LeftRight()
    predict = model.predict
    model.predict = lambda images: (predict(images), setattr(model, "last_routing", model.last_routing[:1]))[0]
    file = next(f for f in routing_maps(model, sample()).to_geotiff(tmp_path) if f.name == "a-visual-experts.tif")
    with rasterio.open(file) as file:
        assert [file.colormap(1)[e][:3] for e in range(3)] == expert_colours(3)


def test_plain_image_and_batch_of_one_agree():
    item = sample()
    batch = {k: v[None] if isinstance(v, torch.Tensor) else [v] for k, v in item.items()}
    plain = routing_maps(LeftRight(), item["image"], transform=PLACE, crs="EPSG:32610")
    batched = routing_maps(LeftRight(), item["image"][None], transform=PLACE, crs="EPSG:32610")
    for other in (plain, batched, routing_maps(LeftRight(), batch)):
        np.testing.assert_array_equal(other.index["visual"], routing_maps(LeftRight(), item).index["visual"])
        assert (other.transform, other.crs) == (PLACE, "EPSG:32610")
    with pytest.raises(ValueError, match="expected one image"):
        routing_maps(LeftRight(), torch.zeros(2, 5, 16, 16))


def test_forced_gate_shows_one_colour():
    routing = routing_maps(LeftRight(forced=2), sample())
    assert np.unique(routing.index["visual"]).tolist() == [2]
    assert (np.stack(list(routing.relative_entropy.values())) < 0.5).all()
    texts = [t.get_text() for ax in routing.figure().axes if ax.get_legend() for t in ax.get_legend().get_texts()]
    assert "expert 2: 100% / 100%" in texts and "expert 0: 0% / 0%" in texts


def test_tables_are_shares_and_leave_ignored_tokens_out():
    model, item = LeftRight(), sample()
    by_class = expert_by_class(model, [item, item])
    assert by_class.xs((0, "visual"), level=("layer", "modality"))[["expert 0", "expert 1"]].to_numpy().tolist() == [[1, 0], [0, 1]]
    assert by_class.xs((0, "visual"), level=("layer", "modality")).tokens.tolist() == [18, 18]  # the first of four rows of tokens is ignored, two images
    item["valid"][8:] = False
    by_domain = expert_by_domain(model, {"here": [item], "there": [sample(), sample()]})
    below = by_domain.xs((0, "depth"), level=("layer", "modality"))
    assert below.tokens.tolist() == [12, 48]
    assert below["expert 0"].to_dict() == {"here": 1.0, "there": 0.5}
    for table in (by_class, by_domain):
        np.testing.assert_allclose(table.filter(like="expert").sum(axis=1), 1)
        plot_shares(table)


def test_labels_vote_by_valid_pixels():
    label = torch.tensor([[[2, 2, IGNORE, IGNORE], [1, IGNORE, IGNORE, IGNORE], [0, 0, 1, 1]]])
    assert token_labels(label, 2, 3).tolist() == [[[2, IGNORE], [0, 1]]]


def test_no_adapter_names_the_method():
    model = LeftRight()
    model.method, model.predict = "frozen", lambda images: images[:, 0].long()
    with pytest.raises(ValueError, match="'frozen' has no experts"):
        routing_maps(model, sample())


def test_without_depth_the_visual_gates_are_shown():
    model = LeftRight()
    model.dfm = None
    routing = routing_maps(model, sample())
    assert list(routing.index) == ["visual"] and routing.figure().axes
    with pytest.raises(KeyError, match="modality 'depth' was not routed"):
        plot_layers(routing, "depth")
