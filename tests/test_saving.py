"Saved models: whole folders, what is uploaded, what is found in the hub's cache, and what is refused, without a network."
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, errors

from spectralmoe.backbones import load_vfm
from spectralmoe.saving import read_config, read_state, write_pretrained
from spectralmoe.segmentor import Segmentor

VFM = dict(name="dinov3-vits16", weights="random", dim=32, n_layers=3, n_heads=4, patch_size=8)
DFM = dict(name="depth-anything-v2-small", weights="random", dim=32, n_layers=3, n_heads=4, patch_size=8, image_size=48)
HEAD = dict(hidden=32, n_queries=8, encoder_layers=1, decoder_layers=1, n_heads=4, encoder_width=32, decoder_width=32, n_points=64)
TOKEN = "hf_notARealTokenButItLooksLikeOne"


@pytest.fixture(scope="module")
def model():
    return Segmentor.build("made_tiles", VFM, DFM, head_sizes=HEAD, n_experts=3, rank=2).eval()


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    folder = write_pretrained(tmp_path / "model", {"a": torch.zeros(2)}, dict(format=1))
    with pytest.raises(TypeError): write_pretrained(folder, {"a": torch.ones(2)}, dict(format=1, odd=torch.ones(2)))
    assert read_state(folder)["a"].tolist() == [0, 0] and read_config(folder, 1) == {"format": 1}
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


class Hub:
    "Takes what is uploaded; fails if told to."
    def __init__(self, error=None): self.error, self.calls, self.files = error, [], {}
    def __call__(self, **given): self.calls.append(given); return self
    def create_repo(self, repo_id, **given): self.calls.append({"repo_id": repo_id, **given})
    def upload_folder(self, repo_id, folder_path, **given):
        if self.error: raise self.error
        self.calls.append({"repo_id": repo_id, **given})
        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return type("Info", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def offline(monkeypatch, folder):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_cache(cache, source, commit, refs=("main",), name="models--lab--wet"):
    "`source` as the hub's cache keeps a download."
    shutil.copytree(source, cache / name / "snapshots" / commit)
    for ref in refs:
        (cache / name / "refs").mkdir(parents=True, exist_ok=True)
        (cache / name / "refs" / ref).write_text(commit)


def test_what_goes_up_comes_back(model, monkeypatch, tmp_path):
    "The bytes that were uploaded, put into a cache as a download would, give the same model without a network."
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    card = "# Wetlands: größer als gedacht\n"
    assert model.push_to_hub("lab/wet", card, private=True, message="First") == "https://huggingface.co/lab/wet/commit/1"
    assert {"repo_id": "lab/wet", "private": True, "exist_ok": True} in hub.calls and {"repo_id": "lab/wet", "commit_message": "First"} in hub.calls
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"] and hub.files["README.md"].decode() == card
    (tmp_path / "up").mkdir()
    for name, data in hub.files.items(): (tmp_path / "up" / name).write_bytes(data)
    in_cache(tmp_path / "cache", tmp_path / "up", "0123abc")
    offline(monkeypatch, tmp_path / "cache")
    again, images = Segmentor.from_pretrained("lab/wet"), torch.randn(1, 5, 40, 48)
    assert torch.equal(again.eval()(images), model(images))


def test_revisions_from_the_cache(model, monkeypatch, tmp_path):
    for n, commit in enumerate(("aaa", "bbb")):
        with torch.no_grad(): model.adapter.scale.fill_(n)
        in_cache(tmp_path / "cache", model.save_pretrained(tmp_path / commit), commit, ("main",) if n else ("v1",))
    offline(monkeypatch, tmp_path / "cache")
    found = {r: Segmentor.from_pretrained("lab/wet", revision=r).adapter.scale.item() for r in (None, "main", "v1")}
    assert found == {None: 1.0, "main": 1.0, "v1": 0.0}
    with pytest.raises(FileNotFoundError, match="at v2, not in the hub's cache"): Segmentor.from_pretrained("lab/wet", revision="v2")


def test_a_half_downloaded_model_is_refused(model, monkeypatch, tmp_path):
    folder = model.save_pretrained(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    in_cache(tmp_path / "cache", folder, "aaa")
    offline(monkeypatch, tmp_path / "cache")
    with pytest.raises((ValueError, FileNotFoundError), match="model.safetensors|cache"): Segmentor.from_pretrained("lab/wet")


def http(kind):
    import httpx
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/api", headers={"authorization": f"Bearer {TOKEN}"}))
    return kind("no", response=response)


@pytest.mark.parametrize("kind, error, words", [
    (errors.GatedRepoError, PermissionError, "lab/wet is gated: accept its terms .*hf auth login"),
    (errors.RepositoryNotFoundError, FileNotFoundError, "none of this name that you may see"),
    (errors.RevisionNotFoundError, FileNotFoundError, "no revision v3")])
def test_refusals_of_the_hub_say_what_to_do(kind, error, words, monkeypatch):
    def refuse(*_, **__): raise http(kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(error, match=words): Segmentor.from_pretrained("lab/wet", revision="v3")


def test_offline_and_names(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"cache .*HF_HUB_OFFLINE is set.*hf download lab/wet"): Segmentor.from_pretrained("lab/wet")
    for odd in ("a/b/c", "my model", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="no hub id either"): Segmentor.from_pretrained(odd)


def test_other_faults_are_not_taken_for_the_hubs(monkeypatch):
    def broken(*_, **__): raise ZeroDivisionError
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ZeroDivisionError): Segmentor.from_pretrained("lab/wet")


def test_a_token_is_never_printed_or_stored(model, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    model.push_to_hub("lab/wet", "card")
    assert TOKEN not in repr(hub.calls) and all(TOKEN.encode() not in data for data in hub.files.values())
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(http(errors.HfHubHTTPError)))
    with pytest.raises(RuntimeError, match="nothing was uploaded .HfHubHTTPError.*hf auth login") as caught: model.push_to_hub("lab/wet", "card")
    assert TOKEN not in "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())


def test_no_path_of_this_machine_goes_up(monkeypatch, tmp_path):
    "A backbone read from a folder here is named by its hub id there; the hash is what counts."
    folder = tmp_path / "secret_project"
    load_vfm("mini_vfm").model.save_pretrained(folder)
    own = Segmentor.build("made_tiles", dict(name="mini_vfm", weights=str(folder)), None, "frozen", head_sizes=HEAD)
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    own.push_to_hub("lab/wet", "card")
    assert b"secret_project" not in hub.files["config.json"]
    (tmp_path / "up").mkdir()
    for name, data in hub.files.items(): (tmp_path / "up" / name).write_bytes(data)
    shutil.rmtree(folder)
    assert Segmentor.from_pretrained(tmp_path / "up").vfm.fingerprint() == own.vfm.fingerprint()


def test_push_without_a_card_is_not_possible(model):
    with pytest.raises(TypeError, match="card"): model.push_to_hub("lab/wet")
