"""Pretraining: nothing held out is drawn, a pool is its recipe, a killed run ends as if it had not been, weights load."""
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectralmoe.backbones import load_dfm, load_vfm, shipped_weights
from spectralmoe.bands import SENSORS
from spectralmoe.simulator.domains import REGIONS, Domain, change
from spectralmoe.simulator.ground import CLASSES
from spectralmoe.simulator.pretraining import (
    HELD_OUT, TARGETS, HeightModel, Pool, draw_batch, explained, height_scores, held_out, held_out_table, model_card, new_model,
    predict_height, pretrain, probe, probe_scenes, random_domain, random_ground, random_region, render_group, render_pool, surface_targets)
from spectralmoe.simulator.spectra import SWATCHES

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(dim=32, n_layers=4, n_heads=2)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return render_pool(tmp_path_factory.mktemp("pool"), groups=2, scenes=2, size=64, workers=0, progress=None)


@pytest.fixture(scope="module")
def pool(folder): return Pool(folder)


def test_nothing_held_out_is_ever_drawn():
    drawn = [random_domain((11, i)) for i in range(2000)]
    assert not {held for d in drawn for held in held_out(d)}
    for d in drawn:
        region, bands = d.region, d.sensor.bands
        assert region.soil not in ("loess", "laterite") and not {"blue_metal", "brown_tile"} & set(region.roofs)
        assert region.crops[4] == 0 and region.sea == 0 and region.name not in REGIONS
        assert 0.02 <= d.haze <= 0.35 and 18 <= d.sun_zenith <= 50 and 130 <= d.day <= 260 and 1.2 <= d.gsd <= 6 and d.noise <= 0.004
        assert all(b.width >= 0.025 and not 0.615 < b.center < 0.645 and 0.44 <= b.center <= 1 for b in bands)
        (a, b, c) = (x.center for x in bands)
        assert not (a > 0.7 and 0.6 < b < 0.7 and 0.5 < c < 0.6), "IRRG"
    assert 0.45 < sum(d.sensor.name == "rgb" for d in drawn) / len(drawn) < 0.7
    assert len({d.region.soil for d in drawn}) == 4 and any(d.sensor.bands[0].center > 0.8 for d in drawn)


def test_the_ground_has_no_held_out_material_or_class():
    for i in range(12):
        layout = random_ground(random_region((5, i)), range(4), 48, 5.0)
        assert not torch.isin(layout.swatch, torch.tensor([SWATCHES.index(r) for r in HELD_OUT["roof"]])).any()
        assert not torch.isin(layout.label, torch.tensor([CLASSES.index(c) for c in ("orchard", "sea")])).any()


def test_held_out_reads_any_domain():
    s2 = SENSORS["sentinel2"].select(["B4", "B3", "B2", "B8"])
    domain = change(Domain(sensor=s2, haze=0.6, sun_zenith=60.0, day=280.0, gsd=10.0), soil="laterite", roofs=("brown_tile",), sea=0.5)
    assert set(held_out(domain)) == {"region plain", "soil laterite", "roof brown_tile", "orchard", "sea", "haze 0.6",
                                     "sun_zenith 60", "day 280", "gsd 10", "narrow red and green"}
    assert all(name in held_out_table() for name in ("loess", "blue metal", "0.35", "nir, red, green"))


def test_a_group_is_its_seed_and_index_and_two_domains_share_the_ground():
    a, b, other = render_group(3, scenes=2, size=48), render_group(3, scenes=2, size=48), render_group(4, scenes=2, size=48)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a.images, other.images) and not torch.equal(render_group(3, 1, 2, 48).images, a.images)
    assert not torch.equal(a.images[:2], a.images[2:]) and a.images.dtype == torch.uint8
    assert len(a.height) == 2 and len(a.images) == len(a.rgb) == 4
    assert a.images.float().std() > 10, "the stretch uses the eight bits"


def test_a_pool_is_resumed_and_made_the_same_by_processes(folder, tmp_path):
    names = sorted(f.name for f in folder.iterdir())
    assert names == ["00000.safetensors", "00001.safetensors", "pool.json"]
    again = render_pool(tmp_path, groups=2, scenes=2, size=64, workers=2, progress=None)
    assert all((again / n).read_bytes() == (folder / n).read_bytes() for n in names)
    when = (again / names[1]).stat().st_mtime_ns
    (again / names[0]).unlink()
    render_pool(tmp_path, groups=2, scenes=2, size=64, workers=0, progress=None)
    assert (again / names[1]).stat().st_mtime_ns == when
    assert (again / names[0]).read_bytes() == (folder / names[0]).read_bytes()
    with pytest.raises(ValueError, match="was made with .*'seed': 0.* expected .*'seed': 4"):
        render_pool(tmp_path, 2, seed=4, scenes=2, size=64, workers=0)


def test_an_interrupted_group_leaves_nothing_half_written(tmp_path, monkeypatch):
    import spectralmoe.simulator.pretraining as module
    def fail(*args, **kwargs): raise MemoryError("no room")
    monkeypatch.setattr(module, "render_group", fail)
    with pytest.raises(MemoryError): render_pool(tmp_path, 1, workers=0, progress=None)
    assert [f.name for f in tmp_path.iterdir()] == ["pool.json"]
    with pytest.raises(FileNotFoundError, match="make some with render_pool"): Pool(tmp_path)


def test_targets_are_what_they_are_called(pool):
    targets = surface_targets(pool.reflectance, pool.height[pool.scene])
    assert targets.shape[1] == len(TARGETS) == 8
    red, nir = pool.reflectance[:, 2].float(), pool.reflectance[:, 4].float()
    torch.testing.assert_close(targets[:, 6], (nir - red) / (nir + red))
    cell = pool.height[pool.scene[1], 2:4, 6:8].float().mean() / 50
    torch.testing.assert_close(targets[1, 7, 1, 3], cell)


def test_crops_and_targets_stay_aligned_through_turns(pool):
    marked = Pool.__new__(Pool)
    marked.__dict__.update(pool.__dict__)
    ramp = torch.arange(64.0)[:, None] * 2 + torch.arange(64.0) # brightest where height is greatest
    marked.images = ramp.expand_as(pool.images).to(torch.uint8)
    marked.height = ramp.expand_as(pool.height).to(torch.uint8)
    marked.reflectance = (ramp[::2, ::2] / 255).expand_as(pool.reflectance).half()
    marked.mean, marked.std = torch.zeros_like(pool.mean), torch.ones_like(pool.std)
    for step in range(12):
        b = draw_batch(marked, step, sides=(32,), tokens=64)
        plain = draw_batch(marked, step, sides=(32,), tokens=64, augment=False)
        for one, h, r in zip(b.images[:, 0], b.height, b.reflectance[:, 0]):
            gain = (one.amax() - one.amin()) / (h.float().amax() - h.float().amin())
            torch.testing.assert_close((one - one.amin()) / gain, h.float() - h.float().amin(), atol=0.02, rtol=1e-3)
            flat = torch.nn.functional.avg_pool2d(h.float()[None], 2)[0]
            assert torch.corrcoef(torch.stack([flat.flatten(), r.float().flatten()]))[0, 1] > 0.99
        assert torch.equal(plain.images[:, 0] * 255, plain.height.float())


@pytest.mark.parametrize("kind", ["vfm", "dfm"])
def test_tiny_pretraining_on_few_renderings_reduces_the_loss(kind, pool, tmp_path):
    run = pretrain(kind, pool, tmp_path, 80, tokens=256, every=20, lr=3e-3, device="cpu", probes=0, progress=None, **TINY)
    losses = [r["loss"] for r in json.loads((run / "history.json").read_text())["rows"]]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("kind", ["vfm", "dfm"])
def test_a_killed_run_ends_with_the_same_weights(kind, pool, tmp_path):
    few = dict(pool=pool, steps=7, tokens=64, every=2, device="cpu", probes=0, **TINY)
    def kill(line):
        if "step 4" in line: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): pretrain(kind, folder=tmp_path / "a", progress=kill, **few)
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["checkpoint.pt"]
    with pytest.raises(ValueError, match="steps 7 there, 8 asked for"):
        pretrain(kind, folder=tmp_path / "a", progress=None, **few | dict(steps=8))
    for name in "ab": pretrain(kind, folder=tmp_path / name, progress=None, **few)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    pretrain(kind, folder=tmp_path / "c", progress=None, **few | dict(seed=1))
    assert (tmp_path / "c" / "model.safetensors").read_bytes() != a
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["README.md", "config.json", "history.json", "model.safetensors"]


def test_the_callers_random_numbers_are_left_alone(pool, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    pretrain("vfm", pool, tmp_path, 2, tokens=64, device="cpu", probes=0, progress=None, **TINY)
    assert torch.equal(torch.rand(3), expected)


def test_written_weights_are_read_by_the_backbones_and_the_whole_depth_model(pool, tmp_path):
    few = dict(pool=pool, steps=2, tokens=64, device="cpu", progress=None, **TINY)
    vfm_folder, dfm_folder = (pretrain(k, folder=tmp_path / k, probes=0, **few) for k in ("vfm", "dfm"))
    vfm = load_vfm("mini_vfm", vfm_folder, in_bands=4, **TINY)
    dfm = load_dfm("mini_dfm", dfm_folder, **TINY)
    assert vfm.patch_size == dfm.patch_size == 8 and vfm.grid(64, 48) == dfm.grid(64, 48) == (8, 6)
    images = torch.randn(2, 3, 64, 48)
    heights = predict_height(dfm_folder, images)
    assert heights.shape == (2, 64, 48) and heights.amin() >= 0
    with pytest.raises(ValueError, match="expected .B, 3, H, W."): predict_height(dfm_folder, images[:, :2])


def test_the_depth_head_says_zero_and_can_leave_it():
    model = new_model("dfm", **TINY)
    torch.nn.init.constant_(model.encoder.head.conv3.bias, -50.0)
    out = model(torch.randn(1, 3, 32, 32))
    assert (out == 0).all()
    out.sum().backward()
    assert model.encoder.head.conv3.bias.grad.abs() > 0
    assert isinstance(model, HeightModel)
    with pytest.raises(ValueError, match="choose one of vfm"): new_model("mae")


def test_explained_and_probe_tell_good_from_bad(pool):
    class Knows(torch.nn.Module):
        def forward(self, images): return (self.wanted - pool.statistics[0]) / pool.statistics[1]
    batch = draw_batch(pool, 0, sides=(128,), augment=False)
    model = Knows()
    model.wanted = surface_targets(batch.reflectance, batch.height)
    assert min(explained(model, pool, pool.statistics, 1).values()) > 0.99
    model.wanted = model.wanted * 0
    assert max(explained(model, pool, pool.statistics, 1).values()) < 0.01
    scenes = probe_scenes(2, regions=("plain",))
    vfm = load_vfm("mini_vfm", "random", **TINY)
    assert probe(vfm, scenes, scenes, 60) > probe(vfm, scenes, scenes, 1) + 2
    assert probe(vfm, scenes, scenes, 5) == probe(vfm, scenes, scenes, 5)


def test_the_cli_command_of_the_error_message_exists():
    page = ROOT / "nbs" / "experiments" / "pretrain_mini.ipynb"
    from spectralmoe.reproduce import read_parameters
    assert {"profile", "install", "what", "steps", "pool", "seed", "folder"} <= set(read_parameters(page))


def test_package_data_are_declared():
    assert "recursive-include spectralmoe/assets" in (ROOT / "MANIFEST.in").read_text()
    setup = (ROOT / "setup.py").read_text()
    assert "package_data=" in setup and all(f"assets/*/*.{end}" in setup for end in ("json", "safetensors", "md"))


@pytest.fixture(params=["mini_vfm", "mini_vfm_no_height", "mini_dfm"])
def shipped(request):
    try: return request.param, shipped_weights(request.param)
    except FileNotFoundError as e: pytest.skip(f"not pretrained yet: {e}")


def test_shipped_files_load_offline_and_are_small(shipped):
    name, folder = shipped
    assert (folder / "model.safetensors").stat().st_size <= 12 * 2**20
    assert b'"F16"' in (folder / "model.safetensors").read_bytes()[:20_000]
    backbone = (load_dfm if name == "mini_dfm" else load_vfm)(name)
    assert "shipped weights" in repr(backbone) and backbone.patch_size == 8
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in backbone.model.parameters())
    random = (load_dfm if name == "mini_dfm" else load_vfm)(name, "random")
    assert random.fingerprint() != backbone.fingerprint()
    card, history = (folder / "README.md").read_text(), json.loads((folder / "history.json").read_text())
    assert "simulation-supervised" in card and "license: apache-2.0" in card and "laterite" in card
    plain = lambda text: re.sub(r"torch \S+, transformers \S+", "", text) # of the machine that wrote it
    assert plain(card) == plain(model_card(history)), "the card is that of the run"


def test_shipped_weights_are_worth_something(shipped):
    name, folder = shipped
    if name == "mini_dfm":
        scenes = probe_scenes(4, "planetscope", 10**6)
        assert height_scores(predict_height(name, scenes.images), scenes.height)["auc"] > 0.8
        return
    scenes = probe_scenes(6), probe_scenes(4, first=10**6)
    good, bad = (probe(load_vfm(name, w), *scenes) for w in (None, "random"))
    assert good > bad + (5 if name == "mini_vfm" else 2), (good, bad)


def test_a_depth_model_tells_more_to_who_was_not_taught_heights():
    found = {n: json.loads((shipped_weights(n) / "history.json").read_text())["results"]["probe"] for n in ("mini_vfm", "mini_vfm_no_height")}
    gain = {n: p["with_mini_dfm"] - p["pretrained"] for n, p in found.items()}
    assert gain["mini_vfm_no_height"] >= 4 > 2 > gain["mini_vfm"]


@pytest.fixture(scope="module")
def built_assets(tmp_path_factory):
    "What setup.py copies when it builds."
    folder = tmp_path_factory.mktemp("built")
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", folder / "b", "egg_info", "--egg-base", folder],
                   cwd=ROOT, check=True, capture_output=True)
    return folder / "b" / "lib" / "spectralmoe" / "assets"


def test_an_installed_package_brings_the_weights(shipped, built_assets):
    built = {p.name for p in (built_assets / shipped[0]).iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= built
