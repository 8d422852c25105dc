"What a model card says, and of which records."
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from spectralmoe.benchmarks import BENCHMARKS
from spectralmoe.reporting.card import model_card, records_of
from spectralmoe.reporting.records import RunRecord, read_records
from spectralmoe.segmentor import Segmentor

VFM = dict(name="dinov3-vits16", weights="random", dim=32, n_layers=3, n_heads=4, patch_size=8)
DFM = dict(name="depth-anything-v2-small", weights="random", dim=32, n_layers=3, n_heads=4, patch_size=8, image_size=48)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, n_heads=4, encoder_width=32, decoder_width=32, n_points=64)


@pytest.fixture(scope="module")
def model():
    return Segmentor.build("made_tiles", VFM, DFM, head_sizes=HEAD, n_experts=3, rank=2).eval()


def record(model, seed=0, **changes):
    return replace(RunRecord(
        "benchmark", "made_tiles", "spectralmoe", seed, config=dict(steps=9, weights={"vfm": model.vfm.fingerprint()[:12]}),
        data={"source": "a337e494856463"}, metrics={"source": {"miou": 0.71}, "target": {"miou": 0.5 + seed / 10}}, status="done",
        code={"commit": "c0ffee", "dirty": True}, device="cpu", seconds=1.0, finished="2026-01-01T00:00:00+00:00"), **changes)


@pytest.fixture
def records(model):
    return {Path(f"s{seed}.json"): record(model, seed) for seed in (0, 1)} | {Path("f.json"): record(model, method="frozen")}


def test_card_says_what_the_records_say(model, records):
    card = model_card(model, records, "lab/wet", "cc-by-4.0", limits="Not for maps of floods.")
    data = ModelCard(card).data
    assert {r.dataset_split: r.metric_value for r in data.eval_results} == {"source validation": 71.0, "target": 55.0}
    assert data.license == "cc-by-4.0" and data.base_model == ["facebook/dinov3-vits16-pretrain-lvd1689m", "depth-anything/Depth-Anything-V2-Small-hf"]
    for said in ("| target | 55.0 ± 63.5 (2) | 50.0 |", model.vfm.fingerprint(), model.dfm.fingerprint(), "commit c0ffee, with uncommitted changes",
                 "seeds: 0, 1", 'from_pretrained("lab/wet")', "drawn at random", "DINOv3", "Not for maps of floods.", "red, green, blue, nir, swir22",
                 "source a337e494856463", record(model).id): assert said in card, said
    assert "simulated" not in card and "\n\n\n" not in card


def test_a_card_of_simulated_images_says_so(model, records):
    name = next(name for name, b in BENCHMARKS.items() if b.world == "mini")
    simulated = {p: replace(r, benchmark=name) for p, r in records.items()}
    other = Segmentor.build(name, VFM, DFM, head_sizes=HEAD, n_experts=3, rank=2)
    assert "**simulated**" in model_card(other, simulated, "lab/wet", "mit")


def test_numbers_of_other_models_are_refused(model, records):
    assert [r.seed for r in records_of(model, records).values()] == [0, 1]
    own = {p: r for p, r in records.items() if r.method == "spectralmoe"}
    for wrong, words in (({}, "among 0 records"), ({p: r for p, r in records.items() if r.method == "frozen"}, "made_tiles with frozen .done"),
                         ({p: replace(r, status="running") for p, r in own.items()}, "running"),
                         ({p: r for p, r in own.items() if r.seed}, r"seed 0, the records have \[1\]"),
                         ({p: replace(r, config={"weights": {"vfm": "abcdef012345"}}) for p, r in own.items()}, "abcdef012345... as its backbone")):
        with pytest.raises(ValueError, match=words): model_card(model, wrong, "lab/wet", "mit")
    twice = own | {Path("again.json"): replace(record(model), config={**record(model).config, "steps": 10})}
    with pytest.raises(ValueError, match="two runs of 'spectralmoe' with seed 0"): model_card(model, twice, "lab/wet", "mit")


def test_card_of_records_on_disk(model, records, tmp_path):
    for r in records.values(): r.write(tmp_path)
    assert "| target | 55.0 ± 63.5 (2) | 50.0 |" in model_card(model, read_records(tmp_path), "lab/wet", "mit")
