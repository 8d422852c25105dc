"""Backbones: weights key for key, frozen for ever, any bands, any patch size, clear refusals."""
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
    BACKBONES, CachedTokens, check_grids, inflation, list_backbones, load_dfm, load_vfm, resize_patch, shipped_weights)
from spectralmoe.bands import SENSORS

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
    images = torch.randn(2, 3, 56 if "dinov3" not in name else 48, 112)
    with torch.no_grad():
        theirs = backbone.model(images, output_hidden_states=True)
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
    with pytest.raises(ValueError, match="is a file"):
        load_vfm("dinov3-vits16", tmp_path / "model.safetensors", **SIZE)
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
    a = load(name, "random", seed=2, **SIZE)
    assert "random weights" in repr(a) and load(**json.loads(json.dumps(a.source))).fingerprint() == a.fingerprint()
    if not BACKBONES[name].shipped: assert load(name, seed=2, **SIZE).fingerprint() == a.fingerprint()


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
