"Several devices: a run spread over two processes is the run of one."
import csv
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from spectralmoe.datasets import DomainDataModule
from spectralmoe.segmentor import Segmentor
from spectralmoe.simulator.tiles import build_tiles
from spectralmoe.training import FrozenShards, fit
from spectralmoe.transforms import BandJitter, Compose, FlipRotate

STEPS = 4
RUN = dict(lr=3e-3, log_every=2, checkpoint_every=2, progress=None, accelerator="cpu")
TWO = dict(devices=2, strategy="ddp_fork")
TINY = dict(dim=16, n_layers=2, n_heads=2, patch_size=8)
SMALL = dict(n_queries=6, hidden=64, encoder_layers=1, decoder_layers=2, n_heads=4, encoder_width=64, decoder_width=64, n_points=64, scales=[2, 1, 0.5, 0.25])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(head="pixel_shuffle", collapsed=False, **overrides):
    sizes = SMALL if head == "mask2former" else {}
    tokens = {} if sizes else dict(n_tokens=6)
    made = Segmentor.build("made_tiles", dict(name="dinov3-vits16", **TINY), dict(name="depth-anything-v2-small", image_size=32, **TINY),
                           head=head, head_sizes=sizes, n_experts=3, rank=2, **tokens, **overrides)
    if collapsed:  # every token at expert 0, on every device
        made.initialise = lambda images: None
        with torch.no_grad():
            for gate in made.adapter.gates[1].values(): gate.weight[1:] = 1e3
    return made


def data(micro=None, **changes):
    return DomainDataModule(build_tiles("made_tiles"), batch_size=4, micro_batch=micro, crop=32, augment=Compose(FlipRotate(), BandJitter()), **changes)


def trained(folder, micro=None, steps=STEPS, head="pixel_shuffle", collapsed=False, overrides={}, **changes):
    m = model(head, collapsed, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return m, fit(m, data(micro), steps, folder, **RUN | changes)


def close(a, b, rtol=1e-4, atol=1e-4):
    "Up to rounding: a step of AdamW changes a weight by up to 3e-3, whatever the size of its gradient."
    a, b = a.trained_state_dict(), b.trained_state_dict()
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("k_proj.bias"): continue  # softmax does not see it: its gradient is rounding, which AdamW makes a full step
        if name.endswith("cross_attn.in_proj_bias"): a[name], b[name] = (torch.cat(torch.chunk(s[name], 3)[::2]) for s in (a, b))  # nor the middle third
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


CASES = {"accumulated": dict(micro=2, overrides=dict(class_weights=[1.0, 2.0, 3.0, 4.0, 5.0])), "collapsed": dict(collapsed=True), "mask2former": dict(head="mask2former"),
         "two-experts": dict(overrides=dict(top_k=2, gate_weighting="full", balance="importance", balance_weight=1.0))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_two_processes_train_the_weights_of_one(tmp_path, case):
    alone, one = trained(tmp_path / "one", **case)
    together, two = trained(tmp_path / "two", **case, **TWO)
    close(together, alone)
    start = model(case.get("head", "pixel_shuffle"), case.get("collapsed", False), **case.get("overrides", {})).trained_state_dict()
    assert not all(torch.equal(value, start[name]) for name, value in alone.trained_state_dict().items()), "something was trained"
    for ours, theirs in zip(two.history["train"], one.history["train"], strict=True):
        for part in ("loss", "balance", "lr"): assert ours[part] == pytest.approx(theirs[part], rel=1e-4), part
        exact = ours["step"] == RUN["log_every"] # later a rounding may exchange one of the points that a Mask2Former takes
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4 if exact else 5e-3)
    assert two.history["load"] == one.history["load"], "tokens are counted over both"
    assert two.last["miou"] == pytest.approx(one.last["miou"], abs=1e-3) and two.last["step"] == STEPS
    if case.get("collapsed"): assert all(entry["depth"][1] == [1.0, 0.0, 0.0] for entry in two.history["load"])
    assert (tmp_path / "one/fit.json").read_text() == (tmp_path / "two/fit.json").read_text(), "the number of devices is no setting of a run"


def test_a_frozen_backbone_that_is_cut_apart_is_the_same_backbone(tmp_path):
    case = dict(collapsed=True, steps=2)
    close(trained(tmp_path / "two", **case, devices=2, strategy=FrozenShards("fork"))[0], trained(tmp_path / "one", **case)[0])


def test_spawned_processes_log_and_another_number_of_devices_goes_on(tmp_path):
    "The default way of starting processes; a logger of Lightning; one device finishes what two began."
    def pixels(folder, **changes):
        made = Segmentor.build("made_tiles", None, None, "raw_conv", class_weights=[1.0, 2.0, 3.0, 4.0, 5.0])
        return made, fit(made, data(), 4, folder, **RUN | changes)
    alone, _ = pixels(tmp_path / "one")
    together, two = pixels(tmp_path / "two", devices=2, logger=CSVLogger(tmp_path / "logged"))
    close(together, alone)
    entries = list(csv.DictReader(open(next((tmp_path / "logged").rglob("metrics.csv")))))
    assert [float(e["loss"]) for e in entries if e["loss"]] == pytest.approx([e["loss"] for e in two.history["train"]])
    assert [float(e["source_miou"]) for e in entries if e["source_miou"]] == pytest.approx([two.last["miou"]])
    (tmp_path / "two/step-00000004.ckpt").unlink()
    again, result = pixels(tmp_path / "two")
    close(again, alone)
    assert result.last["step"] == 4 and json.loads((tmp_path / "two/history.json").read_text()) == result.history


def test_workers_change_nothing(tmp_path):
    runs = []
    for workers in (0, 2):
        m = Segmentor.build("made_tiles", None, None, "raw_conv")
        result = fit(m, data(num_workers=workers), 3, tmp_path / str(workers), **RUN)
        runs.append((m.trained_state_dict(), [e["loss"] for e in result.history["train"]], result.last["miou"]))
    (a, *numbers), (b, *others) = runs
    assert numbers == others and all(torch.equal(a[name], b[name]) for name in a)


def test_the_images_of_a_step_do_not_depend_on_the_number_of_devices():
    whole, parts = data(micro=4), [data(micro=4) for _ in range(2)]
    whole.trainer = SimpleNamespace(global_step=1, max_steps=4)
    for rank, part in enumerate(parts): part.trainer, part._check = SimpleNamespace(global_step=1, max_steps=4, global_rank=rank, world_size=2), whole.check()
    for batch, *halves in zip(whole.train_dataloader(), *(p.train_dataloader() for p in parts), strict=True):
        for key in ("image", "label"): assert torch.equal(batch[key], torch.cat([h[key] for h in halves]))


def test_devices_that_cannot_share_are_refused_before_anything_starts(tmp_path):
    m = Segmentor.build("made_tiles", None, None, "raw_conv")
    for changes, message in ((dict(devices=3), "a micro-batch of 4 images cannot be shared by 3 devices"), (dict(devices=0), "devices=0"),
                             (dict(devices=[0, 0]), "expected every device once"), (dict(num_nodes=0), "num_nodes=0")):
        with pytest.raises(ValueError, match=message): fit(m, data(), 2, tmp_path / "never", **RUN | changes)
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="strategy='fsdp2'"): fit(m, data(), 2, tmp_path / "made", **RUN, devices=2, strategy="fsdp2")


def test_a_run_is_the_same_run_on_any_number_of_devices_and_workers(tmp_path):
    import spectralmoe.runs as runs
    folder = tmp_path / "runs"
    made = runs.run_method("made_tiles", "raw_conv", 0, "smoke", folder, progress=None, num_workers=1, logger=CSVLogger(tmp_path / "logged"))
    assert made.id == runs.planned("made_tiles", "raw_conv", 0, "smoke").id and list((tmp_path / "logged").rglob("metrics.csv"))
    assert runs.run_method("made_tiles", "raw_conv", 0, "smoke", folder, progress=None, devices=2).started == made.started
    cells = runs.grid_cells(["made_tiles"], ["raw_conv"], [1], profile="smoke", num_workers=1)
    assert [r.status for r in runs.run_grid(cells, folder, processes=2)] == ["done"], "a process of a grid can have workers of its own"
