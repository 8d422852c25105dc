"Every way of tuning: trains, saves, loads, predicts the same, goes on after a crash, leaves the backbone alone, and costs what is published."
import subprocess
import sys

import pytest
import torch

from spectralmoe.baselines import METHODS, list_methods, trained_parameters
from spectralmoe.datasets import DomainDataModule
from spectralmoe.segmentor import Segmentor
from spectralmoe.simulator.tiles import build_tiles
from spectralmoe.training import fit

TINY = dict(dim=16, n_layers=4, n_heads=2, patch_size=8)
VFM, DFM = dict(name="dinov3-vits16", **TINY), dict(name="depth-anything-v2-small", image_size=48, **TINY)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, n_heads=4, encoder_width=32, decoder_width=32, n_points=64)
SMALL = dict(n_experts=2, rank=2, bottleneck=4, n_prompts=3)  # of those that have them
TUNED = ["linear_probe", "lora", "vpt", "adaptformer", "rein", "depthforge", "fada", "fada_released", "set", "set_released", "earth_adapter", "land_moe"]


def build(method, head="mask2former", **kwargs):
    m = METHODS[method]
    sizes = HEAD if head == "mask2former" and not m.head else {}
    return Segmentor.build("made_tiles", VFM, DFM, method, head, sizes, **{**m.of_profile({k: v for k, v in SMALL.items() if k in m.takes()}), **kwargs})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 5, 48, 60), torch.randint(5, (2, 6, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)[..., :60]


def test_all_are_here():
    assert set(TUNED) <= set(METHODS) and {"frozen", "full", "spectralmoe"} <= set(METHODS)


@pytest.mark.parametrize("method", ["frozen", "full", *TUNED])
def test_trains_saves_loads_predicts_and_leaves_the_backbone_alone(method, batch, tmp_path):
    model = build(method)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trained = set(model.trained_state_dict())
    optimiser, losses = torch.optim.AdamW(model.parameter_groups(0.05), lr=3e-3), []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model.loss(*batch)["loss"]
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == trained, moved ^ trained
    if method != "full": assert not any(k.startswith(("vfm.model", "dfm")) for k in trained)
    again = Segmentor.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert type(again.adapter) is type(model.adapter)
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))


@pytest.mark.parametrize("method", TUNED)
def test_a_killed_run_ends_with_the_same_weights(method, tmp_path):
    tiles, head = build_tiles("made_tiles"), "pixel_shuffle"
    def train(model, folder):
        data = DomainDataModule(tiles, batch_size=2, crop=32)
        return fit(model, data, 2, folder, lr=3e-3, log_every=1, checkpoint_every=1, validate_every=0, progress=None, accelerator="cpu")
    whole, dying = build(method, head), build(method, head)
    train(whole, tmp_path / "whole")
    loss, passed = dying.loss, []
    def failing(*args):
        if len(passed) == 1: raise OSError("power failure")
        passed.append(None)
        return loss(*args)
    dying.loss = failing
    with pytest.raises(OSError, match="power failure"): train(dying, tmp_path / "cut")
    after = build(method, head)
    train(after, tmp_path / "cut")
    a, b = whole.trained_state_dict(), after.trained_state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_fresh_process_needs_nothing_but_the_segmentor(batch, tmp_path):
    "What a method was saved with is found through `Segmentor.from_pretrained` alone."
    folder = build("rein").save_pretrained(tmp_path / "model")
    code = f"from spectralmoe.segmentor import Segmentor; print(type(Segmentor.from_pretrained({str(folder)!r}).adapter).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "Rein"


PUBLISHED = {"linear_probe": 0, "frozen": 0, "vpt": 3_686_400, "adaptformer": 3_171_840, "rein": 2_990_081, "fada_released": 2_045_441,
             "set": 7_546_881, "set_released": 7_546_881, "depthforge": 2_990_081 + 4_336_705, "lora": 3_145_728, "spectralmoe": 5_737_985}


@pytest.mark.parametrize("method", PUBLISHED)
def test_parameters_at_vit_l(method):
    assert trained_parameters(method) == PUBLISHED[method]


def test_variants_at_vit_l():
    assert trained_parameters("rein", full_tokens=True) == 5_016_065
    assert trained_parameters("rein", content=True) == 2_990_081 + 65_792
    assert round(trained_parameters("full") / 1e6, 2) == 303.13
    assert trained_parameters("lora", rank=4) == 786_432
    assert list(list_methods().index) == list(METHODS)


@pytest.mark.parametrize("method", ["rein", "depthforge", "fada", "set", "land_moe"])
def test_tokens_reach_the_queries_and_may_be_their_content(method, batch):
    plain, linked = build(method), build(method, content=True)
    assert torch.equal(plain.head.classifier.weight, linked.head.classifier.weight), "heads start alike"
    assert not hasattr(linked.head.transformer, "queries_features")
    linked.loss(*batch)["loss"].backward()
    for name, p in linked.named_parameters(): assert (p.grad is not None) == p.requires_grad, name
    assert linked.adapter.to_content.weight.grad.abs().max() > 0


def test_a_shared_backbone_is_not_changed_by_lora(batch):
    "Two methods on one backbone object: it is neither copied nor changed."
    from spectralmoe.backbones import load_vfm
    from spectralmoe.benchmarks import BENCHMARKS
    vfm = load_vfm(**VFM, in_bands=BENCHMARKS["made_tiles"].input_sensor, train_extra=False)
    frozen = Segmentor.build("made_tiles", vfm, None, "frozen", "pixel_shuffle")
    before = frozen.eval()(batch[0])
    lora = Segmentor.build("made_tiles", vfm, None, "lora", "pixel_shuffle", rank=2)
    with torch.no_grad():
        for name, p in lora.adapter.named_parameters(): p.add_(1)
    assert lora.vfm is frozen.vfm and not torch.equal(lora.eval()(batch[0]), before)
    assert torch.equal(frozen(batch[0]), before)


def test_sizes_that_a_method_does_not_have_are_refused():
    with pytest.raises(ValueError, match="method 'lora' does not take 'n_tokens'"): build("lora", n_tokens=4)
    with pytest.raises(ValueError, match="method 'linear_probe' has no adapter"): build("linear_probe", rank=4)
    with pytest.raises(ValueError, match="rank=-1; expected a whole number"): build("rein", rank=-1)
    with pytest.raises(ValueError, match="n_tokens=4 but the head's sizes say 8"): build("rein", n_tokens=4)


def test_checkpointing_computes_the_same_gradients(batch):
    for method in ("lora", "vpt", "adaptformer", "land_moe"):
        found = []
        for again in (False, True):
            model = build(method, "pixel_shuffle", **({"dropout": 0.0} if method == "adaptformer" else {}))
            model.checkpointing = again
            torch.manual_seed(0)
            model.loss(*batch)["loss"].backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        for name, grad in found[0].items(): torch.testing.assert_close(grad, found[1][name], msg=f"{method} {name}")
