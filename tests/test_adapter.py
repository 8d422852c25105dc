"The low-rank form against the plain one, and the released reading against numbers of the released code."
import json
from itertools import product

import pytest
import torch
from torch import nn

from spectralmoe.adapter import SpectralMoE, SpectralMoEConfig
from spectralmoe.checkpoints import convert_released_adapter
from spectralmoe.experts import COMBINE, PERCEPTUAL
from spectralmoe.fusion import EQUAL_GRIDS, FUSIONS
from spectralmoe.gating import SCORES, WEIGHTINGS

B, N, D, E = 2, 20, 32, 4


def trained(seed=0, **switches):
    "An adapter whose every parameter is far from its start."
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed notes where it was called, thousands of times here
    adapter = SpectralMoE(SpectralMoEConfig(D, 2, **{**dict(n_experts=E, rank=3, n_tokens=7, query_dim=8), **switches}))
    with torch.no_grad():
        for name, p in adapter.named_parameters(): p.normal_(std={"scale": 1}.get(name, 0.3)) if p.ndim else p.fill_(0.3)
    return adapter


def both(adapter, dtype, n_depth=N, layer=1):
    "Tokens, balance loss and all gradients of the two forms under the same noise."
    torch.default_generator.manual_seed(1)
    adapter = adapter.to(dtype)
    visual, depth = torch.randn(B, N, D).to(dtype), torch.randn(B, n_depth, D).to(dtype)
    noise = torch.randn(B * N, E).to(dtype), torch.randn(B * n_depth, E).to(dtype)
    weight = torch.randn(B, N, D).to(dtype)
    results = []
    for form in (adapter, adapter.reference):
        adapter.zero_grad()
        v = visual.clone().requires_grad_()
        out = form(v, depth, layer=layer, noise=noise, grid=(4, 5))
        ((out.tokens * weight).sum() + out.balance_loss + adapter.queries().square().sum()).backward()
        grads = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
        results.append({"tokens": out.tokens.detach(), "balance": out.balance_loss.detach(), "visual": v.grad, **grads})
    return results


def gaps(a, b):
    "Difference of each quantity, relative to its size."
    assert a.keys() == b.keys()
    return {k: ((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-6)).item() for k in b}


def worst_gap(a, b): return max(gaps(a, b).values())


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_forms_agree_for_every_combination_of_switches(fusion, dtype, tolerance):
    "Score and norm, weighting, perceptual map, combination, k, gates: values and gradients."
    gates = [(s, p) for s in SCORES for p in ((1.0, 2.0) if s == "laplace" else (2.0,))]
    seen = 0
    for (score, p), w, q, c, k, dual in product(gates, WEIGHTINGS, PERCEPTUAL, COMBINE, (1, 2, E), (True, False)):
        switches = dict(fusion=fusion, gating=score, p=p, gate_weighting=w, perceptual=q, combine=c, top_k=k, dual_gating=dual)
        fast, plain = both(trained(**switches), dtype)
        far = {name: gap for name, gap in gaps(fast, plain).items() if gap >= tolerance}
        if far and dtype == torch.float32:  # a gradient whose terms cancel: is the plain form itself that exact?
            exact = {name: value.float() for name, value in both(trained(**switches), torch.float64)[1].items()}
            rounding = gaps(plain, exact)
            far = {name: gap for name, gap in far.items() if gap > rounding[name]}
        assert not far, (far, switches)
        seen += 1
    assert seen == 4 * 3 * 2 * 2 * 3 * 2


@pytest.mark.parametrize("balance", ["importance_load", "importance"])
def test_forms_agree_on_either_balance(balance):
    assert worst_gap(*both(trained(balance=balance, top_k=2), torch.float64)) < 1e-10


def test_cross_attention_takes_any_number_of_depth_tokens():
    for n_depth in (1, 7, 45):
        assert worst_gap(*both(trained(), torch.float64, n_depth)) < 1e-10
    for fusion in EQUAL_GRIDS:
        with pytest.raises(ValueError, match="20 visual and 7 depth tokens"):
            both(trained(fusion=fusion), torch.float64, 7)


def test_an_expert_without_tokens_gets_zero_gradients():
    adapter = trained().eval()
    for gate in adapter.gates[0].values(): gate.weight.data[2] = 1e4
    out = adapter(torch.randn(B, N, D), torch.randn(B, N, D))
    out.tokens.sum().backward()
    assert out.routing["visual"].load[2] == 0 and out.routing["depth"].load[2] == 0
    assert (adapter.experts[0].A.grad[2] == 0).all() and (adapter.experts[0].A.grad[0] != 0).any()


def test_permuting_experts_changes_nothing():
    adapter, other = trained(top_k=2).eval(), trained(top_k=2).eval()
    order = torch.randperm(E)
    for layer in range(2):
        for p in ("A", "B"): getattr(other.experts[layer], p).data = getattr(adapter.experts[layer], p).data[order]
        for m in ("visual", "depth"): other.gates[layer][m].weight.data = adapter.gates[layer][m].weight.data[order]
    visual, depth = torch.randn(B, N, D), torch.randn(B, N, D)
    assert torch.allclose(adapter(visual, depth).tokens, other(visual, depth).tokens, atol=1e-5)
    assert torch.allclose(adapter.queries(), other.queries(), atol=1e-5)


def test_bfloat16_autocast_keeps_the_stream_and_the_routing():
    adapter, visual, depth = trained(), torch.randn(B, N, D), torch.randn(B, N, D)
    noise = torch.randn(B * N, E), torch.randn(B * N, E)
    full = adapter(visual, depth, noise=noise)
    with torch.autocast("cpu", torch.bfloat16): half = adapter(visual, depth, noise=noise)
    assert half.tokens.dtype == torch.float32 and half.balance_loss.dtype == torch.float32
    assert (half.tokens - full.tokens).norm() < 0.02 * full.tokens.norm()
    half.tokens.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters() if p.grad is not None)


RELEASED_K2 = dict(fusion="diagonal", perceptual="channel_sums", combine="logsumexp", gate_weighting="none", top_k=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("switches", [{}, dict(top_k=2, gating="softmax"), dict(p=1.0, fusion="structure_guided"), RELEASED_K2])
def test_a_cast_adapter_computes_within_its_precision(switches, dtype):
    "`half()` and `bfloat16()`: the choice of experts as in float32, values within the type, finite gradients."
    cast, exact = trained(**switches).eval().to(dtype), trained(**switches).eval()
    exact.load_state_dict({k: v.float() for k, v in cast.state_dict().items()})
    visual, depth = torch.randn(B, N, D).to(dtype), torch.randn(B, N, D).to(dtype)
    truth = exact(visual.float(), depth.float())
    for form in (cast, cast.reference):
        out = form(visual, depth)
        assert torch.equal(out.routing["visual"].indices, truth.routing["visual"].indices)
        assert (out.tokens - truth.tokens).norm() < 8 * torch.finfo(dtype).eps * truth.tokens.norm()
    cast.train()(visual, depth).tokens.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in cast.parameters() if p.grad is not None)


@pytest.mark.parametrize("switches", [{}, RELEASED_K2])
def test_the_plain_form_runs_under_autocast(switches):
    adapter, visual, depth = trained(**switches).eval(), torch.randn(B, N, D), torch.randn(B, N, D)
    full = adapter.reference(visual, depth)
    with torch.autocast("cpu", torch.bfloat16): half = adapter.reference(visual, depth)
    assert half.tokens.dtype == torch.float32 and (half.tokens - full.tokens).norm() < 0.02 * full.tokens.norm()


def test_an_expert_whose_gate_is_zero_is_left_out_as_released():
    "Two experts chosen, one gate value underflowed: the released code dispatches the token to the other one alone."
    adapter = trained(**{**RELEASED_K2, "n_experts": 2}).eval()
    for gate in adapter.gates[0].values():
        gate.weight.data[0], gate.weight.data[1] = 0.0, 1e3
    visual, depth = torch.randn(B, N, D), torch.randn(B, N, D)
    alone = trained(**{**RELEASED_K2, "n_experts": 2, "top_k": 1}).eval()
    alone.load_state_dict(adapter.state_dict())
    for form in ("forward", "reference"):
        two, one = (getattr(a, form)(visual, depth) for a in (adapter, alone))
        torch.testing.assert_close(two.tokens, one.tokens)
        assert two.routing["visual"].load.tolist() == one.routing["visual"].load.tolist() == [B * N, 0]
        assert (two.routing["visual"].indices.sort().values == torch.tensor([0, 1])).all(), "both are named, one has weight 0"
    kept = trained(**{**RELEASED_K2, "n_experts": 2, "gate_weighting": "topk"}).eval()
    kept.load_state_dict(adapter.state_dict())
    assert kept(visual, depth).routing["visual"].load.tolist() == [B * N, B * N], "the paper's reading counts what was chosen"


@pytest.mark.parametrize("switches", [{}, RELEASED_K2])
def test_compiles_as_one_graph(switches):
    "No graph break, same values and gradients; the backend that needs no C++ compiler."
    adapter = trained(**switches)
    compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)
    noise = torch.randn(B * N, E), torch.randn(B * N, E)
    visual, depth = torch.randn(B, N, D), torch.randn(B, N, D)
    results = []
    for form in (adapter, compiled):
        adapter.zero_grad()
        out = form(visual, depth, layer=0, noise=noise)
        (out.tokens.square().sum() + out.balance_loss).backward()
        results.append([out.tokens.detach(), *[p.grad.clone() for p in adapter.parameters() if p.grad is not None]])
    for a, b in zip(*results): assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_draws_the_same_noise():
    from torch.utils.checkpoint import checkpoint
    adapter, visual, depth = trained(), torch.randn(B, N, D, requires_grad=True), torch.randn(B, N, D)
    results = []
    for run in (lambda: adapter(visual, depth), lambda: checkpoint(adapter, visual, depth, use_reentrant=False)):
        adapter.zero_grad(); torch.manual_seed(5)
        out = run()
        (out.tokens.square().sum() + out.balance_loss).backward()
        results.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    for a, b in zip(*results): assert torch.equal(a, b)


# ---- the released code ----

def released(folder, k, gating):
    "Our adapter with the released weights, and the inputs both were given."
    from safetensors.torch import load_file
    adapter = SpectralMoE(SpectralMoEConfig.released(64, 2, n_experts=4, n_tokens=10, rank=4, query_dim=32, top_k=k, gating=gating))
    adapter.load_state_dict(convert_released_adapter(load_file(folder / "weights.safetensors")), strict=True)
    return adapter, load_file(folder / "inputs.safetensors")


@pytest.mark.parametrize("name, k, gating", [("laplace_k1_eval", 1, "laplace"), ("softmax_k2_train", 2, "softmax")])
@pytest.mark.parametrize("form", ["forward", "reference"])
def test_released_reading_equals_the_released_code(released_parity, name, k, gating, form):
    from safetensors.torch import load_file
    adapter, given = released(released_parity, k, gating)
    truth = load_file(released_parity / f"{name}.safetensors")
    train = name.endswith("train")
    adapter.train(train)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    task = 0
    for layer in range(2):
        noise = (truth[f"L{layer}.msi_noise"], truth[f"L{layer}.depth_noise"]) if train else None
        out = getattr(adapter, form)(given["msi"], given["depth"], layer=layer, noise=noise)
        delta = (out.tokens - given["msi"]) / adapter.scale
        close(delta, truth[f"L{layer}.delta_f"])
        loss = truth[f"L{layer}.loss"]
        assert abs(out.balance_loss - loss) <= 1e-5 * loss.abs().clamp_min(1)
        for ours, theirs in (("visual", "msi"), ("depth", "depth")):
            r = out.routing[ours]
            close(r.load, truth[f"L{layer}.{theirs}_load"].float())
            gates = truth[f"L{layer}.{theirs}_gates"]
            assert torch.equal((gates > 0).nonzero()[:, 1].view(-1, k), r.indices.sort(-1).values)
            close(r.importance, gates.sum(0))
        if layer == 0: task = (delta * given["R"]).sum()
    close(adapter.queries(), truth["queries"])
    task.backward()
    for e in range(4): close(adapter.experts[0].B.grad[e], truth[f"grad_task.param.experts_b.0.{e}"])


def test_released_checkpoint_names_are_all_understood(released_parity):
    keys = json.loads((released_parity / "checkpoint_keys_gid.json").read_text(encoding="utf-8"))
    state = {k: torch.empty(shape, device="meta") for k, shape in keys.items()}
    with torch.device("meta"): adapter = SpectralMoE(SpectralMoEConfig.released(1024, 24))
    converted = convert_released_adapter(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in adapter.state_dict().items()}
    assert sum(v.numel() for v in converted.values()) == 5_737_985


def test_weight_decay_follows_the_released_groups(released_parity):
    groups = json.loads((released_parity / "optimizer_groups_gid.json").read_text(encoding="utf-8"))
    prefix = "backbone.depthmoe."
    decay = {k.removeprefix(prefix): wd for k, (_, wd) in groups.items() if k.startswith(prefix)}
    with torch.device("meta"): adapter = SpectralMoE(SpectralMoEConfig.released(1024, 24))
    ours = {id(p): g["weight_decay"] for g in adapter.parameter_groups(0.05) for p in g["params"]}
    counted = lambda wd: sum(p.numel() for p in adapter.parameters() if ours[id(p)] == wd)
    released_plain = sum(torch.Size(s).numel() for k, s in json.loads(
        (released_parity / "checkpoint_keys_gid.json").read_text(encoding="utf-8")).items()
        if decay.get(k.removeprefix(prefix), None) == 0.0 and k.startswith(prefix))
    assert counted(0.0) == released_plain and counted(0.05) == 5_737_985 - released_plain
