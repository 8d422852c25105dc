"""Backbones: weights key for key, frozen for ever, any bands, any patch size, clear refusals."""
import copy
import json
import pickle
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from spectralmoe.backbones import (
    BACKBONES, CachedTokens, check_grids, check_input, crop_back, inflation, list_backbones, load_dfm, load_vfm, resize_patch, shipped_weights)
from spectralmoe.bands import SENSORS
from spectralmoe.encoders.spectral import SPECTRAL_BACKBONES

SIZE = dict(dim=32, n_layers=4, n_heads=2)
DINO = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
DINOV2 = dict(**DINO, patch_size=14, image_size=56)
BACKBONE = dict(DINOV2, model_type="dinov2", out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
DEPTH = dict(backbone_config=BACKBONE, reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4,
             fusion_hidden_size=8, head_hidden_size=4)
FAMILIES = {
    "dinov3-vits16": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(
        **DINO, intermediate_size=128, num_register_tokens=4, patch_size=16)),
    "dinov2-small": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)),
    "dinov2-with-registers-small": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINOV2)),
    "depth-anything-v2-small": lambda: hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(**DEPTH)),
    "prompt-depth-anything-vitl": lambda: hf.PromptDepthAnythingForDepthEstimation(
        hf.PromptDepthAnythingConfig(**DEPTH)),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("the network was used")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def saved(name, folder):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return model


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def authors_positions(table, down, across, offset=0.1):
    "The position table on another grid as the code of DINOv2 (without registers) and Depth Anything computes it."
    side = int((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((down + offset) / side, (across + offset) / side), mode="bicubic", antialias=False)
    assert grid.shape[-2:] == (down, across)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, down * across, -1)], 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_weights_load_key_for_key(name, tmp_path):
    model = saved(name, tmp_path)
    encoder = getattr(model, "backbone", model)
    load = load_dfm if "depth" in name else load_vfm
    backbone = load(name, tmp_path, patch_size=None, **SIZE)
    expected, found = encoder.state_dict(), backbone.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert backbone.n_prefix_tokens == (1 if name != "dinov3-vits16" and "reg" not in name else 5)
    images = torch.randn(2, 3, 56 if "dinov3" not in name else 48, 112)  # off the table's grid
    theirs = copy.deepcopy(backbone.model)
    if name in ("dinov2-small", "depth-anything-v2-small", "prompt-depth-anything-vitl"):
        table = theirs.embeddings.position_embeddings
        theirs.embeddings.interpolate_pos_encoding = lambda tokens, height, width: authors_positions(table, height // 14, width // 14)
    with torch.no_grad(): theirs = theirs(images, output_hidden_states=True)
    ours = [t.detach() for t in backbone.tokens(images)]
    for mine, hidden in zip(ours, theirs.hidden_states[1:], strict=True):
        assert torch.equal(mine, hidden[:, backbone.n_prefix_tokens:])
    gh, gw = backbone.grid(*images.shape[-2:])
    assert ours[0].shape == (2, gh * gw, 32) and gh != gw
    again = load(**json.loads(json.dumps(backbone.source)))
    assert again.fingerprint() == backbone.fingerprint()


@pytest.mark.parametrize("name", ["dinov3-vits16", "depth-anything-v2-small"])
def test_renamed_keys_are_refused_with_counts(name, tmp_path):
    saved(name, tmp_path)
    edit_weights(tmp_path, lambda state: {f"other.{k}": v for k, v in state.items()})
    n = len(load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=rf"{n - 1} missing \(.*; {n - 1} unexpected \(other\."):
        load_vfm(name, tmp_path, **SIZE)


def test_one_missing_extra_or_misshapen_key_is_refused(tmp_path):
    saved("dinov2-small", tmp_path)
    edit_weights(tmp_path, lambda s: {k: v for k, v in s.items() if k != "layernorm.weight"})
    with pytest.raises(ValueError, match=r"1 missing \(layernorm.weight"):
        load_vfm("dinov2-small", tmp_path, **SIZE)
    edit_weights(tmp_path, lambda s: s | {"layernorm.weight": torch.ones(3), "extra": torch.ones(1)})
    with pytest.raises(ValueError, match="0 missing; 1 unexpected .*; 1 mismatched .layernorm.weight"):
        load_vfm("dinov2-small", tmp_path, **SIZE)


def test_absent_mask_token_is_allowed(tmp_path):
    saved("dinov2-small", tmp_path)
    edit_weights(tmp_path, lambda s: {k: v for k, v in s.items() if "mask_token" not in k})
    load_vfm("dinov2-small", tmp_path, **SIZE)


def test_wrong_folders_say_what_is_wrong(tmp_path):
    saved("dinov3-vits16", tmp_path)
    with pytest.raises(ValueError, match="pass dim=32, n_layers=4, n_heads=2"):
        load_vfm("dinov3-vits16", tmp_path)
    with pytest.raises(ValueError, match="dinov2-small is a dinov2 model and .* holds a dinov3_vit"):
        load_vfm("dinov2-small", tmp_path, **SIZE)
    with pytest.raises(ValueError, match="no weights, it begins with"):
        load_vfm("dinov3-vits16", tmp_path / "config.json", **SIZE)
    (tmp_path / "model.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(ValueError, match="model.safetensors begins with b'<!DOCTYPE html>"):
        load_vfm("dinov3-vits16", tmp_path, **SIZE)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it holds no weight file"):
        load_vfm("dinov3-vits16", tmp_path, **SIZE)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="needs config.json"):
        load_vfm("dinov3-vits16", tmp_path, **SIZE)


class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), "w")


def test_pickled_code_does_not_run(tmp_path):
    saved("dinov3-vits16", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save({"norm.weight": Evil(mark)}, tmp_path / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match="no model can be read"):
        load_vfm("dinov3-vits16", tmp_path, **SIZE)
    assert not mark.exists()


def test_hub_errors_name_cause_and_remedy(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    hub_id = "facebook/dinov3-vits16-pretrain-lvd1689m"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"cannot be reached .*`hf download {hub_id} --local-dir"):
        load_vfm("dinov3-vits16", hub_id)
    with pytest.raises(FileNotFoundError, match="neither a folder here"):
        load_vfm("dinov3-vits16", "/no/such/folder")

    def fail(kind):
        def call(*args, **kwargs):
            error = kind.__new__(kind)
            raise OSError("trouble on the hub") from error
        return call
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", fail(GatedRepoError))
    with pytest.raises(PermissionError, match=f"gated. Accept its licence on https://huggingface.co/{hub_id}"):
        load_vfm("dinov3-vits16", hub_id)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", fail(RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError, match=f"neither a folder here nor a model .* Its hub id is {hub_id}"):
        load_vfm("dinov3-vits16", "someone/wrong")


def test_bands_get_their_kernels(tmp_path):
    rgb = saved("dinov3-vits16", tmp_path).embeddings.patch_embeddings.weight.detach()
    def kernel(n, inflate, **kw):
        model = load_vfm("dinov3-vits16", tmp_path, n, inflate, **SIZE, **kw)
        return model, model.model.embeddings.patch_embeddings.weight
    kept, k = kernel(4, "rgb_kept", rgb=(1, 2, 3), extra_share=0.2)
    assert torch.equal(k, rgb) and kept.extra == [0]
    torch.testing.assert_close(kept.extra_bands[:, 0], 0.2 * rgb.mean(1))
    for n in (4, 5):
        cyclic = rgb[:, [i % 3 for i in range(n)]]
        assert torch.equal(kernel(n, "cyclic")[1], cyclic)
        torch.testing.assert_close(kernel(n, "cyclic_scaled")[1], cyclic * 3 / n)
        assert kernel(n, "rgb_kept")[0].extra_bands.abs().sum() == 0
    at = (0.40, 0.49, 0.525, 0.665, 0.9)
    model, k = kernel(5, "by_wavelength", wavelengths=at)
    red, green, blue = rgb.unbind(1)
    torch.testing.assert_close(k, torch.stack([blue, blue, (blue + green) / 2, red, red], 1))
    assert load_vfm(**json.loads(json.dumps(model.source))).fingerprint() == model.fingerprint()
    frozen = load_vfm("dinov3-vits16", tmp_path, 4, train_extra=False, **SIZE)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_extra_bands_equal_a_wider_convolution():
    model = load_vfm("dinov3-vits16", in_bands=5, rgb=(4, 0, 2), extra_share=0.2, patch_size=8, **SIZE)
    images = torch.randn(1, 5, 16, 24)
    native = model.model.embeddings.patch_embeddings
    kernel = torch.empty(32, 5, 8, 8)
    kernel[:, model.rgb], kernel[:, model.extra] = native.weight.detach(), model.extra_bands.detach()
    patches = F.conv2d(images, kernel, native.bias, stride=8).flatten(2).transpose(1, 2)
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model.tokens(images)
    hook.remove()
    torch.testing.assert_close(seen[0][:, 5:], patches, rtol=1e-4, atol=1e-5)


def test_permuting_bands_with_their_names_changes_nothing():
    sensor = SENSORS["gf2"]
    order = [3, 1, 0, 2]
    moved = sensor.select([sensor.names[i] for i in order])
    images = torch.randn(1, 4, 16, 16)
    for inflate in ("rgb_kept", "by_wavelength"):
        make = dict(inflate=inflate, patch_size=8, extra_share=0.2, **SIZE)
        a = load_vfm("dinov3-vits16", in_bands=sensor, **make).tokens(images)[-1]
        b = load_vfm("dinov3-vits16", in_bands=moved, **make).tokens(images[:, order])[-1]
        torch.testing.assert_close(a, b)


def test_arguments_are_refused():
    with pytest.raises(TypeError, match="SENSORS"): load_vfm("dinov3-vits16", in_bands="gf2")
    with pytest.raises(ValueError, match="extra_share is -1"): inflation(4, extra_share=-1)
    with pytest.raises(ValueError, match="three different"): inflation(4, rgb=(0, 0, 1))
    with pytest.raises(ValueError, match="no backbone 'dinov4'"): load_dfm("dinov4")
    with pytest.raises(TypeError, match="heads"): load_vfm("dinov3-vits16", heads=3)


def test_patch_14_to_16_is_the_released_conversion(tmp_path):
    model = saved("dinov2-small", tmp_path)
    kernel = model.embeddings.patch_embeddings.projection.weight.detach()
    large = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    resized = load_dfm("dinov2-small", tmp_path, **SIZE)
    assert torch.equal(resized.model.embeddings.patch_embeddings.projection.weight, large)
    assert torch.equal(resized.model.embeddings.position_embeddings, model.embeddings.position_embeddings)
    stored = load_dfm("dinov2-small", tmp_path, image_size=128, **SIZE)
    theirs = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 32), 8 * 14, 8 * 14)
    assert torch.equal(stored.model.embeddings.position_embeddings, theirs)
    images = torch.randn(1, 3, 128, 128)
    for a, b in zip(resized.tokens(images), stored.tokens(images)): assert torch.equal(a, b)
    assert stored.patch_size == 16 and stored.grid(128, 64) == (8, 4)
    pinv = load_dfm("dinov2-small", tmp_path, patch_resize="pinv", **SIZE)
    gain = pinv.model.embeddings.patch_embeddings.projection.weight.sum((2, 3))
    torch.testing.assert_close(gain, kernel.sum((2, 3)), rtol=1e-3, atol=1e-3)
    assert torch.equal(resize_patch(kernel, 14), kernel)
    with pytest.raises(ValueError, match="multiple of the patch size 16"):
        load_dfm("dinov2-small", tmp_path, image_size=100, **SIZE)


def test_frozen_after_a_step_and_trained_when_unfrozen():
    model = load_vfm("dinov3-vits16", in_bands=4, patch_size=8, **SIZE).train()
    images, before = torch.randn(2, 4, 16, 24), model.fingerprint()
    assert not model.training and torch.equal(model.tokens(images)[-1], model.tokens(images)[-1])
    def step():
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.tokens(images)[-1].square().sum().backward()
        optimiser.step()
    step()
    assert model.fingerprint() == before and model.extra_bands.abs().min() > 0
    assert all(p.grad is None for p in model.model.parameters())
    model.unfreeze().train()
    step()
    assert model.fingerprint() != before and not model.training
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_depth_models_are_only_read():
    dfm = load_dfm("depth-anything-v2-small", patch_size=8, **SIZE)
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    assert not dfm.tokens(images)[-1].requires_grad
    with pytest.raises(ValueError, match="only read"): dfm.unfreeze()
    with pytest.raises(ValueError, match="only read"): dfm.tokens(images, lambda t, layer: t)


@pytest.mark.parametrize("name", ["dinov3-vits16", "dinov2-small"])
def test_checkpointed_gradients_are_the_plain_ones(name):
    model = load_vfm(name, in_bands=4, patch_size=8, image_size=16, **SIZE)
    images, grads = torch.randn(2, 4, 16, 24), []
    refine = torch.nn.Linear(32, 32)
    for checkpointing in (False, True):
        refine.zero_grad()
        out = model.tokens(images, lambda t, layer: t + refine(t), checkpointing)
        torch.stack(out).square().sum().backward()
        grads.append([p.grad.clone() for p in refine.parameters()])
    for plain, saved_memory in zip(*grads): torch.testing.assert_close(plain, saved_memory)


@pytest.mark.parametrize("name", ["dinov3-vits16", "dinov2-with-registers-small"])
def test_bf16_autocast(name):
    model = load_vfm(name, in_bands=4, extra_share=0.2, patch_size=8, image_size=16, **SIZE)
    images = torch.randn(1, 4, 16, 24)
    refine = torch.nn.Linear(32, 32)
    full = model.tokens(images, lambda t, layer: t + refine(t))
    with torch.autocast("cpu", torch.bfloat16):
        half = model.tokens(images, lambda t, layer: t + refine(t))
    half[-1].float().square().sum().backward()
    assert refine.weight.grad.isfinite().all()
    torch.testing.assert_close(full[-1], half[-1].float(), rtol=0.1, atol=0.1)


def test_inference_mode_then_training():
    model = load_vfm("dinov3-vits16", in_bands=4, patch_size=8, **SIZE)
    images = torch.randn(1, 4, 32, 40)
    with torch.inference_mode(): model.tokens(images)
    model.tokens(images)[-1].sum().backward()
    assert model.extra_bands.grad is not None


def test_seed_is_enough_and_global_rng_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    a = load_vfm("dinov2-small", seed=5, patch_size=8, image_size=16, **SIZE)
    assert torch.equal(torch.rand(4), expected)
    code = ("from spectralmoe.backbones import load_vfm; "
            f"print(load_vfm(**{a.source!r}).fingerprint())")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == a.fingerprint()


def test_cache_is_exact_atomic_and_survives_damage(tmp_path):
    dfm = load_dfm("depth-anything-v2-small", patch_size=8, image_size=16, **SIZE)
    cached = CachedTokens(dfm, tmp_path / "cache")
    images = torch.randn(3, 3, 16, 24)
    first = cached.tokens(images[:2])
    again = CachedTokens(dfm, tmp_path / "cache").tokens(images)
    for plain, a, b in zip(dfm.tokens(images[:2]), first, again):
        assert torch.equal(plain, a) and torch.equal(a, b[:2])
    files = sorted(cached.folder.iterdir())
    assert len(files) == 3 and all(f.suffix == ".safetensors" for f in files)
    cached.file(images[0]).write_bytes(b"half a fi")
    save_file({"tokens": torch.zeros(1)}, cached.file(images[1]))
    with pytest.warns(UserWarning, match="damaged") as caught: repaired = cached.tokens(images[:2])
    assert len(caught) == 2
    for a, b in zip(first, repaired): assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cached.tokens(images[2:])[-1], again[-1][2:])
    assert check_grids(load_vfm("dinov3-vits16", patch_size=8, **SIZE), cached, 16, True)
    assert cached.fingerprint() == dfm.fingerprint() and cached.file(images[0].double()) not in files
    with pytest.raises(ValueError, match="3, H, W"): cached.tokens(torch.randn(1, 4, 16, 16))


def test_published_parameter_counts_on_the_meta_device():
    params = list_backbones().set_index("name")["params"]
    assert round(params["dinov3-vitl16"], 1) == 303.1
    assert params["dinov2-large"] == params["prompt-depth-anything-vitl"] == 304.37
    assert round(params["dinov3-vit7b16"]) == 6716 and params["dinov2-giant"] == 1136.48


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_random_weights_by_name(name):
    load = load_dfm if BACKBONES[name].kind == "dfm" else load_vfm
    bands = dict(in_bands=SENSORS["gf2"]) if name in SPECTRAL_BACKBONES else {}
    try: a = load(name, "random", seed=2, **bands, **SIZE)
    except ImportError as missing: pytest.skip(str(missing))
    assert "random weights" in repr(a) and a.report is None
    assert load(**json.loads(json.dumps(a.source))).fingerprint() == a.fingerprint()
    if not BACKBONES[name].shipped: assert load(name, seed=2, **bands, **SIZE).fingerprint() == a.fingerprint()
    if bands:
        with pytest.raises(TypeError, match="expected a Sensor"): load_vfm(name, "random", in_bands=4, **SIZE)


@pytest.mark.parametrize("bands", [4, 32, "gf2", "ohs", "aerial_irrg"])
def test_mini_models_pair_up_for_any_sensor(bands):
    vfm = load_vfm("mini_vfm", "random", SENSORS.get(bands, bands))
    dfm = load_dfm("mini_dfm", "random")
    assert (vfm.dim, vfm.n_layers, vfm.patch_size, vfm.n_prefix_tokens) == (128, 8, 8, 5)
    assert (dfm.dim, dfm.n_layers, dfm.patch_size, dfm.n_prefix_tokens) == (128, 8, 8, 1)
    assert check_grids(vfm, dfm, 128, True) == ((16, 16), (16, 16))
    images = torch.randn(1, vfm.in_bands, 16, 24)
    assert vfm.tokens(images)[-1].shape == dfm.tokens(images[:, vfm.rgb])[-1].shape == (1, 6, 128)
    with torch.no_grad(): expected = vfm.model(images[:, vfm.rgb], output_hidden_states=True).hidden_states[-1][:, 5:]
    assert torch.equal(vfm.tokens(images)[-1].detach(), expected), "further bands begin at nothing"
    assert load_dfm("depth-anything-v2-small", **SIZE).patch_size == 16


def test_missing_shipped_weights_say_how_to_make_them(monkeypatch, tmp_path):
    import spectralmoe
    monkeypatch.setattr(spectralmoe, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="spectralmoe run pretrain_mini -p profile=full -p install=true"):
        load_vfm("mini_vfm")
    with pytest.raises(FileNotFoundError, match="weights='random'"): load_dfm("mini_dfm")
    with pytest.raises(ValueError, match="does not come with the package"): shipped_weights("dinov2-small")


def test_half_precision_files_are_held_in_single_precision(tmp_path):
    saved("dinov3-vits16", tmp_path).half().save_pretrained(tmp_path)
    model = load_vfm("dinov3-vits16", tmp_path, **SIZE).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


RGB = {"dinov3-vits16": {}, "dinov2-small": dict(image_size=56), "dinov2-with-registers-small": dict(image_size=56),
       "clip-vitl14": dict(image_size=56), "sam-vitb": dict(image_size=64), "eva02-vitl14": dict(image_size=56)}
DEPTHS = ["depth-anything-v2-small", "prompt-depth-anything-vitl", "depth-anything-3-mono-large"]


def whole_library_model(name, folder):
    "A tiny model of transformers as its hub repository holds it, heads and all; returns its encoder."
    torch.manual_seed(0)
    if name.startswith("clip"):
        vision = dict(**DINO, intermediate_size=128, patch_size=14, image_size=56)
        model = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=dict(**DINO, intermediate_size=64)))
    else:
        vision = dict(**DINO, mlp_dim=128, patch_size=16, image_size=64, global_attn_indexes=[0, 1, 2, 3])
        model = hf.SamModel(hf.SamConfig(vision_config=vision))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    model.eval().save_pretrained(folder)
    return model.vision_model if name.startswith("clip") else model.vision_encoder


@pytest.mark.parametrize("name", ["clip-vitl14", "sam-vitb"])
def test_whole_models_of_transformers_give_their_encoder(name, tmp_path):
    encoder = whole_library_model(name, tmp_path)
    images = torch.randn(2, 3, *([56, 56] if name.startswith("clip") else [64, 64]))
    seen = []
    blocks = encoder.encoder.layers if name.startswith("clip") else encoder.layers
    hooks = [b.register_forward_hook(lambda block, args, out: seen.append(out.flatten(1, -2))) for b in blocks]
    with torch.no_grad(): encoder(images)
    for hook in hooks: hook.remove()
    for place in (tmp_path, tmp_path / "model.safetensors"):
        backbone = load_vfm(name, place, **SIZE)
        for mine, theirs in zip(backbone.tokens(images), seen, strict=True):
            torch.testing.assert_close(mine.detach(), theirs[:, backbone.n_prefix_tokens:], rtol=0, atol=1e-5)
        assert backbone.report.format == "transformers" and backbone.report.set_aside and not backbone.report.missing


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_alone_is_the_folder(name, tmp_path):
    saved(name, tmp_path)
    load = load_dfm if "depth" in name else load_vfm
    folder, file = (load(name, place, patch_size=None, **SIZE) for place in (tmp_path, tmp_path / "model.safetensors"))
    assert folder.fingerprint() == file.fingerprint() and file.report.format == "transformers"


@pytest.mark.parametrize("name", RGB)
@pytest.mark.parametrize("inflate", ["rgb_kept", "cyclic", "cyclic_scaled", "by_wavelength"])
def test_four_and_thirty_two_bands_for_every_rgb_model(name, inflate):
    for sensor in (SENSORS["gf2"], SENSORS["ohs"]):
        model = load_vfm(name, in_bands=sensor, inflate=inflate, patch_size=8, **SIZE, **dict(RGB[name], **({"image_size": 64} if RGB[name] else {})))
        images = torch.randn(1, len(sensor), 16, 24)
        assert model.tokens(images)[-1].shape == (1, 6, 32) and model.in_bands == len(sensor)
        if inflate == "rgb_kept":
            rgb = load_vfm(name, patch_size=8, **SIZE, **dict(RGB[name], **({"image_size": 64} if RGB[name] else {})))
            torch.testing.assert_close(model.tokens(images)[-1], rgb.tokens(images[:, list(sensor.rgb_index)])[-1])
        assert load_vfm(**json.loads(json.dumps(model.source))).fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", [*RGB, *DEPTHS])
def test_from_224_to_2048_pixels_and_rectangles(name):
    load = load_dfm if name in DEPTHS else load_vfm
    model = load(name, "random", dim=16, n_layers=1, n_heads=2, patch_size=16)
    for size in ((224, 224), (512, 320), (1024, 16), (2048, 32), (2048, 2048) if name == "dinov3-vits16" else (768, 768)):
        with torch.inference_mode(): tokens = model.tokens(torch.randn(1, 3, *size))[-1]
        assert tokens.shape == (1, size[0] // 16 * (size[1] // 16), 16) and tokens.isfinite().all() and model.grid(*size) == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("name", RGB)
def test_sides_that_are_no_multiple_are_filled_up_on_request(name):
    size = dict(patch_size=8, **SIZE)
    model, padded = load_vfm(name, **size), load_vfm(name, pad="zeros", **size)
    images = torch.randn(2, 3, 13, 30)
    with pytest.raises(ValueError, match="pad it to 16 x 32, crop it"): model.tokens(images)
    assert padded.grid(13, 30) == (2, 4)
    torch.testing.assert_close(padded.tokens(images)[-1], model.tokens(F.pad(images, (0, 2, 0, 3)))[-1])
    maps = padded.tokens(images)[-1].transpose(1, 2).unflatten(2, (2, 4))
    assert crop_back(padded, maps, 13, 30).shape == (2, 32, 13, 30)
    ramp = torch.arange(4.).expand(1, 1, 2, 4)
    torch.testing.assert_close(crop_back(padded, ramp, 13, 30)[0, 0, 0, 4:28], (torch.arange(4, 28) + 0.5) / 8 - 0.5)
    assert load_vfm(**json.loads(json.dumps(padded.source))).pad == "zeros"


def test_a_padded_depth_model_is_cached(tmp_path):
    dfm = load_dfm("depth-anything-v2-small", pad="replicate", patch_size=8, image_size=16, **SIZE)
    cached, images = CachedTokens(dfm, tmp_path), torch.randn(1, 3, 13, 20)
    for _ in range(2): assert torch.equal(torch.stack(cached.tokens(images)), torch.stack(dfm.tokens(images)))


def edited(tmp_path, change):
    saved("dinov3-vits16", tmp_path)
    file = tmp_path / "model.safetensors"
    change(file)
    return file



def cut_off(file): file.write_bytes(file.read_bytes()[:-9])
def renamed(file): save_file({f"net.{k}": v for k, v in load_file(file).items()}, file)
def web_page(file): file.write_bytes(b"<html>Sign in</html>")
def pointer(file): file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
def evil(file): torch.save({"norm.weight": Evil(file.parent / "ran")}, file)


@pytest.mark.parametrize("change, cause", [
    (cut_off, "truncated or damaged.*download it again"), (renamed, "missing .*unexpected .net\\..*Its keys are those of no model"),
    (web_page, "web page.*accept the licence"), (pointer, "git lfs pull"), (evil, "which were not run")])
def test_files_that_are_not_the_weights(tmp_path, change, cause):
    with pytest.raises(ValueError, match=cause): load_vfm("dinov3-vits16", edited(tmp_path, change), **SIZE)
    assert not (tmp_path / "ran").exists()


def test_files_of_another_model_or_size(tmp_path):
    file = edited(tmp_path, lambda file: None)
    for other in ("dinov2-small", "clip-vitl14", "sam-vitb", "eva02-vitl14"):
        with pytest.raises(ValueError, match="those of a dinov3_vit file .dinov3-vits16"): load_vfm(other, file, **SIZE)
    with pytest.raises(ValueError, match="The file has dim 32 and 4 blocks, expected 384 and 12: give the file of dinov3-vits16, or pass"):
        load_vfm("dinov3-vits16", file)
    with pytest.raises(ValueError, match="expected 32 and 3"): load_vfm("dinov3-vits16", file, **SIZE | dict(n_layers=3))


def test_the_hub_serves_timm_and_authors_files(tmp_path, monkeypatch):
    import huggingface_hub
    file, asked = edited(tmp_path, lambda file: None), []
    def download(repo, name): return asked.append((repo, name)) or str(file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for weights in ("timm/vit_small_patch16_dinov3.lvd1689m", "hf-hub:timm/x", "someone/repo/sub/their.pth"):
        assert load_vfm("dinov3-vits16", weights, **SIZE).report.source == weights
    assert asked == [("timm/vit_small_patch16_dinov3.lvd1689m", "model.safetensors"), ("timm/x", "model.safetensors"), ("someone/repo", "sub/their.pth")]
    def gone(repo, name): raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gone)
    with pytest.raises(FileNotFoundError, match="cannot be reached"): load_vfm("eva02-vitl14", "timm/eva02_large_patch14_224.mim_m38m", **SIZE)


def test_what_the_weights_expect_is_compared_by_name():
    gf2 = SENSORS["gf2"]
    vfm = load_vfm("dinov3-vits16", in_bands=gf2, patch_size=8, **SIZE)
    check_input(vfm, gf2)
    check_input(vfm, gf2, mean=(0.406, 0.456, 0.485, 0.4), std=(0.225, 0.224, 0.229, 0.2))
    swapped = gf2.select(["red", "green", "blue", "nir"])
    with pytest.raises(ValueError, match=r"was loaded for \[B1 .*the images have \[B3 .*Sensor.select"): check_input(vfm, swapped)
    with pytest.raises(ValueError, match=r"mean is \[0.406, 0.456, 0.485\] and the weights' \[0.485, 0.456, 0.406\]"):
        check_input(vfm, gf2, mean=(0.485, 0.456, 0.406, 0.4))
    with pytest.raises(ValueError, match="std is"): check_input(vfm, gf2, std=(0.225, 0.224, 0.229, 0.2), white=255)
    sat = load_vfm("dinov3-vitl16-sat", **SIZE)
    with pytest.raises(ValueError, match=r"the weights' \[0.43, 0.411, 0.296\]"): check_input(sat, gf2.select(["red", "green", "blue"]), mean=(0.485, 0.456, 0.406))


def test_a_backbone_survives_copy_and_pickle():
    import copy
    for name in RGB:
        model = load_vfm(name, patch_size=8, **SIZE)
        images = torch.randn(1, 3, 16, 16)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.tokens(images)[-1], model.tokens(images)[-1]) and twin.frozen


@pytest.mark.parametrize("name", ["clip-vitl14", "sam-vitb", "eva02-vitl14"])
def test_the_other_families_refine_checkpoint_and_run_in_bf16(name):
    model = load_vfm(name, in_bands=4, extra_share=0.2, patch_size=8, image_size=64, **SIZE)
    images, refine, grads = torch.randn(2, 4, 16, 24), torch.nn.Linear(32, 32), []
    plain = model.tokens(images)
    halved = model.tokens(images, lambda t, layer: t / 2 if layer == 1 else t)
    assert torch.equal(plain[0], halved[0]) and torch.equal(halved[1], plain[1] / 2) and not torch.allclose(halved[2], plain[2])
    for checkpointing in (False, True):
        refine.zero_grad()
        torch.stack(model.tokens(images, lambda t, layer: t + refine(t), checkpointing)).square().sum().backward()
        grads.append([p.grad.clone() for p in refine.parameters()])
    for a, b in zip(*grads): torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16): half = model.tokens(images)
    torch.testing.assert_close(plain[-1], half[-1].float(), rtol=0.1, atol=0.1)
    before = model.fingerprint()
    model.unfreeze().train()
    model.tokens(images)[-1].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) and model.fingerprint() == before


@pytest.mark.parametrize("vfm, dfm", list(zip(RGB, [*DEPTHS, *DEPTHS])))
def test_a_segmentor_on_every_family_trains_saves_and_loads(vfm, dfm, tmp_path):
    from spectralmoe.segmentor import Segmentor
    size = dict(dim=32, n_layers=4, n_heads=2, patch_size=8, image_size=64)
    head = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, encoder_width=32, decoder_width=32, n_heads=2)
    model = Segmentor.build("fbp_cross_sensor", dict(name=vfm, **size), dict(name=dfm, **size), "spectralmoe", head_sizes=head,
                            n_experts=2, rank=2, n_tokens=8, query_dim=32)
    bands = len(model.task["bands"])
    images, labels = torch.randn(2, bands, 64, 64), torch.randint(0, 3, (2, 64, 64))
    frozen = model.vfm.fingerprint(), model.dfm.fingerprint()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        sum(model.loss(images, labels).values()).backward()
        optimiser.step()
    assert (model.vfm.fingerprint(), model.dfm.fingerprint()) == frozen
    model.eval().save_pretrained(tmp_path)
    again = Segmentor.from_pretrained(tmp_path).eval()
    with torch.no_grad(): assert torch.equal(again(images), model(images))
    assert torch.equal(again.predict(images), model.predict(images))
