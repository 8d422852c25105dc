"""The authors' own files: every key of every model accounted for, and the features of another implementation."""
import importlib
import re

import pytest
import timm
import torch
from torch import nn

from spectralmoe.backbones import WeightReader, backbone_size, load_dfm, load_vfm
from spectralmoe.encoders.vit import FAMILIES, RGB_BACKBONES, check_published, read_as, translate
from spectralmoe.encoders.files import resize_patch, resize_positions, weights_sha256

# The authors' layouts, written down from their code: name -> shape. They share nothing with the rules under test.


def norm(name, dim): return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
def linear(name, a, b, bias=True): return {f"{name}.weight": (b, a)} | ({f"{name}.bias": (b,)} if bias else {})
def conv(name, dim, patch, bias=True): return {f"{name}.weight": (dim, 3, patch, patch)} | ({f"{name}.bias": (dim,)} if bias else {})


def dinov3(dim, n_layers, mlp, gated=False, bias=True, extra_norm=False, patch=16, heads=2):
    out = {"cls_token": (1, 1, dim), "storage_tokens": (1, 4, dim), "mask_token": (1, dim),
           "rope_embed.periods": (dim // heads // 4,), **conv("patch_embed.proj", dim, patch), **norm("norm", dim)}
    if extra_norm: out |= norm("local_cls_norm", dim)
    for i in range(n_layers):
        b = f"blocks.{i}."
        out |= norm(b + "norm1", dim) | norm(b + "norm2", dim) | linear(b + "attn.qkv", dim, 3 * dim, bias)
        out |= ({b + "attn.qkv.bias_mask": (3 * dim,)} if bias else {}) | linear(b + "attn.proj", dim, dim)
        out |= {b + "ls1.gamma": (dim,), b + "ls2.gamma": (dim,)}
        if gated: out |= linear(b + "mlp.w1", dim, mlp) | linear(b + "mlp.w2", dim, mlp) | linear(b + "mlp.w3", mlp, dim)
        else: out |= linear(b + "mlp.fc1", dim, mlp) | linear(b + "mlp.fc2", mlp, dim)
    return out


def dinov2(dim, n_layers, patch=14, side=37, registers=False, giant=False, mask=True):
    out = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + side * side, dim), **conv("patch_embed.proj", dim, patch), **norm("norm", dim)}
    if mask: out["mask_token"] = (1, dim)
    if registers: out["register_tokens"] = (1, 4, dim)
    hidden = (int(dim * 4 * 2 / 3) + 7) // 8 * 8
    for i in range(n_layers):
        b = f"blocks.{i}."
        out |= norm(b + "norm1", dim) | norm(b + "norm2", dim) | linear(b + "attn.qkv", dim, 3 * dim) | linear(b + "attn.proj", dim, dim)
        out |= {b + "ls1.gamma": (dim,), b + "ls2.gamma": (dim,)}
        if giant: out |= linear(b + "mlp.w12", dim, 2 * hidden) | linear(b + "mlp.w3", hidden, dim)
        else: out |= linear(b + "mlp.fc1", dim, 4 * dim) | linear(b + "mlp.fc2", 4 * dim, dim)
    return out


def clip(dim, n_layers, patch=14, side=16):
    out = {"class_embedding": (dim,), "positional_embedding": (1 + side * side, dim), **conv("conv1", dim, patch, False),
           **norm("ln_pre", dim), **norm("ln_post", dim), "proj": (dim, 768)}
    for i in range(n_layers):
        b = f"transformer.resblocks.{i}."
        out |= {b + "attn.in_proj_weight": (3 * dim, dim), b + "attn.in_proj_bias": (3 * dim,)} | linear(b + "attn.out_proj", dim, dim)
        out |= norm(b + "ln_1", dim) | norm(b + "ln_2", dim) | linear(b + "mlp.c_fc", dim, 4 * dim) | linear(b + "mlp.c_proj", 4 * dim, dim)
    text = {"transformer.resblocks.0.attn.in_proj_bias": (24,), "positional_embedding": (77, 8), "token_embedding.weight": (9, 8),
            "text_projection": (8, 8), "logit_scale": (), "ln_final.weight": (8,), "input_resolution": (), "context_length": (), "vocab_size": ()}
    return {f"visual.{k}": v for k, v in out.items()} | text


def sam(dim, n_layers, whole, patch=16, side=64, heads=2):
    out = {"pos_embed": (1, side, side, dim), **conv("patch_embed.proj", dim, patch), "neck.0.weight": (256, dim, 1, 1),
           **norm("neck.1", 256), "neck.2.weight": (256, 256, 3, 3), **norm("neck.3", 256)}
    for i in range(n_layers):
        b, rel = f"blocks.{i}.", (2 * side - 1 if i in whole else 27, dim // heads)
        out |= norm(b + "norm1", dim) | norm(b + "norm2", dim) | linear(b + "attn.qkv", dim, 3 * dim) | linear(b + "attn.proj", dim, dim)
        out |= {b + "attn.rel_pos_h": rel, b + "attn.rel_pos_w": rel}
        out |= linear(b + "mlp.lin1", dim, 4 * dim) | linear(b + "mlp.lin2", 4 * dim, dim)
    return {f"image_encoder.{k}": v for k, v in out.items()} | {
        "prompt_encoder.no_mask_embed.weight": (1, 256), "mask_decoder.iou_token.weight": (1, 256)}


def eva(dim, n_layers, patch=14, side=16):
    hidden = int(dim * 4 * 2 / 3)
    out = {"cls_token": (1, 1, dim), "mask_token": (1, 1, dim), "pos_embed": (1, 1 + side * side, dim), "rope.freqs_cos": (side * side, 8),
           "rope.freqs_sin": (side * side, 8), **conv("patch_embed.proj", dim, patch), **norm("norm", dim), **linear("lm_head", dim, 16)}
    for i in range(n_layers):
        b = f"blocks.{i}."
        out |= norm(b + "norm1", dim) | norm(b + "norm2", dim) | norm(b + "mlp.ffn_ln", hidden)
        for p in "qkv": out |= linear(f"{b}attn.{p}_proj", dim, dim, False)
        out |= {b + "attn.q_bias": (dim,), b + "attn.v_bias": (dim,), b + "attn.rope.freqs_cos": (side * side, 8), b + "attn.rope.freqs_sin": (side * side, 8)}
        out |= linear(b + "attn.proj", dim, dim)
        out |= linear(b + "mlp.w1", dim, hidden) | linear(b + "mlp.w2", dim, hidden) | linear(b + "mlp.w3", hidden, dim)
    return out


def behind(prefix, layout, head): return {prefix + k: v for k, v in layout.items()} | {head: (4, 4)}


def layout_of(name, dim=None, n_layers=None, heads=2, **sizes):
    "The authors' file of `name`, at its own size unless told otherwise."
    spec = RGB_BACKBONES[name]
    if dim is None: dim, n_layers, heads = spec.dim, spec.n_layers, spec.n_heads
    if spec.family == "dinov3_vit":
        gated, seven = "plus" in name or "7b" in name, "7b" in name
        return dinov3(dim, n_layers, (2 if seven else 4) * dim, gated, not seven, seven or "sat" in name, heads=heads)
    if spec.family == "clip": return clip(dim, n_layers, **{"side": spec.image_size // 14, **sizes})
    if spec.family == "sam": return sam(dim, n_layers, [n_layers * i // 4 - 1 for i in range(1, 5)], heads=heads, **sizes)
    if spec.family == "eva02": return eva(dim, n_layers, **sizes)
    plain = dinov2(dim, n_layers, registers="registers" in name, giant="giant" in name, mask="anything-3" not in name, **sizes)
    if spec.family == "depth_anything": return behind("pretrained.", plain, "depth_head.projects.0.weight")
    if spec.family == "prompt_depth_anything": return behind("pipeline.pretrained.", plain, "pipeline.depth_head.projects.0.weight")
    if spec.family == "depth_anything_3": return behind("model.backbone.pretrained.", plain, "model.head.projects.0.weight")
    return plain


def drawn(layout):
    torch.manual_seed(0)
    state = {k: torch.randn(shape) * 0.1 for k, shape in layout.items()}
    for key in [k for k in state if k.endswith("bias_mask")]:
        mask = torch.ones_like(state[key])
        mask[len(mask) // 3: 2 * len(mask) // 3] = 0
        state[key] = mask
    if "rope_embed.periods" in state: state["rope_embed.periods"] = periods(len(state["rope_embed.periods"]))
    return state


def periods(n): return 100 ** (torch.arange(n) / n)


NAMES = [name for name, spec in RGB_BACKBONES.items() if not spec.shipped]


@pytest.mark.parametrize("name", NAMES)
def test_full_size_every_key_of_the_authors_file(name):
    spec, layout = RGB_BACKBONES[name], layout_of(name)
    family = FAMILIES[spec.family]
    with torch.device("meta"):
        state = {k: torch.empty(shape) for k, shape in layout.items()}
        own = family.build(dict(dim=spec.dim, n_layers=spec.n_layers, n_heads=spec.n_heads, patch_size=spec.patch_size,
                                side=spec.image_size // spec.patch_size, bands=3, **spec.config)).state_dict()
    format, ours, aside, unexpected = read_as(state, family.formats, own)
    assert format.name == "original" and not unexpected
    absent = set(own) - set(ours)
    assert not set(ours) - set(own) and all(any(re.fullmatch(p, k) for p in format.fill) for k in absent)
    plain = lambda shape: [n for n in shape if n != 1]
    assert all(plain(ours[k].shape) == plain(own[k].shape) for k in ours)
    parts = sum(3 if re.search(r"attn\.(qkv\.weight|in_proj_)", k) else 1 for k in layout)  # not below: a floor for cut tensors
    assert parts and len(aside) < len(layout) / 3


def test_known_numbers_of_keys():
    assert len(layout_of("dinov2-large")) == 343
    assert len(layout_of("dinov2-with-registers-large")) == 344
    assert len(layout_of("dinov3-vitl16")) == 24 * 15 + 8


TINY = dict(dim=32, n_layers=4, n_heads=2)
TIMM = {  # ours -> timm's model of the same architecture
    "dinov3-vits16": ("vit_small_patch16_dinov3_qkvb", {}), "dinov3-vits16plus": ("vit_small_plus_patch16_dinov3_qkvb", {}),
    "dinov2-small": ("vit_small_patch14_dinov2", dict(img_size=56)), "dinov2-giant": ("vit_giant_patch14_dinov2", dict(img_size=56)),
    "dinov2-with-registers-small": ("vit_small_patch14_reg4_dinov2", dict(img_size=56)),
    "clip-vitl14": ("vit_large_patch14_clip_quickgelu_224", dict(img_size=56)),
    "sam-vitb": ("samvit_base_patch16", dict(img_size=64, global_attn_indexes=(0, 1, 2, 3))),
    "eva02-vitl14": ("eva02_large_patch14_224", dict(img_size=56)),
    "depth-anything-v2-small": ("vit_small_patch14_dinov2", dict(img_size=56)),
    "prompt-depth-anything-vitl": ("vit_small_patch14_dinov2", dict(img_size=56)),
    "depth-anything-3-mono-large": ("vit_small_patch14_dinov2", dict(img_size=56))}


def tiny_size(name): return {**TINY, "dim": 48 if "giant" in name else 32}


def timm_model(name):
    model, kwargs = TIMM[name]
    size = tiny_size(name)
    return timm.create_model(model, embed_dim=size["dim"], depth=4, num_heads=2, num_classes=0, **kwargs).eval()


def authors_file(name):
    "A tiny file under the authors' names."
    side = {} if "dinov3" in name else dict(side=4)
    size = tiny_size(name)
    return drawn(layout_of(name, size["dim"], 4, **side))


def timm_reads(name, state):
    "timm's model with the same file, by timm's own conversion."
    model = timm_model(name)
    convert = importlib.import_module(type(model).__module__).checkpoint_filter_fn
    inside = [p for p in ("pretrained.", "pipeline.pretrained.", "model.backbone.pretrained.") if any(k.startswith(p) for k in state)]
    if inside: state = {k.removeprefix(inside[0]): v for k, v in state.items() if k.startswith(inside[0])} | {"mask_token": torch.zeros(1)}
    found = convert(dict(state), model)
    model.load_state_dict({k: v for k, v in found.items() if not k.startswith("head.")}, strict=True)
    return model


def load_tiny(name, path, **kwargs):
    load = load_dfm if RGB_BACKBONES[name].kind == "dfm" else load_vfm
    if load is load_dfm: kwargs = {"patch_size": None, **kwargs}
    return load(name, path, **{**tiny_size(name), **kwargs})


def difference(backbone, theirs, images):
    with torch.no_grad():
        maps = theirs.forward_intermediates(images, indices=list(range(4)), norm=False, intermediates_only=True)
        return max(float((a - b.flatten(2).transpose(1, 2)).abs().max()) for a, b in zip(backbone.tokens(images), maps, strict=True))


def square(name): return torch.randn(2, 3, *(2 * [56 if RGB_BACKBONES[name].patch_size == 14 else 64]))


@pytest.mark.parametrize("name", TIMM)
def test_the_authors_file_gives_timms_features(name, tmp_path):
    state = authors_file(name)
    file = tmp_path / "mine.pth"
    torch.save({"state_dict": state} if "prompt" in name else state, file)
    backbone = load_tiny(name, file)
    assert difference(backbone, timm_reads(name, state), square(name)) < 1e-5
    report = backbone.report
    assert report.format == "original" and not (report.missing or report.unexpected or report.misshapen or report.inflated)
    again = type(backbone)  # the same arguments, the same weights
    assert isinstance(load_tiny(name, file), again) and load_tiny(name, file).fingerprint() == backbone.fingerprint()


@pytest.mark.parametrize("name", [n for n in TIMM if RGB_BACKBONES[n].timm_id])
def test_timms_file_and_folder_give_timms_features(name, tmp_path):
    from safetensors.torch import save_file
    theirs = timm_model(name)
    for p in theirs.parameters(): nn.init.normal_(p, std=0.1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "as timm writes it"}', encoding="utf-8")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert difference(load_tiny(name, place), theirs, square(name)) < 1e-5


def test_timm_without_attention_bias(tmp_path):
    theirs = timm.create_model("vit_small_patch16_dinov3", embed_dim=32, depth=4, num_heads=2, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    backbone = load_vfm("dinov3-vits16", tmp_path / "model.pth", **TINY)
    assert difference(backbone, theirs, square("dinov3-vits16")) < 1e-5
    assert len(backbone.report.filled) == 2 * 4 + 1 and backbone.report.format == "timm"


def test_a_bias_gone_from_the_authors_file_is_not_filled(tmp_path):
    state = {k: v for k, v in authors_file("dinov3-vits16").items() if "qkv.bias" not in k}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="8 missing .*q_proj.bias"): load_vfm("dinov3-vits16", tmp_path / "x.pth", **TINY)


def test_the_mask_of_meta_switches_the_key_bias_off(tmp_path):
    state = authors_file("dinov3-vits16")
    masked = load_vfm("dinov3-vits16", save(state, tmp_path), **TINY).fingerprint()
    state["blocks.0.attn.qkv.bias"][32:64] = 9.0
    assert load_vfm("dinov3-vits16", save(state, tmp_path), **TINY).fingerprint() == masked
    state["blocks.0.attn.qkv.bias_mask"].fill_(float("nan"))  # never set: the key part has to be zero by itself
    with pytest.raises(ValueError, match="1 unexpected .blocks.0.attn.qkv.bias with key part"):
        load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)
    state["blocks.0.attn.qkv.bias"][32:64] = 0
    load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)


def test_the_rotary_periods_of_metas_file_are_used_as_they_are(tmp_path):
    state, images = authors_file("dinov3-vits16"), square("dinov3-vits16")
    for key in state:
        if key.endswith("attn.qkv.weight"): state[key] *= 10  # attention that attends to something
    plain = load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)
    rounded = (1.1 * periods(4)).bfloat16().float()
    state["rope_embed.periods"] = rounded
    theirs = load_vfm("dinov3-vits16", save(state, tmp_path), in_bands=4, **TINY)  # rebuilt for more bands, periods kept
    before = plain.tokens(images)
    plain.model.rope_embeddings.inv_freq.copy_(1 / rounded)
    after = plain.tokens(images)
    assert 1e-5 < max(float((a - b).abs().max()) for a, b in zip(before, after)) < 1
    more = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    assert max(float((a - b).abs().max()) for a, b in zip(theirs.tokens(more), after)) < 1e-6
    state["rope_embed.periods"] = torch.ones(3)
    with pytest.raises(ValueError, match="expected 4 finite numbers"): load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)


def save(state, folder, name="x.pth"):
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.parametrize("kind, other", [(torch.bfloat16, True), (torch.float32, False), (None, False)])
def test_periods_are_part_of_the_fingerprint_where_they_are_not_the_usual_ones(kind, other, tmp_path):
    state = authors_file("dinov3-vits16")
    usual = load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)
    if kind is None: del state["rope_embed.periods"]
    else: state["rope_embed.periods"] = state["rope_embed.periods"].to(kind)
    found = load_vfm("dinov3-vits16", save(state, tmp_path), **TINY)
    assert (found.fingerprint() != usual.fingerprint()) is other
    assert usual.fingerprint() == weights_sha256(usual.model.state_dict()), "as it was before periods counted"


PROMPT = "depth_head.scratch.refinenet1.resConfUnit_depth.0.weight"
CONSTANTS = {"_mean": torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), "_std": torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)}


def test_prompt_depth_anythings_own_checkpoint(tmp_path):
    "model.ckpt holds its mean and deviation as buffers."
    state = authors_file("prompt-depth-anything-vitl") | {f"pipeline.{k}": v for k, v in CONSTANTS.items()}
    dfm = load_tiny("prompt-depth-anything-vitl", save({"state_dict": state, "epoch": 3}, tmp_path))
    assert {"pipeline._mean", "pipeline._std"} <= set(dfm.report.set_aside)
    bare = {k.removeprefix("pipeline."): v for k, v in state.items()}  # what its own loader makes of it
    assert load_tiny("prompt-depth-anything-vitl", save(bare, tmp_path)).fingerprint() == dfm.fingerprint()
    with pytest.raises(ValueError, match=r"1 unexpected \(pipeline._std"):
        load_tiny("prompt-depth-anything-vitl", save(state | {"pipeline._std": torch.ones(1, 3, 1, 1)}, tmp_path))


def test_the_two_depth_models_are_not_taken_for_one_another(tmp_path):
    encoder = dinov2(32, 4, side=4)
    plain = drawn(behind("pretrained.", encoder, "depth_head.scratch.refinenet1.out_conv.weight"))
    with pytest.raises(ValueError, match="Its keys are those of a depth_anything file .depth-anything-v2-small"):
        load_tiny("prompt-depth-anything-vitl", save(plain, tmp_path))
    with pytest.raises(ValueError, match="Its keys are those of a prompt_depth_anything file .prompt-depth-anything-vitl"):
        load_tiny("depth-anything-v2-small", save(plain | {PROMPT: torch.ones(1)}, tmp_path))
    load_tiny("depth-anything-v2-small", save(plain, tmp_path))


def test_the_combined_file_of_the_authors_gives_both_models(tmp_path):
    "Their scripts put the depth model, at 16 pixels and a smaller grid, beside a visual model with a four-band kernel."
    visual, depth = authors_file("dinov3-vits16"), drawn(dinov2(32, 4, patch=16, side=4))
    visual["patch_embed.proj.weight"] = torch.randn(32, 4, 16, 16)
    joined = visual | {f"depth_anything.pretrained.{k}": v for k, v in depth.items()} | {
        f"depth_anything.{PROMPT}": torch.ones(1)} | {f"depth_anything.{k}": v for k, v in CONSTANTS.items()}
    file = save({"state_dict": joined}, tmp_path, "combined.pth")
    vfm = load_vfm("dinov3-vits16", file, in_bands=4, **TINY)
    assert torch.equal(vfm.model.embeddings.patch_embeddings.weight, visual["patch_embed.proj.weight"]) and not vfm.extra
    assert vfm.fingerprint() == load_vfm("dinov3-vits16", save(visual, tmp_path), in_bands=4, **TINY).fingerprint()
    dfm = load_dfm("prompt-depth-anything-vitl", file, **TINY)
    assert dfm.patch_size == 16 and dfm.report.format == "combined"
    alone = {f"pipeline.pretrained.{k}": v for k, v in depth.items()} | {"pipeline.depth_head.x": torch.ones(1)}
    assert dfm.fingerprint() == load_dfm("prompt-depth-anything-vitl", save(alone, tmp_path), **TINY).fingerprint()
    with pytest.raises(ValueError, match="is for 4 bands, expected 3 or, as in_bands says, 3"): load_vfm("dinov3-vits16", file, **TINY)
    changed = visual | {"patch_embed.proj.weight": visual["patch_embed.proj.weight"] + torch.eye(4)[3].view(1, 4, 1, 1)}
    assert load_vfm("dinov3-vits16", save(changed, tmp_path), in_bands=4, **TINY).fingerprint() != vfm.fingerprint()


@pytest.mark.parametrize("name, given, what", [
    ("dinov3-vitl16", "dinov2-large", "those of a dinov2 file (dinov2-large)"),
    ("dinov3-vitl16", "dinov2-with-registers-large", "those of a dinov2_with_registers file (dinov2-with-registers-large)"),
    ("dinov2-large", "dinov2-with-registers-large", "those of a dinov2_with_registers file (dinov2-with-registers-large)"),
    ("dinov2-large", "dinov2-base", "The file has dim 768 and 12 blocks, expected 1024 and 24"),
    ("dinov3-vitl16", "clip-vitl14", "those of a clip file (clip-vitl14, clip-vitl14-336)")])
def test_a_file_of_another_model_is_named(name, given, what):
    "At full size, on the meta device."
    file = {k: torch.empty(shape, device="meta") for k, shape in layout_of(given).items()}
    assert what in WeightReader(name, "x.pth", backbone_size(name)).remedy(file)


def test_every_file_under_every_wrong_name_is_refused_by_what_it_is(tmp_path):
    "Also timm's DINOv3, which has registers and no table of positions, and models that differ in their layers alone."
    files = {name: authors_file(name) for name in ("dinov3-vits16", "dinov3-vits16plus", "dinov2-small", "dinov2-with-registers-small",
                                                   "depth-anything-v2-small")}
    files["timm"] = timm.create_model("vit_small_patch16_dinov3", embed_dim=32, depth=4, num_heads=2, num_classes=0).state_dict()
    family = lambda n: "dinov3_vit" if n == "timm" else RGB_BACKBONES[n].family
    for given, state in files.items():
        for name in ("dinov3-vits16", "dinov3-vits16plus", "dinov2-small", "dinov2-with-registers-small", "sam-vitb", "depth-anything-v2-small"):
            if name == given or (name, given) == ("dinov3-vits16", "timm"): continue
            what = "Its layers are those of another model .*" + given.replace("timm", "dinov3-vits16") if family(name) == family(given) else (
                f"those of a {family(given)} file")
            with pytest.raises(ValueError, match=what): load_tiny(name, save(state, tmp_path))
    wide = drawn(dinov3(64, 4, 256))
    with pytest.raises(ValueError, match=r"\(1, 1, 64\), expected \(1, 1, 32\).*has dim 64 and 4 blocks"): load_tiny("dinov3-vits16", save(wide, tmp_path))


def test_a_folder_of_the_same_sizes_with_other_layers_is_refused(tmp_path):
    "dinov3-vits16 and dinov3-vits16plus have one width, depth and number of heads."
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    DINOv3ViTModel(DINOv3ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, num_register_tokens=4,
                                   use_gated_mlp=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dinov3-vits16: config.json of .* has use_gated_mlp=True, expected False"):
        load_tiny("dinov3-vits16", tmp_path)
    load_tiny("dinov3-vits16plus", tmp_path)


def test_a_dinov2_stored_for_another_size_is_the_authors_at_that_size(tmp_path):
    "At its own patch size the stored table and the one read on the run are the same rule."
    for name in ("dinov2-small", "dinov2-with-registers-small"):
        file, images = save(authors_file(name), tmp_path), torch.randn(1, 3, 84, 84)
        on_the_run, stored = load_tiny(name, file), load_tiny(name, file, image_size=84)
        assert stored.model.embeddings.position_embeddings.shape[1] == 37
        for a, b in zip(on_the_run.tokens(images), stored.tokens(images)): assert torch.equal(a, b)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    state = authors_file("dinov2-small")
    state["blocks.1.mlp.fc1.bias"][0] = float("inf")
    with pytest.raises(ValueError, match=r"x.pth: encoder.layer.1.mlp.fc1.bias \(1 of 128 values\) not finite"):
        load_tiny("dinov2-small", save(state, tmp_path))


def test_the_released_conversion_of_a_depth_model(tmp_path):
    "14 -> 16 pixels and 37 x 37 -> 32 x 32 positions, bicubic without corners or antialias, from the authors' file."
    state = drawn(behind("pretrained.", dinov2(32, 4), "depth_head.x"))
    dfm = load_dfm("depth-anything-v2-small", save(state, tmp_path), image_size=512, **TINY)
    kernel, table = state["pretrained.patch_embed.proj.weight"], state["pretrained.pos_embed"]
    own = dfm.model.state_dict()
    expected = torch.nn.functional.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(own["embeddings.patch_embeddings.projection.weight"], expected)
    grid = table[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(32, 32), mode="bicubic", align_corners=False)
    assert torch.equal(own["embeddings.position_embeddings"][:, 1:], grid.flatten(2).transpose(1, 2))
    assert torch.equal(own["embeddings.position_embeddings"][:, :1], table[:, :1])
    assert dfm.grid(512, 512) == (32, 32) and len(dfm.report.resized) == 2


def test_a_file_converted_to_16_pixels_is_taken_as_it_is(tmp_path):
    converted = load_vfm("eva02-vitl14", save(drawn(eva(32, 4, patch=16, side=4)), tmp_path), **TINY)
    assert converted.patch_size == 16 and converted.tokens(torch.randn(1, 3, 32, 48))[0].shape == (1, 6, 32)


def test_sam_stored_for_another_size_is_sam_run_at_it(tmp_path):
    file = save(drawn(sam(32, 4, (0, 1, 2, 3), side=8)), tmp_path)
    as_is, stored = load_vfm("sam-vitb", file, **TINY), load_vfm("sam-vitb", file, image_size=64, **TINY)
    images = torch.randn(1, 3, 64, 64)
    assert stored.model.pos_embed.shape[1] == 4 and as_is.model.pos_embed.shape[1] == 8
    for a, b in zip(as_is.tokens(images), stored.tokens(images)): torch.testing.assert_close(a, b)


def test_a_depth_model_is_not_its_backbone(tmp_path):
    file = save(drawn(dinov2(32, 4, side=4)), tmp_path)
    load_vfm("dinov2-small", file, **TINY)
    with pytest.raises(ValueError, match="Its keys are those of a dinov2 file"): load_dfm("depth-anything-v2-small", file, **TINY)


def test_rules_are_total_and_first_match_wins():
    for family in FAMILIES.values():
        for format in family.formats:
            for pattern, target in format.rules:
                groups = re.compile(pattern).groups
                for t in (target,) if isinstance(target, str) or target is None else target:
                    assert t is None or all(int(n) <= groups for n in re.findall(r"\\(\d)", t)), (pattern, t)
    ours, aside, unexpected = translate({"a": 1, "b": 2}, FAMILIES["sam"].formats[1])
    assert not ours and not aside and unexpected == ["a", "b"]


def test_resizing_at_the_same_size_is_the_identity():
    kernel, table = torch.randn(2, 3, 14, 14), torch.randn(1, 17, 4)
    assert torch.equal(resize_patch(kernel, 14), kernel) and torch.equal(resize_positions(table, (4, 4)), table)


def test_a_published_name_promises_published_bytes(tmp_path):
    file = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    file.write_bytes(b"\x80\x02half")
    with pytest.raises(ValueError, match="truncated or altered"): load_vfm("dinov3-vits16", file, **TINY)
    with pytest.raises(ValueError, match="published .* has 08c60483: "): check_published(RGB_BACKBONES["dinov3-vits16"], file)
