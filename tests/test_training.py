"""Training: what a run promises when it is killed, resumed, misused, or when it goes wrong."""
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spectralmoe.datasets import DomainDataModule
from spectralmoe.segmentor import Segmentor
from spectralmoe.simulator.tiles import build_tiles
from spectralmoe.evaluation import confusion_matrix, iou_per_class
from spectralmoe.training import (
    AtomicCheckpoints, fit, newest_checkpoint)

STEPS = 12
RUN = dict(lr=3e-3, log_every=4, checkpoint_every=5, validate_every=6, progress=None, accelerator="cpu")


def tiny_model(**overrides):
    tiny = dict(dim=16, n_layers=4, n_heads=2, patch_size=8)
    return Segmentor.build(
        "made_tiles", dict(name="dinov3-vits16", **tiny),
        dict(name="depth-anything-v2-small", image_size=64, **tiny),
        head="pixel_shuffle", n_experts=3, rank=2, n_tokens=6, **overrides)


def tiny_data():
    return DomainDataModule(build_tiles("made_tiles"), batch_size=4, micro_batch=2, crop=32)


def train(model, folder, steps=STEPS, **changes):
    return fit(model, tiny_data(), steps, folder, **RUN | changes)


def dying(model, after, how):
    "A model that calls `how` in its forward pass number `after` (two per optimiser step)."
    loss, passed = model.loss, []

    def wrapped(images, labels):
        if len(passed) == after: how()
        passed.append(None)
        return loss(images, labels)
    model.loss = wrapped
    return model


def power_failure():
    raise OSError("power failure")


def same(a, b):
    a, b = a.trained_state_dict(), b.trained_state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Sums in one order, here and in child processes."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that was never interrupted."
    model, folder = tiny_model(), tmp_path_factory.mktemp("whole")
    return SimpleNamespace(model=model, result=train(model, folder), folder=folder)


# forward passes: 0 is the very first, 7 within an accumulation, 10 right after the checkpoint of
# step 5, 12 right after a validation without a checkpoint, 23 the last one
@pytest.mark.parametrize("after", [0, 7, 10, 12, 23])
def test_interrupted_run_ends_with_the_same_weights(whole, tmp_path, after):
    with pytest.raises(OSError, match="power failure"):
        train(dying(tiny_model(), after, power_failure), tmp_path)
    again = tiny_model()
    result = train(again, tmp_path)
    assert same(again, whole.model)
    assert result.history["load"] == whole.result.history["load"]
    assert result.history["validation"] == whole.result.history["validation"]
    for ours, theirs in zip(result.history["train"], whole.result.history["train"], strict=True):
        assert ours["loss"] == theirs["loss"]


def test_model_left_over_from_a_crash_starts_from_the_same_weights(whole, tmp_path):
    model = tiny_model()
    loss = model.loss
    with pytest.raises(OSError, match="power failure"):
        train(dying(model, 6, power_failure), tmp_path)  # before the first checkpoint after step 0
    model.loss = loss
    train(model, tmp_path)
    assert same(model, whole.model)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_process_ends_with_the_same_weights(whole, tmp_path):
    script = ("import os, signal, sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
              "from test_training import dying, tiny_model, train\n"
              "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
              "train(dying(tiny_model(), 15, kill), sys.argv[2])\n")
    here = os.path.dirname(__file__)
    died = subprocess.run([sys.executable, "-c", script, here, str(tmp_path)], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert newest_checkpoint(tmp_path).name == "step-00000005.ckpt"
    again = tiny_model()
    train(again, tmp_path)
    assert same(again, whole.model)


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(whole, tmp_path):
    with pytest.raises(OSError, match="power failure"):
        train(dying(tiny_model(), 21, power_failure), tmp_path)  # step 10 of 12
    newest = newest_checkpoint(tmp_path)
    assert newest.name == "step-00000010.ckpt"
    newest.write_bytes(newest.read_bytes()[:-500])
    again = tiny_model()
    with pytest.warns(UserWarning, match="step-00000010.ckpt .* is damaged"):
        train(again, tmp_path)
    assert same(again, whole.model)


def test_one_flipped_byte_is_damage(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpoints().save_checkpoint({"w": torch.zeros(10_000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path)


def test_finished_run_returns_without_training(whole):
    again = tiny_model()
    result = train(dying(again, 0, power_failure), whole.folder)
    assert same(again, whole.model)
    assert result.to_dict() == whole.result.to_dict()
    json.dumps(result.to_dict())


def test_folder_of_another_run_is_refused_and_untouched(whole):
    before = {p.name: p.read_bytes() for p in whole.folder.iterdir()}
    for change, message in (({"lr": 1e-3}, "lr is 0.003 there and 0.001 here"),
                            ({"seed": 5}, "seed is 0 there and 5 here"),
                            ({"steps": 13}, "steps is 12 there and 13 here")):
        with pytest.raises(ValueError, match=message):
            train(tiny_model(), whole.folder, **change)
    with pytest.raises(ValueError, match="trained is"):  # another model
        train(Segmentor.build("made_tiles", None, None, "raw_conv"), whole.folder)
    assert {p.name: p.read_bytes() for p in whole.folder.iterdir()} == before


def test_folder_holds_two_checkpoints_of_what_is_trained(whole):
    names = sorted(p.name for p in whole.folder.glob("[!.]*"))
    assert names == ["best.ckpt", "fit.json", "history.json", "step-00000010.ckpt", "step-00000012.ckpt"]
    saved = AtomicCheckpoints().load_checkpoint(whole.folder / "step-00000012.ckpt")
    assert saved["state_dict"].keys() == whole.model.trained_state_dict().keys()
    assert not any(name.startswith(("vfm.model", "dfm")) for name in saved["state_dict"])
    history = json.loads((whole.folder / "history.json").read_text(encoding="utf-8"))
    assert history == whole.result.history


def test_another_seed_gives_other_weights(whole, tmp_path):
    model = tiny_model()
    train(model, tmp_path, seed=1)  # same batches, other noise
    assert not same(model, whole.model)


def test_learning_rate_is_polynomial(tmp_path):
    result = train(tiny_model(), tmp_path, log_every=1)
    rates = [entry["lr"] for entry in result.history["train"]]
    assert rates == pytest.approx([3e-3 * (1 - t / STEPS) ** 0.9 for t in range(STEPS)], rel=1e-12)


class Pixelwise(nn.Module):
    "A linear classifier of pixels, without noise: what is left is the arithmetic of a step."
    last_routing = ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Conv2d(5, 5, 1)

    def loss(self, images, labels):
        losses = nn.functional.cross_entropy(self.linear(images), labels, ignore_index=255, reduction="none")
        return {"loss": losses.mean()}

    def predict(self, images): return self.linear(images).argmax(1)
    def initialise(self, images): pass
    def parameter_groups(self, weight_decay): return [{"params": self.parameters(), "weight_decay": weight_decay}]
    def trained_state_dict(self): return self.state_dict()
    def load_trained(self, state): self.load_state_dict(state)


def test_accumulation_keeps_the_global_batch(tmp_path):
    runs = []
    for micro in (None, 2, 1):
        model = Pixelwise()
        data = DomainDataModule(build_tiles("made_tiles"), batch_size=4, micro_batch=micro, crop=32)
        result = fit(model, data, 6, tmp_path / str(micro), **RUN | {"log_every": 1})
        runs.append((model, result, [entry["loss"] for entry in result.history["train"]]))
    for model, result, losses in runs[1:]:
        assert losses == pytest.approx(runs[0][2], rel=1e-5)
        torch.testing.assert_close(model.linear.weight, runs[0][0].linear.weight)
        assert result.last["step"] == 6
        assert not torch.equal(model.linear.weight, Pixelwise().linear.weight)


def test_non_finite_loss_stops_before_the_step(tmp_path):
    model = tiny_model()
    loss, passed = model.loss, []

    def spoilt(images, labels):
        passed.append(None)
        parts = loss(images, labels)
        return {name: part * float("nan") for name, part in parts.items()} if len(passed) == 15 else parts
    model.loss = spoilt
    with pytest.raises(FloatingPointError, match=r"step 7: not finite \(loss nan.*lr .*Lower lr"):
        train(model, tmp_path)
    assert newest_checkpoint(tmp_path).name == "step-00000005.ckpt"
    assert all(value.isfinite().all() for value in model.trained_state_dict().values())


def test_non_finite_gradient_stops_as_well(tmp_path):
    model = Pixelwise()
    model.loss = lambda images, labels: {"loss": (model.linear(images) * 0).sum().sqrt()}  # 0, with gradient nan
    with pytest.raises(FloatingPointError, match=r"step 0: not finite \(loss 0, gradient_norm nan"):
        train(model, tmp_path)


def test_collapsed_gate_is_named_once_per_window(tmp_path):
    model = tiny_model()
    model.initialise = lambda images: None
    with torch.no_grad(): model.adapter.gates[1]["depth"].weight[1:] = 1e3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(model, tmp_path)
    collapse = [str(w.message) for w in caught if "fair share" in str(w.message)]
    assert len(collapse) == STEPS / RUN["log_every"]
    for message in collapse:
        assert "layer 1 depth expert 1 (0.00%)" in message and "layer 1 depth expert 2 (0.00%)" in message
        assert "layer 1 depth expert 0" not in message
    assert all(entry["depth"][1] == [1.0, 0.0, 0.0] for entry in result.history["load"])
    assert all(value.isfinite().all() for value in model.trained_state_dict().values())


def test_even_gates_give_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Lightning's included: nothing but real warnings may come through
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        train(tiny_model(), tmp_path)


def test_best_rule_leaves_the_best_weights(tmp_path):
    model = tiny_model()
    result = train(model, tmp_path, rule="best source validation", lr=3e-2, validate_every=2)
    data = tiny_data()
    counts = confusion_matrix(model, data.val_dataloader(), data.benchmark.n_classes)
    scores = {entry["step"]: entry["miou"] for entry in result.history["validation"]}
    assert iou_per_class(counts).nanmean().item() == result.best["miou"] == max(scores.values())
    assert scores[result.best["step"]] == result.best["miou"]
    assert result.last["step"] == STEPS


def test_weights_do_not_depend_on_the_targets(whole, tmp_path):
    task = tiny_data().benchmark
    assert task.targets
    data = DomainDataModule(replace(task, targets=()), batch_size=4, micro_batch=2, crop=32)
    model = tiny_model()
    fit(model, data, STEPS, tmp_path, **RUN)
    assert same(model, whole.model)


def test_frozen_parts_and_global_randomness_are_left_alone(tmp_path):
    model = tiny_model()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: value.clone() for name, value in model.trained_state_dict().items()}
    state = torch.random.get_rng_state()
    train(model, tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert not all(torch.equal(value, model.get_parameter(name)) for name, value in start.items())
    assert not model.training


def test_interrupt_stays_an_interrupt(tmp_path):
    def interrupt(): raise KeyboardInterrupt
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(dying(tiny_model(), 3, interrupt), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_bf16_run_is_close(whole, tmp_path):
    result = train(tiny_model(), tmp_path, precision="bf16-mixed")
    losses = [[entry["loss"] for entry in r.history["train"]] for r in (result, whole.result)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_lines_are_plain(tmp_path, capsys):
    train(tiny_model(), tmp_path, progress="lines")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 4/12", "step 8/12", "step 12/12"]
    assert all("images/s" in line and "left" in line and "\r" not in line for line in lines)
