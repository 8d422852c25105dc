"""Files that are weights, and files that only look like them."""
import argparse
import io
import json
import os
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralmoe.encoders.files import LoadReport, read_weights, require_complete, require_finite, weight_files

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
STATE = {"a.weight": torch.randn(2, 3), "a.bias": torch.zeros(2), "n": torch.tensor(3)}


def same(found, expected=STATE):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(2)}}},
    lambda s: {"model": {"state_dict": s}}, lambda s: {"teacher": s, "args": argparse.Namespace(lr=1)},
    lambda s: {"model_state_dict": s, "optimizer_state_dict": {}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_wrapped_files(tmp_path, wrap, zipped):
    torch.save(wrap(STATE), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    same(read_weights(tmp_path / "x.pt"))


def test_safetensors_whatever_its_name_and_folders(tmp_path):
    save_file(STATE, tmp_path / "x.pth")
    same(read_weights(tmp_path / "x.pth"))
    same(read_weights(tmp_path))
    parts = dict(list(STATE.items())[:1]), dict(list(STATE.items())[1:])
    for i, part in enumerate(parts): save_file(part, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {k: f"model-{i}.safetensors" for i, part in enumerate(parts) for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    same(read_weights(str(tmp_path)))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-1.safetensors is not here"): read_weights(tmp_path)


def test_a_folder_with_two_files_is_a_question(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of weights"): weight_files(tmp_path)
    for name in ("a.pth", "b.pt"): torch.save(STATE, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="a.pth, b.pt: give the one"): read_weights(tmp_path)
    save_file(STATE, tmp_path / "c.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "c.safetensors"]
    with pytest.raises(FileNotFoundError, match="no file or folder"): read_weights(tmp_path / "none")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors", "torchscript"])
@pytest.mark.parametrize("keep", [0.98, 0.5, 0.1])
def test_truncated(tmp_path, kind, keep):
    file = tmp_path / "x.pth"
    large = {"a": torch.randn(100, 100)}
    if kind == "safetensors": save_file(large, file)
    elif kind == "torchscript": torch.jit.script(nn.Linear(8, 8)).save(str(file))
    else: torch.save(large, file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[:max(20, int(keep * len(whole)))])
    with pytest.raises(ValueError, match="truncated or damaged"): read_weights(file)


class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.makedirs, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path, zipped):
    mark, file = tmp_path / "ran", tmp_path / "x.pth"
    torch.save({"a": torch.ones(1), "b": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pickled code or objects \(os.makedirs\), which were not run"): read_weights(file)
    assert not mark.exists()


def test_an_object_of_ones_own_is_named(tmp_path):
    torch.save({"net": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="torch.nn.modules.linear.Linear"): read_weights(tmp_path / "x.pth")


def test_torchscript_is_read_without_its_code(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4))).eval().half()
    for script in (torch.jit.script(net), torch.jit.trace(net[0].float(), torch.ones(1, 3, 4, 4))):
        script.save(str(tmp_path / "x.pt"))
        same(read_weights(tmp_path / "x.pt"), script.state_dict())


def test_a_torchscript_archive_cannot_smuggle_code(tmp_path):
    mark, file = tmp_path / "ran", tmp_path / "x.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(file))
    bad = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist(): new.writestr(name, pickle.dumps(Evil(mark)) if name.endswith("/data.pkl") else old.read(name))
    file.write_bytes(bad.getvalue())
    with pytest.raises(ValueError, match="os.makedirs"): read_weights(file)
    assert not mark.exists()


def test_a_report_in_a_notebook_shows_every_kind_of_key():
    whole = LoadReport("x.pth", "timm", ["a", "b"], filled=["c"])
    assert "2 matched, 1 filled, 0 missing" in repr(whole) and "<td>filled</td><td>1</td>" in whole._repr_html_()
    assert "k&lt;" in LoadReport("x", "timm", missing=["k<"])._repr_html_()
    for kind, word in (("missing", "missing"), ("unexpected", "unexpected"), ("misshapen", "mismatched")):
        with pytest.raises(ValueError, match=rf"1 {word} \(k<, \.\.\.\).*Do that"): require_complete(LoadReport("x", "timm", **{kind: ["k<"]}), "m", "Do that")


class Curve:
    "A log that pickles its methods, as mmengine's does."
    def newest(self): pass


Curve.__module__, Curve.__qualname__, Curve.newest.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer", "HistoryBuffer.newest"
Curve.newest.__module__ = Curve.__module__


@pytest.fixture
def log(monkeypatch):
    parts = ["mmengine", "mmengine.logging", Curve.__module__]
    for name in parts: monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[Curve.__module__].HistoryBuffer = Curve
    made = Curve()
    made.methods = {"newest": Curve.newest}
    return made


def test_paths_and_empty_arrays_in_a_training_log_are_left_unmade(tmp_path):
    "Lightning keeps paths among its hyperparameters, numpy writes an empty array as a call of `bytes`."
    beside = dict(hyper_parameters={"data": pathlib.Path("a"), "other": pathlib.PureWindowsPath("b")}, curve=np.zeros(0))
    for zipped in (True, False):
        torch.save({"state_dict": STATE, **beside}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        same(read_weights(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_log_of_a_later_protocol_is_not_called_code(tmp_path, protocol, log):
    torch.save({"state_dict": STATE, "log": log, "curve": np.ones(3)}, tmp_path / "x.pth", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="a later protocol, or made by hand.*torch.save"): read_weights(tmp_path / "x.pth")
    mark = tmp_path / "ran"
    torch.save({"state_dict": STATE, "log": log, "b": Evil(mark)}, tmp_path / "x.pth", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"pickled code or objects \(os.makedirs\)"): read_weights(tmp_path / "x.pth")
    assert not mark.exists()


def test_an_optimizer_is_named(tmp_path):
    torch.save(torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth holds the state of an optimizer"): read_weights(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", [torch.ones(2, 2).to_sparse(), torch.ones(2) * 1j, torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)],
                         ids=["sparse", "complex", "quantized"])
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path, odd):
    torch.save({**STATE, "odd": odd}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth: odd \(.*\) are no plain tensors.*float32"): read_weights(tmp_path / "x.pth")


def test_eight_bits_are_looked_at_too():
    require_finite({"a": torch.ones(3).to(torch.float8_e4m3fn)}, "x")
    with pytest.raises(ValueError, match=r"x: a \(1 of 2 values\) not finite"):
        require_finite({"a": torch.tensor([1, float("nan")]).to(torch.float8_e4m3fn)}, "x")
