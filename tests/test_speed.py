"What makes things fast stays equal to what is plain, and what is not needed is not loaded. Nothing here is timed."
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from spectralmoe.adapter import ScaledResidual, SpectralMoE, SpectralMoEConfig
from spectralmoe.gating import NoisyTopKGate, TokenProducts, distances_from_products


def exact(f, w): return (f.double()[:, None] - w.double()).norm(dim=-1)


@pytest.mark.parametrize("common", [0, 30, 3000])
@pytest.mark.parametrize("case", ["apart", "prototypes among the tokens", "equal prototypes", "one tight cluster"])
def test_distances_from_products_against_float64(case, common):
    torch.manual_seed(0)
    w, f = torch.randn(6, 96), torch.randn(200, 96)
    if case == "prototypes among the tokens": f[:6] = w
    if case == "equal prototypes": w = torch.zeros(6, 96)
    if case == "one tight cluster": f[20:] = w[3] + 1e-3 * f[20:]
    f, w = f + common, w + common
    o = w.mean(0)
    d = distances_from_products(f, w, *TokenProducts.apply(f, w - o, o))
    torch.testing.assert_close(d.double(), exact(f, w), rtol=2e-5, atol=1e-6)
    if case == "equal prototypes": assert (d == d[:, :1]).all(), "a tie stays a tie"


def test_a_token_that_is_a_prototype_gets_no_gradient_from_it():
    torch.manual_seed(0)
    w = torch.randn(4, 32, requires_grad=True)
    f = w.detach().clone().requires_grad_()
    o = w.detach().mean(0)
    distances_from_products(f, w, *TokenProducts.apply(f, w - o, o)).diagonal().sum().backward()
    assert f.grad.isfinite().all() and f.grad.abs().max() < 1e-5 and w.grad.abs().max() < 1e-5


def test_products_and_residual_have_the_gradients_of_their_definitions():
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    f, rows, origin = draw(7, 5), draw(3, 5), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, r: TokenProducts.apply(f, r, origin), (f, rows))
    plain = lambda f, c, m, w, b, s: f + s * ((f + c @ m) @ w.T + b)
    inputs = draw(7, 5), draw(7, 3), draw(3, 5), draw(5, 5), draw(5), draw(())
    assert torch.autograd.gradcheck(ScaledResidual.apply, inputs)
    torch.testing.assert_close(ScaledResidual.apply(*inputs), plain(*inputs))


@pytest.mark.parametrize("fusion", ["cross_attention", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_forms_agree_with_a_large_common_part(fusion, training):
    "Tokens of foundation models share most of their length."
    torch.manual_seed(0)
    adapter = SpectralMoE(SpectralMoEConfig(64, 1, n_experts=4, rank=3, n_tokens=7, query_dim=8, fusion=fusion)).train(training)
    with torch.no_grad():
        for p in adapter.parameters(): p.normal_(std=0.3)
        for gate in adapter.gates[0].values(): gate.weight.add_(20)
    visual, depth = 20 + torch.randn(2, 20, 64), 20 + torch.randn(2, 20, 64)
    noise = (torch.randn(40, 4), torch.randn(40, 4)) if training else None
    fast, plain = adapter(visual, depth, noise=noise), adapter.reference(visual, depth, noise=noise)
    assert torch.equal(fast.routing["visual"].indices, plain.routing["visual"].indices)
    torch.testing.assert_close(fast.routing["visual"].scores, plain.routing["visual"].scores, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(fast.tokens, plain.tokens, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fast.balance_loss, plain.balance_loss, rtol=1e-4, atol=1e-6)


def test_nothing_of_the_width_of_a_token_is_made_but_the_output():
    "Under no_grad: tensors of T x D that operations allocate, counted."
    from torch.utils._python_dispatch import TorchDispatchMode
    adapter, visual, depth = SpectralMoE(SpectralMoEConfig(64, 1)), torch.randn(2, 40, 64), torch.randn(2, 40, 64)
    class Wide(TorchDispatchMode):
        seen = {}
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.numel() == visual.numel(): self.seen[x.untyped_storage().data_ptr()] = str(function)
            return out
    with torch.no_grad(), Wide() as wide: tokens = adapter(visual, depth).tokens
    given = {visual.untyped_storage().data_ptr(), depth.untyped_storage().data_ptr()}
    assert set(wide.seen) - given == {tokens.untyped_storage().data_ptr()}, wide.seen


@pytest.mark.parametrize("score, p, dtype, near", [("laplace", 2.0, torch.float32, True), ("gaussian", 2.0, torch.float32, False), ("laplace", 1.0, torch.float32, False),
                                                   ("softmax", 2.0, torch.float32, False), ("laplace", 2.0, torch.float64, False), ("laplace", 2.0, torch.bfloat16, False)])
def test_where_one_pass_serves(score, p, dtype, near):
    gate = NoisyTopKGate(16, 4, score=score, p=p).to(dtype)
    assert (gate.near_rows(torch.randn(8, 16, dtype=dtype)) is not None) == near
    with torch.autocast("cpu", torch.bfloat16): assert gate.near_rows(torch.randn(8, 16, dtype=dtype)) is None


def test_half_precision_inference_of_a_whole_model():
    "bfloat16 and half, on a processor: classes of a float32 model with the same rounded weights, but for borders."
    from spectralmoe.segmentor import Segmentor
    torch.manual_seed(0)
    vfm = dict(name="dinov3-vits16", dim=32, n_layers=2, n_heads=4, patch_size=8)
    dfm = dict(name="depth-anything-v2-small", dim=32, n_layers=2, n_heads=4, patch_size=8, image_size=48)
    build = lambda: Segmentor.build("made_tiles", vfm, dfm, "spectralmoe", head="pixel_shuffle", n_experts=3, rank=2, seed=0).eval()
    images = torch.randn(2, 5, 40, 48)
    for dtype in (torch.bfloat16, torch.float16):
        cast, full = build().to(dtype), build()
        full.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in cast.state_dict().items()})
        with torch.no_grad(): half, truth = cast(images.to(dtype)), full(images.to(dtype).float())
        assert half.dtype == dtype and (half.float() - truth).norm() < 16 * torch.finfo(dtype).eps * truth.norm()
        with torch.no_grad(), torch.autocast("cpu", dtype): auto = build()(images)
        with torch.no_grad(): plain = build()(images)
        assert (auto.float() - plain).norm() < 16 * torch.finfo(dtype).eps * plain.norm()


def loaded(code):
    "Modules that a piece of code loads."
    out = subprocess.run([sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True).stdout
    return set(out.split("\n")[-2].split())


def test_the_command_line_loads_no_torch_before_it_computes():
    assert not loaded("import spectralmoe.cli") & {"torch", "pandas", "numpy", "lightning", "papermill"}


def test_the_adapter_loads_torch_and_its_own_pages():
    own = {m for m in loaded("import spectralmoe.adapter") - loaded("import torch") if not m.startswith(("spectralmoe", "torch"))}
    assert not {m.split(".")[0] for m in own} & {"numpy", "scipy", "transformers", "fastcore", "pandas", "PIL"}


def test_no_header_is_opened_where_an_index_knows_the_sizes(tmp_path):
    from spectralmoe import datasets
    from spectralmoe.benchmarks import benchmark
    from spectralmoe.reading.manifest import write_index, write_manifest
    rows = []
    for i in range(40):
        for kind in ("images", "masks"):
            (tmp_path / "a" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / kind / f"{i:02d}.tif").touch()  # empty: opening it would raise
        rows.append(dict(image=f"{i:02d}.tif", height=512, width=600, sha256_image="0", sha256_mask="0", scene=f"s{i % 4}", group=""))
    write_manifest(tmp_path, "t", {"a": dict(index=write_index(tmp_path / "a", rows), tiles=40, labels={})})
    task = benchmark("fbp_cross_sensor")
    domain = replace(task.source, images=tmp_path / "a" / "images", masks=tmp_path / "a" / "masks", names=tmp_path / "a" / "index.csv")
    tiles = datasets.SegmentationTiles.from_domain(domain, task)
    assert len(tiles) == 40 and len(tiles.windows(512)) == 80
