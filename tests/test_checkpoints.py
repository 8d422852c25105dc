"Published checkpoints: every key accounted for, bit for bit there and back, and what is refused."
import json
import os
import pickle
import re
import sys
import types
import zipfile

import pytest
import torch

from spectralmoe.adapter import SpectralMoE, SpectralMoEConfig
from spectralmoe.backbones import load_dfm, load_vfm
from spectralmoe.benchmarks import BENCHMARKS
from spectralmoe.checkpoints import (convert, convert_mmseg_head, convert_rein, convert_released, mmseg_head_state,
                                     read_checkpoint, rein_state, released_state, segmentor_from_released, to_released)
from spectralmoe.head import Mask2FormerHead
from spectralmoe.segmentor import Segmentor

VFM = dict(name="dinov3-vits16", weights="random", dim=32, n_layers=3, n_heads=4, inflate="rgb_kept")
DFM = dict(name="depth-anything-v2-small", weights="random", dim=32, n_layers=3, n_heads=4, image_size=64)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=2, decoder_layers=2, n_heads=4, encoder_width=48, decoder_width=64)


def build(method="released", train_extra=False, **kwargs):
    return Segmentor.build("made_tiles", {**VFM, "train_extra": train_extra}, DFM, method, head_sizes=HEAD,
                           **{**dict(n_experts=3, rank=2), **kwargs})


def random_like(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return state | {k: torch.full_like(v, float(k.endswith(".std"))) for k, v in state.items() if k.endswith((".mean", ".std"))}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = build(seed=3).eval()
    with torch.no_grad():
        for p in made.trained_state_dict().values(): p.copy_(torch.randn_like(p) / 5)
    return made


@pytest.fixture(scope="module")
def published(model):
    return to_released(model)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], v) for k, v in b.items())


def test_the_authors_686_keys_fill_adapter_and_head_and_come_back(released_parity):
    "At full size: names and shapes of a checkpoint as the authors' code writes it, random values."
    state = random_like(json.loads((released_parity / "checkpoint_keys_gid.json").read_text()))
    assert len(state) == 686
    ours = convert_released(state)
    part = lambda name: {k.removeprefix(name): v for k, v in ours.items() if k.startswith(name)}
    with torch.device("meta"):
        adapter, head = SpectralMoE(SpectralMoEConfig.released(1024, 24)), Mask2FormerHead(1024, 24)
    adapter.load_state_dict(part("adapter."), strict=True, assign=True)
    head.criterion.empty_weight = None
    head.load_state_dict(part("head."), strict=True, assign=True)
    back = released_state({**{f"adapter.{k}": p.detach() for k, p in adapter.named_parameters()},
                           **{f"head.{k}": p.detach() for k, p in head.named_parameters()}})
    assert same(back, state)
    assert sum(v.numel() for v in state.values()) == 26_278_874 + 2


def test_a_model_goes_there_and_back_and_computes_the_same(model, published, tmp_path):
    torch.save({"state_dict": published}, tmp_path / "published.pth")
    again = segmentor_from_released(tmp_path / "published.pth", "made_tiles", VFM, DFM)
    images = torch.randn(2, 5, 64, 48)
    assert torch.equal(again(images), model(images)) and not again.training
    assert same(to_released(again), published)
    assert again.adapter.cfg == SpectralMoEConfig.released(32, 3, n_experts=3, n_tokens=8, rank=2, query_dim=32)


def test_what_is_in_no_tensor_is_given(published):
    again = segmentor_from_released(published, "made_tiles", VFM, DFM, top_k=2, gating="softmax")
    assert (again.adapter.cfg.top_k, again.adapter.cfg.gating) == (2, "softmax")
    stored = dict(source={"mean": [0.0] * 5, "std": [1.0] * 5})
    assert segmentor_from_released(published, "made_tiles", VFM, DFM, statistics=stored).statistics == stored


def test_every_key_is_needed_and_no_other_is_taken(published):
    "Whichever single key is missing, the checkpoint is refused; the buffers of constants may be."
    from spectralmoe.checkpoints import RELEASED_BUFFERS
    take = lambda state: segmentor_from_released(state, "made_tiles", VFM, DFM)
    families = {k.rstrip("0123456789"): k for k in published}
    heads = [k for k in published if k.startswith("decode_head.")]
    for key in {*list(families.values())[::7], *heads[::23], heads[-1]}:
        if key.split(".")[-1] in RELEASED_BUFFERS: continue
        with pytest.raises(ValueError, match="missing|no Mask2Former head|no released adapter"):
            take({k: v for k, v in published.items() if k != key})
    for extra in ("backbone.patch_embed.proj.weight", "backbone.depthmoe.w_gate.0.2", "decode_head.conv_seg.weight",
                  "decode_head.query_embed.weight", "module.decode_head.cls_embed.bias", "decode_head.cls_embed.bias.extra"):
        with pytest.raises(ValueError, match="belong to no part|unexpected"): take({**published, extra: torch.ones(1)})
    assert take({k: v for k, v in published.items() if k.rpartition(".")[2] not in RELEASED_BUFFERS})


@pytest.mark.parametrize("key", ["backbone.depthmoe.mlp_delta_f.weight", "backbone.depthmoe.scale", "decode_head.level_embed.weight",
                                 "decode_head.transformer_decoder.layers.1.self_attn.attn.in_proj_weight"])
def test_other_sizes_are_refused(published, key):
    with pytest.raises(ValueError, match="of another shape"):
        segmentor_from_released({**published, key: torch.zeros(*published[key].shape, 3)[..., :1] if published[key].ndim < 2
                                 else published[key][:-3]}, "made_tiles", VFM, DFM)


def test_tensors_without_the_axes_of_an_expert_or_a_map_are_named(published):
    take = lambda **changed: segmentor_from_released({**published, **{f"backbone.depthmoe.{k}": v for k, v in changed.items()}},
                                                     "made_tiles", VFM, DFM)
    flat = {k.removeprefix("backbone.depthmoe."): v.flatten() for k, v in published.items() if ".experts_a." in k}
    with pytest.raises(ValueError, match=r"experts_a.0.0 is \(16,\), .*, expected two axes"): take(**flat)
    with pytest.raises(ValueError, match=r"1 keys of another shape \(transform.bias is \(\), expected \(32,\)\)"):
        take(**{"transform.bias": torch.tensor(1.0)})


def test_backbones_that_cannot_be_those_of_the_checkpoint(published):
    load = lambda vfm=VFM, dfm=DFM, benchmark="made_tiles": segmentor_from_released(published, benchmark, vfm, dfm)
    with pytest.raises(ValueError, match="random weights, on which"): load({**VFM, "weights": None})
    with pytest.raises(ValueError, match="random weights, on which"): load(dfm={**DFM, "weights": None})
    with pytest.raises(ValueError, match="'n_layers': 2.*trained on.*'n_layers': 3"): load({**VFM, "n_layers": 2})
    with pytest.raises(ValueError, match="'dim': 64"): load(dfm={**DFM, "dim": 64})
    with pytest.raises(ValueError, match="train_extra=False"): load({**VFM, "train_extra": True})
    with pytest.raises(ValueError, match="is of 5 classes, wildfire_cross_region has 2"): load(benchmark="wildfire_cross_region")
    ready = load_vfm(**VFM, in_bands=BENCHMARKS["made_tiles"].input_sensor, train_extra=False)
    assert load(ready, load_dfm(**DFM)).vfm is ready


def test_only_the_released_arithmetic_leaves_under_the_released_names():
    with pytest.raises(ValueError, match="gate_weighting is 'topk' and there 'none'"): to_released(build("spectralmoe"))
    with pytest.raises(ValueError, match="train_extra=False"): to_released(build(train_extra=True))
    with pytest.raises(ValueError, match="no SpectralMoE adapter"):
        to_released(Segmentor.build("made_tiles", VFM, DFM, "frozen", head_sizes=HEAD))
    same_thing = build("spectralmoe", perceptual="channel_sums", combine="logsumexp", fusion="diagonal", gate_weighting="none")
    assert len(to_released(same_thing)) > 100


def test_a_learned_query_position_has_its_place():
    "Heads that are not linked to experts keep `query_embed`."
    head = Mask2FormerHead(32, 5, linked=False, **HEAD)
    ours = {k: p.detach() for k, p in head.named_parameters()}
    theirs = mmseg_head_state(ours)
    assert "query_embed.weight" in theirs and same(convert_mmseg_head(theirs), ours)
    assert same(convert_mmseg_head({**theirs, "loss_cls.class_weight": torch.ones(6)}), ours)


def mmengine_file(path, state, name="mmengine.logging.history_buffer", builtins="__builtin__"):
    "A checkpoint as mmengine pickles it, without mmengine: curves as arrays, methods as `getattr`."
    import numpy as np
    def newest(self): return self._log_history[-1]
    newest.__module__, newest.__qualname__ = name, "HistoryBuffer.newest"
    parts = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
    sys.modules |= {p: types.ModuleType(p) for p in parts}
    buffer = type("HistoryBuffer", (), {"__module__": name, "__qualname__": "HistoryBuffer", "newest": newest})
    sys.modules[name].HistoryBuffer = buffer
    made = buffer()
    made._log_history, made._count_history, made.max_length = np.arange(4.0), np.ones(4), 1_000_000
    made._statistics_methods = {"current": buffer.newest, "last": made.newest, "scalar": np.float64(10)}
    torch.save(dict(meta=dict(cfg="x = 1\n", epoch=18, iter=70884, dataset_meta=dict(classes=("a",), palette=[[0, 0, 0]])),
                    state_dict=state, message_hub=dict(log_scalars={"train/loss": made}, runtime_info={"iter": 3},
                                                       resumed_keys={"train/loss": True})), path)
    for p in parts: del sys.modules[p]
    content = in_zip(path)
    assert content.count(b"c__builtin__\ngetattr\n") == 1, "the fixture holds the opcodes it is about"
    in_zip(path, content.replace(b"c__builtin__\ngetattr\n", f"c{builtins}\ngetattr\n".encode()))
    return path


def in_zip(path, content=None):
    "The pickle inside a file of `torch.save`; with `content`, put there."
    with zipfile.ZipFile(path) as archive: files = {n: archive.read(n) for n in archive.namelist()}
    key = next(n for n in files if n.endswith("data.pkl"))
    if content is not None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (files | {key: content}).items(): archive.writestr(name, data)
    return files[key]


@pytest.mark.parametrize("builtins", ["__builtin__", "builtins"])
def test_mmengine_layout_is_read_without_mmengine_and_without_pickle(published, tmp_path, builtins):
    file = mmengine_file(tmp_path / "iter_70884.pth", published, builtins=builtins)
    with pytest.raises(Exception, match="HistoryBuffer|numpy|getattr"): torch.load(file, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    assert same(read_checkpoint(file), published)
    assert "mmengine" not in sys.modules and set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(ValueError, match="elsewhere.history_buffer.HistoryBuffer"):
        read_checkpoint(mmengine_file(tmp_path / "other.pth", published, "elsewhere.history_buffer"))


def text(value): return b"X" + len(value).to_bytes(4, "little") + value.encode()


GETATTR, LOG = b"c__builtin__\ngetattr\n", b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
def attribute(owner, name): return GETATTR + b"(" + owner + text(name) + b"tR"


CHAINS = {
    "a list": attribute(b"]", "__class__"), "a string": attribute(text("x"), "upper"), "itself": attribute(GETATTR, "__globals__"),
    "a module's function": attribute(b"cos\nsystem\n", "__call__"), "an import": attribute(b"c__builtin__\n__import__\n", "__call__"),
    "the log, then called": attribute(LOG, "__init__") + b"(" + text("touch ran") + b"tR",
    "the log's globals, then called": attribute(attribute(LOG, "__init__"), "__globals__") + b"(" + text("os") + b"tR",
    "three arguments": GETATTR + b"(" + LOG + text("x") + text("y") + b"tR"}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_getattr_in_a_pickle_reaches_nothing(chain, tmp_path, monkeypatch):
    "Hand-made instructions that reach for more than the log: refused, and nothing ran."
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1)}, "x.pth")
    in_zip("x.pth", b"\x80\x02" + chain + b".")
    with pytest.raises(ValueError, match="which were not run|truncated or damaged"): read_checkpoint("x.pth")
    assert sorted(os.listdir()) == ["x.pth"]


def test_what_getattr_gives_is_inert(tmp_path):
    "An attribute of the log is a thing without behaviour, whatever its name."
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    in_zip(tmp_path / "x.pth", b"\x80\x02" + attribute(LOG, "__subclasses__") + b".")
    with pytest.raises(ValueError, match="holds a _Nothing, expected named tensors"): read_checkpoint(tmp_path / "x.pth")


class Runs:
    def __init__(self, call): self.call = call
    def __reduce__(self): return self.call


@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 4", "protocol 4 in a zip"])
@pytest.mark.parametrize("call", [lambda p: (os.system, (f"echo ran > {p}",)), lambda p: (eval, (f"open({str(p)!r}, 'w')",)),
                                  lambda p: (getattr, ("a", "upper"))])
def test_a_program_is_not_run(call, kind, tmp_path):
    for where in (dict(state_dict={"a": 1, "b": Runs(call(tmp_path / "ran"))}), dict(state_dict={"a": 1}, message_hub=Runs(call(tmp_path / "ran")))):
        if kind == "protocol 4": (tmp_path / "program.pth").write_bytes(pickle.dumps(where, protocol=4))
        else: torch.save(where, tmp_path / "program.pth", _use_new_zipfile_serialization="legacy" not in kind,
                         pickle_protocol=4 if "4" in kind else 2)
        with pytest.raises(ValueError, match=r"\((posix.system|nt.system|builtins.eval|eval|__builtin__.eval|getattr|builtins.getattr)\), which were not run"):
            read_checkpoint(tmp_path / "program.pth")
    assert not (tmp_path / "ran").exists()


def test_pickles_of_later_protocols_say_what_they_are(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(ValueError, match="a later protocol, .*torch.save"): read_checkpoint(tmp_path / "x.pth")


def test_values_and_shapes_are_those_of_a_checkpoint(published, tmp_path):
    take = lambda change: segmentor_from_released({**published, **change}, "made_tiles", VFM, DFM)
    for key in ("decode_head.cls_embed.weight", "backbone.depthmoe.experts_b.1.2", "decode_head.pixel_decoder.mask_feature.bias"):
        broken = published[key].clone()
        broken.view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=rf"{key} \(1 of \d+ values\) not finite"): take({key: broken})
        torch.save({"state_dict": {**published, key: broken}}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=rf"x.pth: {key}"): convert(tmp_path / "x.pth", tmp_path / "ours", "made_tiles", VFM, DFM)
    assert not (tmp_path / "ours").exists()
    torch.save({"state_dict": {**published, "backbone.depthmoe.experts_a.1.2": torch.ones(5, 2)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth.*experts_a.1.2 is \(5, 2\), expected \(8, 2\)"):
        convert(tmp_path / "x.pth", tmp_path / "ours", "made_tiles", VFM, DFM)
    with pytest.raises(ValueError, match=r"decode_head.cls_embed.weight is \(6, 30\), expected \(6, 32\)"):
        take({"decode_head.cls_embed.weight": torch.ones(6, 30)})
    with pytest.raises(ValueError, match=r"norms.2.bias is \(3,\), expected \(32,\)"): take({"decode_head.transformer_decoder.layers.1.norms.2.bias": torch.ones(3)})


def test_released_checkpoints_sit_on_kernels_copied_in_turn(published, tmp_path):
    torch.save({"state_dict": published}, tmp_path / "x.pth")
    plain = {k: v for k, v in VFM.items() if k != "inflate"}
    rgb = load_vfm(**plain).model.embeddings.patch_embeddings.weight
    made = convert(tmp_path / "x.pth", tmp_path / "ours", "made_tiles", plain, DFM)
    again = Segmentor.from_pretrained(made)
    assert torch.equal(again.vfm.model.embeddings.patch_embeddings.weight, rgb[:, [0, 1, 2, 0, 1]]) and not again.vfm.extra
    note = json.loads((made / "conversion.json").read_text())
    assert note["patch kernels"].startswith("cyclic: ") and note["from"] == "x.pth" and str(tmp_path) not in json.dumps(note)
    kept = segmentor_from_released(published, "made_tiles", plain, DFM, inflate="rgb_kept")
    assert len(kept.vfm.extra) == 2 and kept.vfm.fingerprint() != again.vfm.fingerprint()
    assert segmentor_from_released(published, "made_tiles", VFM, DFM).vfm.fingerprint() == kept.vfm.fingerprint(), "vfm says it"


def test_a_backbone_file_with_five_bands_is_taken_as_it_is_and_part_of_the_fingerprint(published, tmp_path):
    "What the authors' scripts write: a kernel for all bands. from_pretrained notices another."
    generator = torch.Generator().manual_seed(0)
    source = load_vfm(**{**VFM, "inflate": "cyclic"}, in_bands=5)
    with torch.no_grad(): source.model.embeddings.patch_embeddings.weight[:, 3:].normal_(generator=generator)
    source.model.save_pretrained(tmp_path / "vfm")
    given = {**VFM, "weights": str(tmp_path / "vfm")}
    folder = segmentor_from_released(published, "made_tiles", given, DFM).save_pretrained(tmp_path / "ours")
    again = Segmentor.from_pretrained(folder)
    assert torch.equal(again.vfm.model.embeddings.patch_embeddings.weight, source.model.embeddings.patch_embeddings.weight)
    with torch.no_grad(): source.model.embeddings.patch_embeddings.weight[:, 4] += 1
    source.model.save_pretrained(tmp_path / "vfm")
    with pytest.raises(ValueError, match="the weights have sha256"): Segmentor.from_pretrained(folder)


def test_files_that_are_no_checkpoints(published, tmp_path):
    mmengine_file(tmp_path / "whole.pth", published)
    whole = (tmp_path / "whole.pth").read_bytes()
    cases = {"page.pth": b"\n<!DOCTYPE html><html>", "page.safetensors": b"<html>", "lfs.pth": b"version https://git-lfs.github.com/spec/v1",
             "empty.pth": b"", **{f"cut{n}.pth": whole[:n] for n in (3, 1000, len(whole) // 2, len(whole) - 100)}}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*(web page|git lfs pull|download)"): read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.pth"): read_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_both_ways(model, published, suffix, tmp_path):
    mmengine_file(tmp_path / "a.pth", published)
    folder = convert(tmp_path / "a.pth", tmp_path / "ours", "made_tiles", VFM, DFM)
    images = torch.randn(1, 5, 32, 64)
    assert torch.equal(Segmentor.from_pretrained(folder).eval()(images), model(images))
    file = convert(folder, tmp_path / "new" / f"theirs{suffix}")
    assert same(read_checkpoint(file), published) and [f.name for f in file.parent.iterdir()] == [file.name]
    with pytest.raises(FileExistsError, match="is there already"): convert(folder, file)
    with pytest.raises(ValueError, match="has to be a folder"): convert(file, tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="no config.json"): convert(tmp_path, tmp_path / "y.pth")


def test_rein_there_and_back():
    shapes = dict(learnable_tokens_a=(24, 100, 16), learnable_tokens_b=(24, 16, 1024), scale=(), **{
        f"{name}.{part}": shape[: 2 if part == "weight" else 1] for part in ("weight", "bias") for name, shape in
        dict(mlp_token2feat=(1024, 1024), mlp_delta_f=(1024, 1024), transform=(256, 1024), merge=(256, 768)).items()})
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 2_990_081, "the count of Rein's trained parameters"
    head = {k: p.detach() for k, p in Mask2FormerHead(32, 19, **HEAD).named_parameters()}
    state = random_like({f"backbone.reins.{k}": s for k, s in shapes.items()})
    state |= {f"decode_head.{k}": v for k, v in mmseg_head_state(head).items() if k != "query_feat.weight"}
    state |= random_like({"decode_head.querys2feat.weight": (256, 256), "decode_head.querys2feat.bias": (256,)})
    ours = convert_rein(state)
    assert same(rein_state(ours), state) and ours["adapter.tokens.A"].shape == (24, 100, 16)
    assert ours["adapter.to_content.weight"].shape == (256, 256)
    for change in ({"backbone.reins.extra": torch.ones(1)}, {"backbone.cls_token": torch.ones(1)}, {"decode_head.x": torch.ones(1)}):
        with pytest.raises(ValueError, match="belong to no part"): convert_rein({**state, **change})
    for key, wrong, words in (("learnable_tokens_a", (24, 100), "(24, 100), expected (24, 100, 16)"),
                              ("learnable_tokens_b", (24, 1024, 16), "(24, 1024, 16), expected (24, 16, 1024)"),
                              ("mlp_delta_f.weight", (512, 1024), "(512, 1024), expected (1024, 1024)"),
                              ("merge.weight", (256, 256), "(256, 256), expected (256, 768)"), ("scale", (3,), "(3,), expected ()")):
        with pytest.raises(ValueError, match=f"^x.pth, .*{re.escape(f'{key} is {words}')}"):
            convert_rein({**state, f"backbone.reins.{key}": torch.ones(wrong)}, "x.pth")
    with pytest.raises(ValueError, match="no Mask2Former head"):
        convert_rein({k: v for k, v in state.items() if k.startswith("backbone.")})
    with pytest.raises(ValueError, match="1 keys missing .such as scale"):
        convert_rein({k: v for k, v in state.items() if not k.endswith("reins.scale")})
    with pytest.raises(ValueError, match="belong to no part"): rein_state({**ours, "gates.0": torch.ones(1)})
