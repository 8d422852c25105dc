"Remote-sensing encoders: the libraries' own forward, the authors' own key names, and what is refused."
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from spectralmoe.bands import SENSORS, Band, Sensor
from spectralmoe.encoders.vit import patches_in_float32, read_as
from spectralmoe.encoders.spectral import (SPECTRAL_BACKBONES, SPECTRAL_FAMILIES, SenPaMAE, band_statistics, match_sentinel2,
    response_curves, sincos_table, spectral_bands)

GF2, S2 = SENSORS["gf2"], SENSORS["sentinel2"]
ORDER = ["nir", "red", "blue", "green"]
HAS_TORCHGEO = sys.version_info >= (3, 11)
needs_torchgeo = pytest.mark.skipif(not HAS_TORCHGEO, reason="torchgeo needs Python 3.11")
FAMILIES = [pytest.param(f, marks=needs_torchgeo if f in ("dofa", "copernicus-fm", "panopticon") else ())
    for f in ("dofa", "copernicus-fm", "panopticon", "softcon", "senpamae")]
size = lambda **more: dict(dict(dim=48, n_layers=2, n_heads=4, patch_size=16, side=4, bands=4), **more)


def drawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.requires_grad_(False).normal_(std=.08, generator=generator)
    return model.eval()


def built(name, seed=0, **more): return drawn(SPECTRAL_FAMILIES[name].build(size(**more)), seed)


def images(*shape): return torch.randn(*(shape or (2, 4, 64, 96)), generator=torch.Generator().manual_seed(1))


def run(name, model, pixels, sensor):
    "Patch tokens after every block."
    family, outputs = SPECTRAL_FAMILIES[name], []
    tokens, args = family.embed(model, pixels, None, sensor)
    for block in family.blocks(model):
        tokens = family.step(block, tokens, args)
        outputs.append(family.patches(tokens, args) if family.patches else tokens[:, 1:])
    return outputs


def fresh_from(name, published, **more):
    "A new model of the family, filled from a file in the authors' names; every key explained."
    model = built(name, seed=9, **more)
    format, ours, aside, unexpected = read_as(published, SPECTRAL_FAMILIES[name].formats, model.state_dict())
    assert not unexpected and set(ours) == set(model.state_dict())
    model.load_state_dict(ours, strict=True)
    return model, format, aside


# ---- against the libraries

@needs_torchgeo
def test_dofa_is_torchgeos_and_reads_the_authors_file():
    from torchgeo.models import DOFA
    theirs = drawn(DOFA(img_size=64, embed_dim=48, depth=2, num_heads=4, num_classes=0))
    theirs.pos_embed.data.copy_(sincos_table(48, 4))
    theirs.fc_norm = nn.Identity()
    published = {**theirs.state_dict(), "mask_token": torch.ones(1, 1, 48), "norm.weight": torch.ones(48),
        "norm.bias": torch.ones(48), "projector.weight": torch.ones(512, 48), "projector.bias": torch.ones(512)}
    ours, format, aside = fresh_from("dofa", published)
    assert format.name == "original" and len(aside) == 5
    assert fresh_from("dofa", theirs.state_dict())[1].name == "torchgeo"
    pixels = images(2, 4, 64, 64)
    expected = theirs.forward_features(pixels, list(GF2.wavelengths))
    torch.testing.assert_close(run("dofa", ours, pixels, GF2)[-1].mean(1), expected, atol=1e-5, rtol=0)


@needs_torchgeo
def test_copernicus_is_torchgeos_with_the_authors_epsilon():
    from torchgeo.models import CopernicusFM
    theirs = drawn(CopernicusFM(img_size=64, embed_dim=48, depth=2, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    theirs.fc_norm = nn.Identity()
    ours, _, aside = fresh_from("copernicus-fm", {**theirs.state_dict(), "mask_token": torch.ones(1, 1, 48)})
    assert all(k == "mask_token" or k.startswith("patch_embed_variable.") for k in aside)
    nm = lambda um: [1000 * w for w in um]
    for side in (64, 128): # the library interpolates square grids itself
        pixels = images(2, 4, side, side)
        expected = theirs.forward_features(pixels, torch.full((2, 4), float("nan")), nm(GF2.wavelengths), nm(GF2.widths))
        torch.testing.assert_close(run("copernicus-fm", ours, pixels, GF2)[-1].mean(1), expected, atol=1e-5, rtol=0)
    assert all(m.eps == 1e-6 for m in ours.blocks.modules() if isinstance(m, nn.LayerNorm))


@needs_torchgeo
def test_panopticon_is_torchgeos(monkeypatch):
    from torchgeo.models import panopticon
    create = partial(panopticon.timm.create_model, embed_dim=48, depth=2, num_heads=4, num_classes=0)
    monkeypatch.setattr(panopticon.timm, "create_model", create)
    theirs = drawn(panopticon.Panopticon(attn_dim=144, embed_dim=48, img_size=56).model)
    monkeypatch.undo()
    ours, _, aside = fresh_from("panopticon", {**theirs.state_dict(), "mask_token": torch.ones(1, 48)}, patch_size=14)
    assert sorted(aside) == ["mask_token", "norm.bias", "norm.weight"]
    theirs.norm = nn.Identity()
    pixels, ids = images(2, 4, 56, 56), torch.tensor([[485., 555, 660, 830]] * 2)
    expected = theirs.forward_features(dict(imgs=pixels, chn_ids=ids))[:, 1:]
    torch.testing.assert_close(run("panopticon", ours, pixels, GF2)[-1], expected, atol=1e-5, rtol=0)


@needs_torchgeo
def test_panopticon_cuts_nanometres_as_the_model_does():
    model = built("panopticon")
    at = lambda um: run("panopticon", model, images(1, 1, 64, 64), Sensor("one", (Band("b", um, .03),)))[-1]
    assert torch.equal(at(.6646), at(.664)) and not torch.equal(at(.6646), at(.665))
    assert torch.equal(at(.57), at(.5705)) # 1000 * .57 is 569.99... in floating point


def test_softcon_reads_the_authors_file_and_fits_its_kernel():
    import timm
    theirs = drawn(timm.create_model("vit_small_patch14_dinov2", in_chans=13, img_size=56, patch_size=14, embed_dim=48,
        depth=2, num_heads=4, num_classes=0))
    published = {**theirs.state_dict(), "mask_token": torch.ones(1, 48)}
    theirs.norm = nn.Identity()
    family, spec = SPECTRAL_FAMILIES["softcon"], SPECTRAL_BACKBONES["softcon-small"]
    whole, _, _ = fresh_from("softcon", published, patch_size=14, bands=13)
    pixels = images(2, 13, 56, 56)
    torch.testing.assert_close(run("softcon", whole, pixels, S2)[-1], theirs.forward_features(pixels)[:, 1:], atol=1e-5, rtol=0)
    four = built("softcon", patch_size=14, bands=4)
    four.load_state_dict(family.fit_bands(whole.state_dict(), spec, GF2))
    zeros = torch.zeros_like(pixels)
    zeros[:, [1, 2, 3, 7]] = pixels[:, :4]
    torch.testing.assert_close(run("softcon", four, pixels[:, :4], GF2)[-1], run("softcon", whole, zeros, S2)[-1], atol=1e-5, rtol=0)


def test_softcon_shares_a_kernel_among_narrow_bands():
    narrow = Sensor("narrow", (Band("a", .655, .01), Band("b", .665, .01), Band("c", .56, .03)))
    state = {"patch_embed.proj.weight": torch.arange(13.)[None, :, None, None]}
    fitted = SPECTRAL_FAMILIES["softcon"].fit_bands(state, SPECTRAL_BACKBONES["softcon-small"], narrow)
    assert fitted["patch_embed.proj.weight"].flatten().tolist() == [1.5, 1.5, 2.0]


# ---- SenPaMAE against a plain reading of its file

SENPA_NAMES = (("patch.", "linEmmbedingLayer."), ("response.", "linEmmbedingLayerResponsefunction.network."),
    ("gsd.", "linEmmbedingLayerGSD.network.0."), ("blocks.", "transformer."), ("pos_embed", "pos_embedding"))


def senpa_file(model, prefix="_orig_mod.encoder."):
    state = {}
    for key, value in model.state_dict().items():
        ours, theirs = next(pair for pair in SENPA_NAMES if key.startswith(pair[0]))
        state[prefix + theirs + key.removeprefix(ours)] = value
    width = len(model.patch.bias)
    norm = {prefix + f"layer_norm.{k}": torch.ones(width) for k in ("weight", "bias")}
    return {**state, **norm, prefix.replace("encoder", "decoder") + "mask_token": torch.zeros(1, 1, width)}


@pytest.mark.parametrize("prefix", ["_orig_mod.encoder.", "encoder."])
def test_senpamae_reads_the_authors_file(prefix):
    model = built("senpamae")
    ours, _, aside = fresh_from("senpamae", senpa_file(model, prefix))
    assert len(aside) == 3
    assert torch.equal(run("senpamae", ours, images(), GF2)[-1], run("senpamae", model, images(), GF2)[-1])


def test_senpamae_tokens_by_hand():
    model, pixels = built("senpamae"), images(1, 4, 64, 64)
    state = senpa_file(model, "")
    linear = lambda x, name: F.linear(x, state[name + ".weight"], state[name + ".bias"])
    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).flatten(2, 3) # (1, c, n, 256)
    tokens = linear(patches, "linEmmbedingLayer") + state["pos_embedding"][None]
    curve = response_curves(GF2)
    for i in (0, 2, 4, 6, 8): curve = linear(curve, f"linEmmbedingLayerResponsefunction.network.{i}").relu()
    gsd = torch.full((4, 1), 4.)
    for i in (0, 2, 4, 6, 8): gsd = linear(gsd if i == 0 else gsd.relu(), f"linEmmbedingLayerGSD.network.0.{i}")
    tokens = (tokens + (curve + gsd)[None, :, None]).flatten(1, 2) # (1, c * n, d), bands first
    for block in model.blocks: tokens = block(tokens)
    expected = tokens.unflatten(1, (4, 16)).mean(1)
    torch.testing.assert_close(run("senpamae", model, pixels, GF2)[-1], expected, atol=1e-5, rtol=0)


def test_responses_are_the_bands():
    curves, nm = response_curves(S2), torch.arange(300, 2601)
    assert curves.shape == (13, 2301) and curves.max() <= 1
    half = (curves >= .5).sum(1) # samples at 1 nm
    assert (half - torch.tensor(S2.widths) * 1000).abs().max() <= 1
    assert (nm[curves.argmax(1)] - torch.tensor(S2.wavelengths) * 1000).abs().max() <= .51


# ---- Galileo, where its authors' file is

def test_galileo_says_where_its_code_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "single_file_galileo", None)
    with pytest.raises(ModuleNotFoundError, match="single_file_galileo.py from https://github.com/nasaharvest/galileo"):
        SPECTRAL_FAMILIES["galileo"].build(size())


@pytest.mark.parametrize("sensor,groups", [("gf2", ["S2_RGB", "S2_NIR_10m"]),
    ("sentinel2", ["S2_RGB", "S2_Red_Edge", "S2_NIR_10m", "S2_NIR_20m", "S2_SWIR"])])
def test_galileo_is_its_authors(sensor, groups):
    code = pytest.importorskip("single_file_galileo")
    sensor = SENSORS[sensor]
    if len(sensor) == 13: sensor = sensor.select(code.S2_BANDS)
    model, pixels = built("galileo", patch_size=8), images(2, len(sensor), 32, 32)
    published = {k.replace("blocks.", "blocks.backbone.", 1): v for k, v in model.state_dict().items()}
    assert torch.equal(fresh_from("galileo", published, patch_size=8)[0].s_t_channel_embed, model.s_t_channel_embed)
    at = [code.SPACE_TIME_BANDS.index(b) for b in match_sentinel2("galileo", sensor, code.S2_BANDS)]
    s_t, s_t_m = torch.zeros(2, 32, 32, 1, 13), torch.ones(2, 32, 32, 1, 7)
    s_t[..., at] = pixels.permute(0, 2, 3, 1)[:, :, :, None]
    s_t_m[..., [list(code.SPACE_TIME_BANDS_GROUPS_IDX).index(g) for g in groups]] = 0
    empty = (torch.zeros(2, 32, 32, 16), torch.zeros(2, 1, 6), torch.zeros(2, 18))
    masked = (torch.ones(2, 32, 32, 3), torch.ones(2, 1, 3), torch.ones(2, 4))
    theirs = model(s_t, *empty, s_t_m, *masked, torch.full((2, 1), 5), 8, input_resolution_m=sensor.gsd,
        add_layernorm_on_exit=False)[0] # (b, h, w, t, groups, d)
    seen = [list(code.SPACE_TIME_BANDS_GROUPS_IDX).index(g) for g in groups]
    expected = theirs[:, :, :, 0, seen].mean(3).flatten(1, 2)
    torch.testing.assert_close(run("galileo", model, pixels, sensor)[-1], expected, atol=1e-5, rtol=0)
    wide = run("galileo", model, images(1, len(sensor), 32, 64), sensor)[-1]
    assert wide.shape == (1, 4 * 8, 48) and wide.isfinite().all()


def test_galileo_refuses_half_a_group():
    fit = lambda sensor: SPECTRAL_FAMILIES["galileo"].fit_bands({}, SPECTRAL_BACKBONES["galileo-nano"], sensor)
    with pytest.raises(ValueError, match=r"whole groups.*cannot use B1 \(B2\)"): fit(GF2.select(["blue", "nir"]))
    with pytest.raises(ValueError, match="each once"): fit(Sensor("twins", (Band("a", .83, .05), Band("b", .84, .05))))


# ---- what holds for all of them

@pytest.mark.parametrize("name", FAMILIES)
def test_order_of_bands_does_not_matter(name):
    family, other = SPECTRAL_FAMILIES[name], GF2.select(ORDER)
    model, pixels = built(name), images()
    turned = built(name)
    if name == "softcon": # its kernel is fitted to the sensor when the weights are read
        whole, spec = built(name, bands=13).state_dict(), SPECTRAL_BACKBONES["softcon-small"]
        for m, sensor in ((model, GF2), (turned, other)): m.load_state_dict(family.fit_bands(whole, spec, sensor))
    if name == "senpamae": # five random layers say too little of a response curve
        for m in (model, turned): [p.mul_(4) for p in m.response.parameters()]
    moved = pixels[:, [GF2.index(b) for b in ORDER]]
    first, second = run(name, model, pixels, GF2), run(name, turned, moved, other)
    for a, b in zip(first, second): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (run(name, turned, pixels, other)[-1] - first[-1]).abs().max() > 1e-3 # bands moved, sensor not


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_keeps_wavelengths(name):
    model, pixels = built(name), images()
    exact, _ = SPECTRAL_FAMILIES[name].embed(model, pixels, None, GF2)
    with torch.autocast("cpu", torch.bfloat16), patches_in_float32(pixels): mixed, _ = SPECTRAL_FAMILIES[name].embed(model, pixels, None, GF2) # as `Backbone.embed`
    assert mixed.dtype == torch.float32
    error = (mixed - exact).norm() / exact.norm()
    assert error < 1e-2
    if name in ("dofa", "copernicus-fm", "panopticon"):
        with pytest.raises(TypeError, match="bf16-mixed"): SPECTRAL_FAMILIES[name].embed(model.bfloat16(), pixels, None, GF2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(32, 48), (224, 16), (16, 2048)])
def test_any_grid(name, shape):
    out = run(name, built(name), images(1, 4, *shape), GF2)
    assert len(out) == 2 and out[-1].shape == (1, shape[0] * shape[1] // 256, 48) and out[-1].isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_place_matters_and_is_the_same_on_the_training_grid(name):
    model, pixels = built(name), images(1, 4, 16, 16).repeat(1, 1, 4, 4) # sixteen equal patches
    tokens, args = SPECTRAL_FAMILIES[name].embed(model, pixels, None, GF2)
    patches = SPECTRAL_FAMILIES[name].patches(tokens, args) if SPECTRAL_FAMILIES[name].patches else tokens[:, 1:]
    inner = [5, 6, 7, 9, 10, 11, 13, 14, 15] # the kernels of DOFA and Copernicus-FM reach one pixel over the upper and left edge
    patches, table = patches[:, inner], model.pos_embed[:, -16:][:, inner]
    torch.testing.assert_close(patches - patches[:, :1], table - table[:, :1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_images_are_refused(name):
    model = built(name)
    embed = lambda pixels, sensor: SPECTRAL_FAMILIES[name].embed(model, pixels, None, sensor)
    with pytest.raises(ValueError, match="the image is 64 x 50"): embed(images(1, 4, 64, 50), GF2)
    if name == "softcon": return # its kernel has the number of bands, which `load_vfm` checks
    with pytest.raises(ValueError, match=r"images of 3 bands and Sensor\('gf2'"): embed(images(1, 3, 64, 64), GF2)
    with pytest.raises(ValueError, match="in_bands=Sensor"): embed(images(1, 4, 64, 64), None)


def test_nanometres_and_thermal_bands_are_refused():
    with pytest.raises(ValueError, match="in nm"): Sensor("nm", (Band("red", 665, 30),))
    hot = Sensor("hot", (Band("B10", 10.9, .6),))
    with pytest.raises(ValueError, match="has B10 at 10.9 um"): spectral_bands("dofa-base", 1, hot)
    for name in ("dofa", "copernicus-fm", "panopticon", "senpamae"):
        with pytest.raises(ValueError, match="10.9 um"):
            SPECTRAL_FAMILIES[name].fit_bands({}, SPECTRAL_BACKBONES[f"{name}-base"], hot)


def test_bands_that_sentinel2_does_not_have():
    with pytest.raises(ValueError, match=r"b10 \(0.61 um\).*Sensor.select\(\['b1'"): match_sentinel2("softcon", SENSORS["ohs"], S2.names)
    assert match_sentinel2("softcon", GF2, S2.names) == ("B2", "B3", "B4", "B8") # B1 is blue on GF-2, coastal on Sentinel-2
    for name in ("softcon", "galileo"):
        with pytest.raises(ValueError, match="overlap with none"):
            SPECTRAL_FAMILIES[name].fit_bands({}, SPECTRAL_BACKBONES[f"{name}-base"], SENSORS["ohs"])


def test_statistics_follow_the_sensor():
    for name in ("softcon-base", "galileo-tiny"):
        spec = SPECTRAL_BACKBONES[name]
        assert len(spec.mean) == len(spec.std) == len(spec.bands) == len(spec.wavelengths)
        mean, std = band_statistics(name, spec, GF2.select(ORDER))
        assert mean == tuple(spec.mean[spec.bands.index(b)] for b in ("B8", "B4", "B2", "B3")) and min(std) > 0


def test_a_patch_is_refined_as_the_mean_of_its_tokens():
    family = SPECTRAL_FAMILIES["senpamae"]
    tokens, refined, args = torch.randn(2, 24, 8), torch.randn(2, 6, 8), dict(groups=4)
    out = family.replace(tokens, refined, args)
    torch.testing.assert_close(family.patches(out, args), refined)
    before, after = tokens.unflatten(1, (6, 4)), out.unflatten(1, (6, 4))
    torch.testing.assert_close(after - after.mean(2, True), before - before.mean(2, True)) # differences of bands stay


@needs_torchgeo
def test_without_torchgeo_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo.models.dofa", None)
    with pytest.raises(ModuleNotFoundError, match=r"Python 3.11 or later, `pip install 'torchgeo>=0.8.1' requests`"):
        SPECTRAL_FAMILIES["dofa"].build(size())


def test_sines_of_the_masked_autoencoder():
    table, dim = sincos_table(16, 5)[0], 16
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
    row, column = 3, 1
    expected = torch.cat([f(at * omega) for at in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[1 + row * 5 + column], expected)
    assert not table[0].any()


# ---- full size, on the meta device: every key and the bytes of the published file

def full(name):
    spec = SPECTRAL_BACKBONES[name]
    with torch.device("meta"): return SPECTRAL_FAMILIES[spec.family].build(dict(dim=spec.dim, n_layers=spec.n_layers,
        n_heads=spec.n_heads, patch_size=spec.patch_size, side=spec.image_size // spec.patch_size, bands=len(spec.bands)))


def accounted(name, published, n_bytes):
    "The published layout explains our model, shape by shape, and fills the published file but for its names."
    ours = full(name).state_dict()
    _, found, _, unexpected = read_as(published, SPECTRAL_FAMILIES[SPECTRAL_BACKBONES[name].family].formats, ours)
    assert not unexpected and {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in ours.items()}
    values = 4 * sum(v.numel() for v in published.values())
    if n_bytes: assert 0 < n_bytes - values < 1000 * len(published) and values > .99 * n_bytes


@needs_torchgeo
def test_full_size_torchgeo():
    from torchgeo import models
    empty = lambda *shape: torch.empty(*shape, device="meta")
    with torch.device("meta"):
        base, large = (f(num_classes=0).state_dict() for f in (models.dofa_base_patch16_224, models.dofa_large_patch16_224))
        fm = models.copernicusfm_base().state_dict()
        fm_large = models.CopernicusFM(embed_dim=1024, depth=24, num_heads=16).state_dict()
        panopticon = models.panopticon_vitb14(img_size=518).model.state_dict()
    body = lambda state: {k: v for k, v in state.items() if not k.startswith("fc_norm")}
    accounted("dofa-base", body(base), None)
    accounted("dofa-large", body(large), None)
    accounted("copernicus-fm-base", body(fm), 557931327)
    pretraining = {"mask_token": empty(1, 1, 768), "norm.weight": empty(768), "norm.bias": empty(768)}
    accounted("copernicus-fm-base", body(fm) | pretraining, 557940490)
    accounted("copernicus-fm-large", body(fm_large), None)
    accounted("panopticon-base", panopticon | {"mask_token": empty(1, 768)}, 395965930)


def test_full_size_softcon():
    import timm
    for name in ("small", "base"):
        with torch.device("meta"): theirs = timm.create_model(f"vit_{name}_patch14_dinov2", in_chans=13, img_size=224, num_classes=0)
        accounted(f"softcon-{name}", theirs.state_dict(), None)


def test_full_size_senpamae():
    "Three variants of one file: encoder, decoder and two moments of Adam for each value."
    count = lambda module: sum(p.numel() for p in module.parameters())
    encoder, dim = full("senpamae-base"), 768
    with torch.device("meta"): decoder = SenPaMAE(n_layers=3)
    aware, place = count(encoder.response) + count(encoder.gsd), 81 * dim
    values = count(encoder) + 2 * dim + count(decoder) - count(decoder.patch) + dim + dim * 256 + 256
    for n, published in ((values, 1515614365), (values - aware + 3 * place, 1400987293), (values - 2 * aware + 6 * place, 1286360221)):
        assert 0 < published - 12 * n < 3e5
    accounted("senpamae-base", {**senpa_file(encoder), "_orig_mod.decoder.pos_embedding": torch.empty(1, 1, 81, 768, device="meta")}, None)


@pytest.mark.parametrize("name", ["galileo-nano", "galileo-tiny", "galileo-base"])
def test_full_size_galileo(name):
    code, spec = pytest.importorskip("single_file_galileo"), SPECTRAL_BACKBONES[name]
    with torch.device("meta"): theirs = code.Encoder(embedding_size=spec.dim, depth=spec.n_layers, num_heads=spec.n_heads,
        mlp_ratio=4, max_patch_size=8, max_sequence_length=24, drop_path=.1)
    accounted(name, theirs.state_dict(), None)


def test_entries_say_what_there_is_to_know():
    for name, spec in SPECTRAL_BACKBONES.items():
        assert spec.family in SPECTRAL_FAMILIES and spec.licence and spec.access and spec.source and spec.files, name
        assert spec.dim % spec.n_heads == 0 and spec.image_size % spec.patch_size == 0, name
        assert all(h is None or set(h) <= set("0123456789abcdef") for _, h in spec.files), name


# ---- through the front door

TINY = dict(dim=48, n_layers=2, n_heads=4)
ENTRIES = [("dofa-base", 16, 14), ("copernicus-fm-base", 16, 14), ("panopticon-base", 14, 37), ("softcon-small", 14, 16),
    ("senpamae-base", 16, 9)]


@needs_torchgeo
@pytest.mark.parametrize("name,patch,side", ENTRIES)
def test_load_vfm_reads_a_published_file(name, patch, side, tmp_path):
    from spectralmoe.backbones import load_vfm
    spec = SPECTRAL_BACKBONES[name]
    family, model = SPECTRAL_FAMILIES[spec.family], built(spec.family, patch_size=patch, side=side, bands=13)
    state = senpa_file(model) if name == "senpamae-base" else {**model.state_dict(), "mask_token": torch.zeros(1, 1, 48)}
    torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}}, tmp_path / "published.pt")
    backbone = load_vfm(name, tmp_path / "published.pt", in_bands=GF2, **TINY)
    pixels = images(1, 4, 4 * patch, 6 * patch)
    if name == "softcon-small":
        fitted = family.fit_bands(model.state_dict(), spec, GF2)
        model = built(spec.family, patch_size=patch, side=side, bands=4)
        model.load_state_dict(fitted)
    expected = run(spec.family, model, pixels, GF2)
    for a, b in zip(backbone.tokens(pixels), expected, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert not backbone.report.missing and not backbone.report.unexpected and backbone.report.set_aside
    torch.save({k: v for k, v in state.items() if "blocks.1" not in k and "transformer.1" not in k}, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="missing"): load_vfm(name, tmp_path / "cut.pt", in_bands=GF2, **TINY)
    if name in ("dofa-base", "senpamae-base"):
        with pytest.raises(ValueError, match="patch_size is 8 and the weights have 16"):
            load_vfm(name, tmp_path / "published.pt", in_bands=GF2, patch_size=8, **TINY)


@needs_torchgeo
@pytest.mark.parametrize("name,patch,side", ENTRIES)
def test_refined_tokens_reach_the_next_block(name, patch, side):
    from spectralmoe.backbones import load_vfm
    backbone, pixels = load_vfm(name, in_bands=GF2, **TINY), images(1, 4, 2 * patch, 3 * patch)
    plain = backbone.tokens(pixels)
    scale = torch.ones((), requires_grad=True)
    for checkpointing in (False, True):
        refined = backbone.tokens(pixels, refine=lambda tokens, layer: tokens + 1 * scale * (layer == 0), checkpointing=checkpointing)
        torch.testing.assert_close(refined[0], plain[0] + 1, atol=1e-4, rtol=0)
        assert (refined[1] - plain[1]).abs().max() > .1
        scale.grad = None
        refined[1].sum().backward()
        assert scale.grad.abs() > 0 and all(p.grad is None for p in backbone.model.parameters())


@needs_torchgeo
def test_a_sensor_that_the_model_cannot_take_is_refused_before_anything_runs():
    from spectralmoe.backbones import load_vfm
    with pytest.raises(TypeError, match="expected a Sensor"): load_vfm("dofa-base", in_bands=4, **TINY)
    with pytest.raises(ValueError, match=r"'ohs' has bands that overlap with none"): load_vfm("softcon-small", in_bands=SENSORS["ohs"], **TINY)
    with pytest.raises(ValueError, match="got \\(1, 3, 64, 64\\)"): load_vfm("dofa-base", in_bands=GF2, **TINY).tokens(images(1, 3, 64, 64))


@needs_torchgeo
@pytest.mark.parametrize("name", ["dofa-base", "senpamae-base"])
def test_a_segmentor_trains_saves_and_predicts_the_same(name, tmp_path):
    from spectralmoe.backbones import load_vfm
    from spectralmoe.benchmarks import BENCHMARKS
    from spectralmoe.segmentor import Segmentor
    sensor = replace(BENCHMARKS["made_tiles"].input_sensor, gsd=2)
    vfm = load_vfm(name, in_bands=sensor, patch_size=8, **TINY)
    dfm = dict(name="depth-anything-v2-small", dim=48, n_layers=2, n_heads=4, patch_size=8, image_size=48)
    model = Segmentor.build("made_tiles", vfm, dfm, head="pixel_shuffle", n_experts=3, rank=2)
    pixels, labels = images(2, len(sensor), 48, 64), torch.randint(5, (2, 48, 64), generator=torch.Generator().manual_seed(2))
    model.initialise(pixels)
    optimiser = torch.optim.AdamW(model.parameter_groups(.05), lr=1e-2)
    before = vfm.fingerprint()
    for step in range(2):
        torch.manual_seed(step)
        optimiser.zero_grad(); model.loss(pixels, labels)["loss"].backward(); optimiser.step()
    again = Segmentor.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.eval()(pixels), model.eval()(pixels)) and vfm.fingerprint() == before
