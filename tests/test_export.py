"A trained model as a program: equal to 1e-4 in torch.export and onnxruntime, with its meaning inside; what cannot be exported says so."
import json
import logging

import pytest
import torch
from typer.testing import CliRunner

from spectralmoe.benchmarks import benchmark
from spectralmoe.cli import app
from spectralmoe.export import Unequal, compare, description, export_onnx, export_program, read_description
from spectralmoe.segmentor import Segmentor

VFM = dict(name="dinov3-vits16", dim=32, n_layers=1, n_heads=4, patch_size=8)
DFM = dict(name="depth-anything-v2-small", dim=32, n_layers=1, n_heads=4, patch_size=8, image_size=48)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, n_heads=4, encoder_width=32, decoder_width=32, n_points=64)
STATISTICS = dict(bands=["b", "g", "r", "n", "s"], mean=[0.1] * 5, std=[0.2] * 5, pixels=9)


@pytest.fixture(autouse=True)
def no_trace():
    "Without the trace that torch writes for whoever listens, as pytest does; it takes most of the time."
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False


def build(method="spectralmoe", head="pixel_shuffle", **kwargs):
    more = dict(n_experts=3, rank=2) if method == "spectralmoe" else {}
    return Segmentor.build("made_tiles", VFM, DFM, method, head=head, head_sizes=HEAD if head == "mask2former" else {}, seed=0, **more, **kwargs)


def test_from_the_command_line_into_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    run_time = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = build(statistics=STATISTICS)
    with torch.no_grad():
        for p in model.adapter.parameters(): p.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--onnx", str(tmp_path / "m.onnx"), "--size", "40x48"])
    assert result.exit_code == 0 and "scores in onnxruntime differ by" in result.output, result.output
    assert [p.name for p in tmp_path.glob("*.onnx*")] == ["m.onnx"], "one file, and no draft beside it"
    session = run_time.InferenceSession(str(tmp_path / "m.onnx"))
    images = torch.randn(3, 5, 40, 48)
    scores = torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
    with torch.no_grad(): torch.testing.assert_close(scores, model.eval()(images), rtol=1e-4, atol=1e-4)
    said, task = read_description(tmp_path / "m.onnx"), benchmark("made_tiles")
    assert said["classes"] == list(task.classes) and said["bands"] == list(task.bands) and said["statistics"] == STATISTICS
    assert [(s["scale"], s["offset"]) for s in said["scale"]] == [(b.scale, b.offset) for b in task.source.fed_sensor.select(task.bands).bands]
    assert json.loads(session.get_modelmeta().custom_metadata_map["spectralmoe.multiple"]) == 8


def test_any_sides():
    program = export_program(build("frozen"), (48, 40), dynamic=True)
    assert program.module()(torch.randn(2, 5, 24, 80)).shape == (2, 5, 24, 80)


def test_what_cannot_be_exported_says_so(tmp_path):
    model = build("frozen", head="mask2former").train()
    with pytest.raises(ValueError, match=r"frozen \(dinov3-vits16, mask2former\).*\(dynamic=False\)"): export_program(model, (48, 40), dynamic=True)
    assert model.training, "the model is as it was"
    with pytest.raises(ValueError, match="multiples of 8"): export_onnx(model, tmp_path / "m.onnx", (41, 40))
    with pytest.raises(ValueError, match="holds no metadata"):
        onnx = pytest.importorskip("onnx", reason="onnx is not installed")
        onnx.save(onnx.ModelProto(), tmp_path / "other.onnx")
        read_description(tmp_path / "other.onnx")
    assert not [p for p in tmp_path.iterdir() if p.name != "other.onnx"]


def test_a_constant_where_the_model_looks_is_found():
    model = build("frozen").eval()
    fixed = model(torch.zeros(1, 5, 48, 40)).detach()
    with pytest.raises(Unequal, match="a constant where the model looks at its input"):
        compare(model, lambda images: fixed.expand(len(images), -1, -1, -1), (48, 40), False)


def test_bands_without_a_scale_are_said_so():
    assert description(build("frozen"))["scale"] is None
