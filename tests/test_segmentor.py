"The whole model: what is trained, what is refused, and that a folder gives back the same model."
import json
from pathlib import Path

import pytest
import torch

from spectralmoe.backbones import load_dfm, load_vfm
from spectralmoe.benchmarks import BENCHMARKS, IGNORE
from spectralmoe.saving import read_config
from spectralmoe.segmentor import METHODS, Segmentor

VFM = dict(name="dinov3-vits16", dim=32, n_layers=3, n_heads=4, patch_size=8)
DFM = dict(name="depth-anything-v2-small", dim=32, n_layers=3, n_heads=4, patch_size=8, image_size=48)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, n_heads=4, encoder_width=32, decoder_width=32, n_points=64)


def build(method="spectralmoe", **kwargs):
    sizes = {} if METHODS[method].head or kwargs.get("head") in ("pixel_shuffle", "spectral") else HEAD
    more = {k: v for k, v in dict(n_experts=3, rank=2).items() if k in METHODS[method].takes() and k not in METHODS[method].fields}
    return Segmentor.build(**{**dict(benchmark="made_tiles", vfm=VFM, dfm=DFM, method=method, head_sizes=sizes), **more, **kwargs})


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 5, 44, 52), torch.randint(5, (2, 44, 52))


def train(model, images, labels, steps=2):
    model.initialise(images)
    optimiser = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        optimiser.zero_grad(); model.loss(images, labels)["loss"].backward(); optimiser.step()
    return model


@pytest.mark.parametrize("method, head", [(m.name, head) for m in METHODS.values() if not m.tuner for head in ("mask2former", "pixel_shuffle")]  # those are in test_baselines
                         + [("frozen", "spectral"), ("spectralmoe", "spectral")])
def test_trains_saves_loads_and_predicts_the_same(method, head, batch, tmp_path):
    model = build(method, head=head)
    start = {k: v.clone() for k, v in model.trained_state_dict().items()}
    train(model, *batch)
    routed = getattr(getattr(model.adapter, "cfg", None), "n_experts", 2) > 1  # with one expert a gate has nothing to decide
    still = [k for k, v in model.trained_state_dict().items() if torch.equal(v, start[k]) and (routed or ".gates." not in k)]
    assert not still, f"not trained: {still}"
    again = Segmentor.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))
    assert again.predict(batch[0]).shape == (2, 44, 52)
    saved = (tmp_path / "model" / "model.safetensors").stat().st_size
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= saved < trained + 50_000, "what was trained, and nothing else"


@pytest.mark.parametrize("vfm", ["dinov3-vits16", "dinov2-small", "dinov2-with-registers-small"])
def test_any_number_of_prefix_tokens(vfm, batch):
    vfm = dict(VFM, name=vfm, **({} if vfm.startswith("dinov3") else dict(image_size=48)))
    before = build(vfm=vfm)
    frozen = {k: v.clone() for k, v in before.state_dict().items() if k.startswith(("vfm.model", "dfm"))}
    after = train(before, *batch).state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(batch):
    for method in METHODS:
        images, labels = (x[..., :44] for x in batch)  # an even number of tokens, for fada_released
        model = train(build(method), images, labels)
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, (method, name)
        assert not model.vfm or not model.vfm.training, "a backbone stays in eval mode"


def test_methods_start_alike_and_share_random_numbers(batch):
    "Same head at the start, and gate noise shifts nothing that the head draws."
    models, states = {m: build(m).train() for m in ("frozen", "spectralmoe")}, {}
    for name, model in models.items():
        loss = model.head.loss
        def recorded(*args, name=name, loss=loss):
            states[name] = torch.random.get_rng_state()
            return loss(*args)
        model.head.loss = recorded
        torch.manual_seed(3); model.loss(*batch)
    assert torch.equal(*states.values())
    assert torch.equal(*(m.head.classifier.weight for m in models.values()))


@pytest.mark.parametrize("method", ["frozen", "full"])
def test_a_given_backbone_is_not_trained_behind_its_owners_back(method, batch):
    "Models built from one backbone object share no trained kernel, so that methods start alike."
    vfm = load_vfm(**VFM, in_bands=BENCHMARKS["made_tiles"].input_sensor)
    before = {k: v.clone() for k, v in vfm.state_dict().items()}
    first = train(build(method, vfm=vfm), *batch)
    second = build(method, vfm=vfm)
    assert not torch.equal(first.vfm.extra_bands, before["extra_bands"])
    assert all(torch.equal(v, before[k]) for m in (vfm, second.vfm) for k, v in m.state_dict().items())
    assert vfm.frozen


def test_another_backbone_is_refused_with_both_hashes(batch, tmp_path):
    folder = build().save_pretrained(tmp_path / "model")
    other = load_vfm(**{**build().vfm.source, "seed": 7})
    with pytest.raises(ValueError, match=f"{other.fingerprint()[:12]}.*was trained on"):
        Segmentor.from_pretrained(folder, vfm=other)


def test_a_backbone_for_other_bands_is_refused():
    with pytest.raises(ValueError, match=r"loaded for .3 bands., the images have .B4 0.6646 um, B3"):
        build(vfm=load_vfm(**VFM))


def test_depth_model_on_another_grid(batch):
    dfm = dict(DFM, patch_size=4)
    assert train(build(dfm=dfm), *batch).predict(batch[0]).shape == (2, 44, 52)
    with pytest.raises(ValueError, match="tokens"): build(dfm=dfm, fusion="structure_guided")
    with pytest.raises(ValueError, match="n_layers"): build(dfm=dict(DFM, n_layers=2))


def test_labels_that_are_all_ignored_and_bfloat16(batch):
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(batch[0], torch.full_like(batch[1], IGNORE))
    losses["loss"].backward()
    assert all(v.isfinite() for v in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_depth_reads_red_green_blue_whatever_the_order_of_bands(batch):
    from dataclasses import replace
    task = BENCHMARKS["made_tiles"]
    turned = replace(task, bands=("nir", "blue", "red", "swir22", "green"))
    order = [task.bands.index(b) for b in turned.bands]
    a, b = (Segmentor.build(t, VFM, DFM, head_sizes=HEAD, n_experts=3, rank=2).eval() for t in (task, turned))
    assert torch.allclose(a(batch[0]), b(batch[0][:, order]), atol=1e-4)


def test_depth_tokens_from_disk_are_the_same(batch, tmp_path):
    from spectralmoe.backbones import CachedTokens
    model = build().eval()
    plain = model(batch[0])
    model.dfm = CachedTokens(model.dfm, tmp_path)
    assert torch.equal(model(batch[0]), plain) and torch.equal(model(batch[0]), plain)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_random_row_draws_the_backbone_by_the_seed_of_the_run(tmp_path):
    "The same architecture, another draw for every seed; a model that is loaded already is refused."
    a, b, frozen = build("random"), build("random", seed=1), build("frozen")
    assert a.vfm.fingerprint() == build("random").vfm.fingerprint() != b.vfm.fingerprint()
    assert a.vfm.frozen and a.dfm is None and a.vfm.source["weights"] == "random" and b.vfm.source["seed"] == 1
    assert a.trained_state_dict().keys() == frozen.trained_state_dict().keys()
    assert torch.equal(a.head.classifier.weight, frozen.head.classifier.weight)
    assert Segmentor.from_pretrained(b.save_pretrained(tmp_path / "b")).vfm.fingerprint() == b.vfm.fingerprint()
    with pytest.raises(ValueError, match="give a name or the arguments of `load_vfm`"): build("random", vfm=frozen.vfm)


def test_a_named_backbone_keeps_its_architecture_without_its_weights():
    sizes = dict(HEAD, scales=(2, 1, 0.5, 0.25))
    model = build("random", vfm="mini_vfm", head_sizes=sizes)
    assert model.vfm.name == "mini_vfm" and model.vfm.source["weights"] == "random"
    assert model._run(torch.zeros(1, 5, 64, 64))[0].masks[-1].shape[-2:] == (16, 16), "stride 4 at patches of 8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method, head", [("raw_conv", "mask2former"), ("spectralmoe", "mask2former"), ("released", "pixel_shuffle")])
def test_a_cast_model_predicts_and_trains(method, head, dtype, batch):
    "`model.half()` and `model.bfloat16()` within the precision of the type."
    cast, exact = build(method, head=head).eval().to(dtype), build(method, head=head).eval()
    exact.load_state_dict({k: v.float() for k, v in cast.state_dict().items()})
    with torch.no_grad(): scores, truth = cast(batch[0]).float(), exact(batch[0])
    assert (scores - truth).norm() < 2 * torch.finfo(dtype).eps * truth.norm()
    cast.train().loss(*batch)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in cast.parameters() if p.grad is not None)


def test_only_the_released_method_halves_odd_grids_by_a_factor(batch):
    "44 x 56 px are 6 x 7 tokens after filling up: one side of the half-size map differs."
    from unittest import mock

    from spectralmoe.head import feature_pyramid
    for method in ("frozen", "spectralmoe", "released"):
        with mock.patch("spectralmoe.segmentor.feature_pyramid", wraps=feature_pyramid) as pyramid: build(method)(batch[0])
        assert pyramid.call_args.kwargs["by_factor"] is (method == "released")


def test_depth_may_read_other_bands_than_red_green_blue(batch, tmp_path):
    "`depth_rgb` of a task: only the depth model sees them; tasks without it save what they saved before."
    from dataclasses import replace
    plain, model = build().eval(), build(benchmark=replace(BENCHMARKS["made_tiles"], depth_rgb=("green", "blue", "nir"))).eval()
    assert "depth_rgb" not in plain.task and model.task["depth_rgb"] == ["green", "blue", "nir"]
    fed = []
    tokens = model.dfm.tokens
    model.dfm.tokens = lambda images: fed.append(images) or tokens(images)
    model(batch[0][..., :40, :48])
    assert torch.equal(fed[0], batch[0][:, [1, 2, 3], :40, :48])
    del model.dfm.tokens
    again = Segmentor.from_pretrained(model.save_pretrained(tmp_path / "model")).eval()
    assert again.depth_rgb == [1, 2, 3] and torch.equal(again(batch[0]), model(batch[0]))


def test_sizes_that_cannot_be_are_refused_by_name():
    for given, words in ((dict(n_experts=-5), "n_experts=-5; expected"), (dict(rnak=2), "Did you mean 'rank'"), (dict(seed=1.5), "seed=1.5"),
                         (dict(head_sizes={**HEAD, "n_points": -5}), "n_points = -5"), (dict(vfm={**VFM, "dim": -4}), "dim=-4; expected"),
                         (dict(head_sizes={**HEAD, "hiden": 64}), "does not take 'hiden'"), (dict(n_tokens=5), "the head's sizes say 8"),
                         (dict(balance_weight=float("nan")), "balance_weight=nan")):
        with pytest.raises(ValueError, match=words): build(**given)


def test_frozen_kernels_of_further_bands_are_compared(tmp_path):
    "They are neither trained nor part of the backbone's hash, so config.json has a hash of their own."
    vfm = dict(VFM, train_extra=False, extra_share=0.1)
    folder = build(vfm=vfm).save_pretrained(tmp_path / "model")
    other = load_vfm(**vfm, in_bands=BENCHMARKS["made_tiles"].input_sensor)
    assert Segmentor.from_pretrained(folder, vfm=other).vfm is other
    other.extra_bands.data.mul_(2)
    with pytest.raises(ValueError, match="kernels of further bands have sha256") as caught: Segmentor.from_pretrained(folder, vfm=other)
    assert len(str(caught.value)) < 400, "it names the weights, not every band"
    cyclic = load_vfm(**{**vfm, "inflate": "cyclic"}, in_bands=BENCHMARKS["made_tiles"].input_sensor)
    with pytest.raises(ValueError, match="loaded without kernels of further bands .cyclic: .* trained with some .inflate='rgb_kept'"):
        Segmentor.from_pretrained(folder, vfm=cyclic)


def test_a_model_of_version_0_1_loads():
    "A folder written by the release, and the scores that its code computed."
    folder = Path(__file__).parent / "fixtures" / "model_0_1"
    images = torch.linspace(-1, 1, 5 * 32 * 48).view(1, 5, 32, 48)
    model = Segmentor.from_pretrained(folder).eval()
    assert read_config(folder, 1) == json.loads(json.dumps(model.configuration()))
    assert model(images).abs().sum().item() == pytest.approx(5908.5967, rel=1e-5)


# ---- export ----

ONE = dict(vfm=dict(VFM, n_layers=1), dfm=dict(DFM, n_layers=1))


@pytest.fixture
def no_trace():
    "Without the trace that torch writes for whoever listens, as pytest does; it takes most of the time."
    import logging
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False


@pytest.mark.parametrize("method, head, sides", [("spectralmoe", "pixel_shuffle", True), ("released", "mask2former", False)])
def test_a_program_for_any_batch(method, head, sides, no_trace):
    "And for any sides in multiples of the patch with `pixel_shuffle`; the library's Mask2Former keeps the sides it was exported with."
    batch, high, wide = torch.export.Dim("batch", min=1, max=16), torch.export.Dim("high", min=4, max=64), torch.export.Dim("wide", min=4, max=64)
    size = dict(vfm="mini_vfm", dfm="mini_dfm", head_sizes={}) if sides else ONE  # positions that are resized to a size, not by a factor
    model, images = build(method, head=head, **size).eval(), torch.randn(2, 5, 40, 48)
    dynamic = {0: batch, 2: 8 * high, 3: 8 * wide} if sides else {0: batch}
    with torch.no_grad(): program = torch.export.export(model, (images,), dynamic_shapes=(dynamic,), strict=False)
    assert model.last_routing == [], "nothing of the tracing stays behind"
    for shape in ((1, 5, 40, 48), (3, 5, *((64, 32) if sides else (40, 48)))):
        images = torch.randn(shape)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
    assert not [node for node in program.graph.nodes if "cdist" in str(node.target)], "ONNX has no cdist"


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo, no_trace, tmp_path):
    "Where onnx and its run time are installed."
    run_time = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, images = build(head="pixel_shuffle", **ONE).eval(), torch.randn(2, 5, 40, 48)
    more = (dict(dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},)) if dynamo else
            dict(opset_version=17, input_names=["images"], dynamic_axes={"images": {0: "batch"}}))
    with torch.no_grad(): torch.onnx.export(model, (images,), str(tmp_path / "model.onnx"), dynamo=dynamo, **more)
    session = run_time.InferenceSession(str(tmp_path / "model.onnx"))
    for n in (1, 3):
        images = torch.randn(n, 5, 40, 48)
        scores = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        torch.testing.assert_close(scores, model(images), rtol=1e-4, atol=1e-4)


def test_the_older_onnx_exporter_is_refused_where_it_would_write_other_scores(tmp_path):
    "Measured: 4 to 8 percent of the largest score, at any batch."
    pytest.importorskip("onnx", reason="onnx is not installed")
    model = build("frozen", **ONE).eval()
    with pytest.raises(NotImplementedError, match="use dynamo=True, or head='pixel_shuffle'"), torch.no_grad():
        torch.onnx.export(model, (torch.randn(1, 5, 40, 48),), str(tmp_path / "model.onnx"), dynamo=False)


def test_rows_of_a_table_stand_in_one_order():
    from spectralmoe.reporting.tables import ROWS
    assert list(ROWS) == [*METHODS, "oracle"]


def test_building_leaves_the_random_numbers_of_the_caller(batch):
    torch.manual_seed(5); before = torch.random.get_rng_state()
    first = build("spectralmoe").adapter.to_query.weight
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(build("spectralmoe").adapter.to_query.weight, first)
