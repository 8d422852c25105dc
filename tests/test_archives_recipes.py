"Archives that lie, disks that are full, processes that are killed: nothing is lost, nothing half done is taken for whole."
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio

from spectralmoe.archives import recipes as archives
from spectralmoe.archives.recipes import (Layout, PrepareWarning, Recipe, Scene, copy_member, cut_scene, find_members, list_members,
                                          pair_up, prepare_with)
from spectralmoe.bands import Band, Sensor
from spectralmoe.benchmarks import IGNORE, Benchmark, Domain
from spectralmoe.files import only_one
from spectralmoe.reading.manifest import read_manifest, verify_folder

pytestmark = [pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
              pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")]
LAYOUT = Layout(("red", None, "nir"), {0: "ignored", 1: "field", 2: "forest"})


def write(path, array, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(driver="GTiff", count=len(array), height=array.shape[1], width=array.shape[2], dtype=array.dtype)
    with rasterio.open(path, "w", **{**profile, **more}) as out: out.write(array)
    return path


def toy():
    sensor = Sensor("toy", (Band("red", .66, .06, "red", scale=.01), Band("nir", .83, .1, "nir", scale=.01)))
    place = lambda name: Domain(name, f"toy/{name}/images", f"toy/{name}/masks", f"toy/{name}/index.csv", sensor=sensor)
    task = Benchmark("toy", "Toy", ("field", "forest"), ((1, 2, 3), (4, 5, 6)), {0: IGNORE, 1: 0, 2: 1}, place("spring"),
                     (place("autumn"),), ("nir", "red"), rgb=("nir", "red", "nir"))
    def scenes(members, chosen):
        pick = lambda kind: find_members(members, rf"toy/{kind}/((spring|autumn)_\d+)\.tif")
        return [Scene(season, k, i, m, LAYOUT) for (k, season), i, m in pair_up(pick("image"), pick("label"), "toy", chosen["skip"])]
    return Recipe("toy", task, "", "", "", {}, "toy/{image,label}/*.tif", scenes)


def land(seed, shape=(40, 50)):
    label = np.random.default_rng(seed).integers(0, 3, shape, dtype="uint8")
    return np.stack([label * 40, label * 0 + 7, label * 60]), label[None]


def fill(folder, n=3, shape=(40, 50)):
    for d, season in enumerate(("spring", "autumn")):
        for k in range(n):
            image, label = land(10 * d + k, shape)
            write(folder / "toy" / "image" / f"{season}_{k}.tif", image)
            write(folder / "toy" / "label" / f"{season}_{k}.tif", label)
    return folder


def zipped(folder, to):
    to.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(to / "toy.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted(folder.rglob("*.tif")): z.write(path, path.relative_to(folder))
    return to


def test_folder_zip_and_tar_give_the_same(tmp_path):
    plain = fill(tmp_path / "plain")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "toy.tar", "w") as tar: tar.add(plain / "toy", "toy")
    made = {}
    for kind, source in dict(plain=plain, zip=zipped(plain, tmp_path / "zip"), tar=tmp_path / "tar").items():
        folder = prepare_with(toy(), source, tmp_path / f"out_{kind}", {"tile": 32}).parent
        assert verify_folder(folder) == 2 * 2 * 3 * 4
        said = read_manifest(folder)
        made[kind] = said["domains"], said["statistics"]
    assert made["plain"] == made["zip"] == made["tar"]


def test_tiles_hold_the_pixels_once_and_in_place(tmp_path):
    image, label = land(3, (70, 90))
    affine = rasterio.Affine(2, 0, 100, 0, -2, 500)
    a = write(tmp_path / "a.tif", image, transform=affine, crs="EPSG:2154")
    b = write(tmp_path / "b.tif", label)
    cut_scene(Scene("spring", "x", None, None, LAYOUT), a, b, tmp_path, tile=64)
    back, seen = np.zeros_like(image[[0, 2]]), np.zeros(label.shape[1:], int)
    for path in sorted((tmp_path / "images").iterdir()):
        with rasterio.open(path) as tile, rasterio.open(tmp_path / "masks" / path.name) as mask:
            assert tile.descriptions == ("red", "nir") and tile.crs.to_epsg() == 2154
            col, row = (int(v) for v in ~affine * (tile.transform.c, tile.transform.f))
            at = slice(row, row + tile.height), slice(col, col + tile.width)
            back[(slice(None), *at)] = tile.read()
            seen[at] += 1
            assert (mask.read(1) == label[0][at]).all()
    assert (back == image[[0, 2]]).all() and (seen == 1).all()


def test_statistics_are_those_of_the_source_in_physical_units(tmp_path):
    said = read_manifest(prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out", {"tile": 32}).parent)["statistics"]
    pixels = np.stack([land(k)[0][[2, 0]] for k in range(3)]).transpose(1, 0, 2, 3).reshape(2, -1) * .01
    assert said["bands"] == ["nir", "red"] and said["pixels"] == 3 * 2000
    np.testing.assert_allclose([said["mean"], said["std"]], [pixels.mean(1), pixels.std(1)], rtol=1e-9)


@pytest.mark.parametrize("name", ["a/../../x.tif", "..\\x.tif"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr(name, "x")
    with pytest.raises(ValueError, match="leads out of the archive"): list_members(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("toy/image/x.tif")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match="link or a device"): list_members(tmp_path)


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("x.tif")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="link or a device"): list_members(tmp_path)


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 2**16)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z: z.writestr("x.tif", bytes(2**22))
    with pytest.raises(ValueError, match="would unpack to 4194304 bytes"): list_members(tmp_path)
    assert not list(tmp_path.glob("*.tif"))


def test_a_header_that_lies_about_its_size_stops_the_copy(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("x.tif", bytes(5 * 2**20))
    member = list_members(tmp_path)[0]._replace(size=100)
    with pytest.raises(ValueError, match="its header says 100"): copy_member(member, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size <= 2**20  # one piece, not all of it


def test_an_image_that_claims_a_world_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_PIXELS", 1000)
    with pytest.raises(archives.PrepareFailed, match="claims 50 x 40 pixels"):
        prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out")


def test_truncated_archives(tmp_path):
    whole = zipped(fill(tmp_path / "in"), tmp_path / "zip") / "toy.zip"
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut off"): list_members(whole.parent)
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "toy.tar", "w") as tar: tar.add(tmp_path / "in" / "toy", "toy")
    tar = tmp_path / "tar" / "toy.tar"
    tar.write_bytes(tar.read_bytes()[:-12000])
    with pytest.raises(ValueError, match="cut off|whole tar"): list_members(tar.parent)


def test_damaged_bytes_inside_a_zip_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr("x.bin", bytes(range(256)) * 100)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[5000] ^= 255
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.zip:x.bin: cannot be unpacked .*CRC"): copy_member(list_members(tmp_path)[0], tmp_path / "x")


@pytest.mark.parametrize("spoil, told", [
    (lambda f: write(f / "toy/image/spring_1.tif", land(1)[0][:2]), "2 bands, expected 3"),
    (lambda f: write(f / "toy/image/spring_1.tif", land(1)[0].astype("uint16")), "is uint16, expected uint8"),
    (lambda f: write(f / "toy/label/spring_1.tif", land(1)[1] + 7), r"not in the table .*\(7, .* expected 0..2"),
    (lambda f: write(f / "toy/label/spring_1.tif", land(1, (40, 49))[1]), r"mask \(40, 49\)"),
    (lambda f: write(f / "toy/label/spring_1.tif", np.concatenate([land(1)[1]] * 3)), "3 bands of uint8, expected 1"),
    (lambda f: (f / "toy/image/spring_1.tif").write_bytes((f / "toy/image/spring_1.tif").read_bytes()[:3000]), "cut off or damaged"),
    (lambda f: (f / "toy/image/spring_1.tif").write_bytes(b"<html>"), "cut off or damaged")])
def test_a_bad_scene_is_named_and_the_others_are_kept(tmp_path, spoil, told):
    source = fill(tmp_path / "in")
    good = (source / "toy/image/spring_1.tif").read_bytes(), (source / "toy/label/spring_1.tif").read_bytes()
    spoil(source)
    with pytest.raises(archives.PrepareFailed, match=f"(?s)1 of 6 scenes.*spring_1.tif.*{told}"):
        prepare_with(toy(), source, tmp_path / "out", {"tile": 32})
    assert not (tmp_path / "out/toy/manifest.json").exists()
    journal = (tmp_path / "out/toy/.work/journal.jsonl").read_text().splitlines()
    assert len(journal) == 1 + 5
    (source / "toy/image/spring_1.tif").write_bytes(good[0])
    (source / "toy/label/spring_1.tif").write_bytes(good[1])


def test_a_scene_can_be_left_out_and_the_manifest_says_so(tmp_path):
    source = fill(tmp_path / "in")
    (source / "toy/image/spring_1.tif").write_bytes(b"")
    said = read_manifest(prepare_with(toy(), source, tmp_path / "out", {"skip": "spring_1"}).parent)
    assert said["domains"]["spring"]["scenes"] == 2 and said["plan"]["options"]["skip"] == ["spring_1"]


def test_off_palette_pixels_are_ignored_and_counted_but_not_a_photograph(tmp_path):
    colours = Layout(LAYOUT.bands, LAYOUT.values, {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 255, 0)})
    image, label = land(0)
    rgb = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], "uint8")[label[0]].transpose(2, 0, 1).copy()
    rgb[:, 0, 0] = 250, 1, 1
    a, b = write(tmp_path / "a.tif", image), write(tmp_path / "b.tif", rgb)
    receipt = cut_scene(Scene("spring", "x", None, None, colours), a, b, tmp_path)
    assert receipt["off_palette"] == 1
    with rasterio.open(tmp_path / "masks/x.tif") as mask: got = mask.read(1)
    label[0, 0, 0] = 0
    assert (got == label[0]).all()
    noise = np.random.default_rng(0).integers(0, 255, rgb.shape, dtype="uint8")
    with pytest.raises(ValueError, match="is this a mask"):
        cut_scene(Scene("spring", "x", None, None, colours), a, write(tmp_path / "c.tif", noise), tmp_path)


def test_the_rest_of_a_bad_download_goes_on_from_the_journal(tmp_path, monkeypatch):
    source, cut = fill(tmp_path / "in"), []
    whole = prepare_with(toy(), source, tmp_path / "whole", {"tile": 32}).read_bytes()
    path = source / "toy/image/spring_1.tif"
    good = path.read_bytes()
    path.write_bytes(good[:3000])
    with pytest.raises(archives.PrepareFailed, match="1 of 6"): prepare_with(toy(), source, tmp_path / "out", {"tile": 32}, workers=1)
    path.write_bytes(good)
    other = source / "toy/image/autumn_2.tif" # cut already, and downloaded again since, smaller
    image, label = land(12, (30, 30))
    write(other, image), write(source / "toy/label/autumn_2.tif", label)
    real = archives.cut_scene
    monkeypatch.setattr(archives, "cut_scene", lambda scene, *a: cut.append(scene.name) or real(scene, *a))
    said = read_manifest(prepare_with(toy(), source, tmp_path / "out", {"tile": 32}, workers=1).parent)
    assert sorted(cut) == ["autumn_2", "spring_1"] and verify_folder(tmp_path / "out/toy") == 2 * (5 * 4 + 1)
    image, label = land(12)
    write(other, image), write(source / "toy/label/autumn_2.tif", label)
    with pytest.raises(ValueError, match="with other files"): prepare_with(toy(), source, tmp_path / "out", {"tile": 32})
    assert said["domains"]["spring"] == json.loads(whole)["domains"]["spring"]


def test_a_scene_that_fails_in_the_middle_leaves_no_tile(tmp_path, monkeypatch):
    source = fill(tmp_path / "in")
    label = land(1)[1]
    label[0, -1, -1] = 9 # in the last strip
    write(source / "toy/label/spring_1.tif", label)
    with pytest.raises(archives.PrepareFailed): prepare_with(toy(), source, tmp_path / "out", {"tile": 32})
    assert not list((tmp_path / "out").rglob("*spring_1*"))


def test_an_image_without_a_mask_can_be_left_out(tmp_path):
    source = fill(tmp_path / "in")
    (source / "toy/label/spring_2.tif").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 images have no mask .spring_2"): prepare_with(toy(), source, tmp_path / "out")
    prepare_with(toy(), source, tmp_path / "out", {"skip": "spring_2"})


def test_a_name_to_skip_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="skip=.'spring_7'. are not there"):
        prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out", {"skip": "spring_7"})


def test_side_files_change_nothing_and_what_was_prepared_is_no_input(tmp_path):
    source = fill(tmp_path / "in")
    first = prepare_with(toy(), source, source)  # into the folder of the archives
    said = first.read_bytes()
    for path in source.glob("toy/image/*.tif"): path.with_suffix(".tfw").write_text("2\n0\n0\n-2\n100\n500\n")
    assert not [m for m in list_members(source) if "masks" in m.name]
    assert prepare_with(toy(), source, tmp_path / "out").read_bytes() == said


def test_masks_of_a_wider_type_are_read_by_value(tmp_path):
    source = fill(tmp_path / "in")
    write(source / "toy/label/spring_1.tif", land(1)[1].astype("int16"))
    folder = prepare_with(toy(), source, tmp_path / "out").parent
    with rasterio.open(folder / "spring/masks/spring_1.tif") as mask: assert mask.dtypes == ("uint8",) and (mask.read(1) == land(1)[1][0]).all()
    write(source / "toy/label/spring_1.tif", land(1)[1].astype("int16") + 256)
    with pytest.raises(archives.PrepareFailed, match=r"not in the table .*\(256, "): prepare_with(toy(), source, tmp_path / "other")


def test_another_merge_is_another_data_set(tmp_path):
    from dataclasses import replace
    source = fill(tmp_path / "in")
    merged = lambda to: replace(toy(), label_map=lambda chosen: {0: IGNORE, 1: to, 2: 1 - to})
    said = read_manifest(prepare_with(merged(0), source, tmp_path / "out").parent)
    assert said["label_map"] == {"0": IGNORE, "1": 0, "2": 1}
    with pytest.raises(ValueError, match="prepared or begun otherwise"): prepare_with(merged(1), source, tmp_path / "out")


def test_when_everything_is_wrong_not_everything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "GIVE_UP", 3)
    source = fill(tmp_path / "in", n=8)
    for path in (source / "toy/label").iterdir(): write(path, land(0)[1] + 9)
    with pytest.raises(archives.PrepareFailed, match="[34] of 16 scenes"): prepare_with(toy(), source, tmp_path / "out", workers=1)


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    source, real, calls = fill(tmp_path / "in"), archives.cut_scene, []
    def full(*args):
        calls.append(1)
        if len(calls) == 4: raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)
    monkeypatch.setattr(archives, "cut_scene", full)
    with pytest.raises(OSError, match="is full after 3 of 6 scenes"): prepare_with(toy(), source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out/toy/manifest.json").exists() and not list((tmp_path / "out/toy").glob("*/*/.*"))
    prepare_with(toy(), source, tmp_path / "out", workers=1)
    assert len(calls) == 4 + 3


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda p: type("U", (), dict(free=1000))())
    with pytest.raises(OSError, match="nothing was written"): prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tif"))


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(self, *a, **k): raise PermissionError(errno.EACCES, "Permission denied")
    source = fill(tmp_path / "in")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match="choose another --to"): prepare_with(toy(), source, tmp_path / "out")


BESIDE = """
import sys
sys.path.insert(0, {tests!r})
import test_archives_recipes as t
t.prepare_with(t.toy(), {source!r}, {to!r}, {{"tile": 16}}, workers=1)
"""


def test_two_preparations_of_one_folder_do_not_meet(tmp_path):
    source = fill(tmp_path / "in")
    with only_one(tmp_path / "out/toy", "preparing toy"), pytest.raises(RuntimeError, match=r"is in use by process \d+ on .*preparing toy since .*choose another --to"):
        prepare_with(toy(), source, tmp_path / "out")
    prepare_with(toy(), source, tmp_path / "out")


def test_many_preparations_started_at_once_end_with_tiles_or_with_a_sentence(tmp_path):
    source = fill(tmp_path / "in", n=8)
    code = BESIDE.format(tests=str(Path(__file__).parent), source=str(source), to=str(tmp_path / "out"))
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ends = [(p.communicate()[1].strip().splitlines() or [""], p.returncode) for p in processes]
    assert any(code == 0 for _, code in ends)
    for lines, code in ends: assert code == 0 or "is in use by" in lines[-1], lines[-1] # the note with the process comes a moment after the lock
    assert verify_folder(tmp_path / "out/toy") == 2 * sum(d["tiles"] for d in read_manifest(tmp_path / "out/toy")["domains"].values())
    assert not (tmp_path / "out/toy/.work").exists()


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import test_archives_recipes as t
real = t.archives.cut_scene
def slow(*args):
    time.sleep(.15)
    return real(*args)
t.archives.cut_scene = slow
t.prepare_with(t.toy(), {source!r}, {to!r}, {{"tile": 16}}, workers=2)
"""


def test_kill_9_and_again_is_the_same_as_never_killed(tmp_path):
    source = zipped(fill(tmp_path / "in", n=8), tmp_path / "zip")
    whole = prepare_with(toy(), source, tmp_path / "whole", {"tile": 16}).read_bytes()
    code = KILLED.format(tests=str(Path(__file__).parent), source=str(source), to=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", code])
    journal, deadline = tmp_path / "out/toy/.work/journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 4) and time.monotonic() < deadline: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_text().count("\n") - 1
    assert 4 <= done < 16 and not (tmp_path / "out/toy/manifest.json").exists()
    with journal.open("a") as file: file.write('{"domain": "spring", "na')  # as a kill in the middle of a line leaves it
    assert prepare_with(toy(), source, tmp_path / "out", {"tile": 16}).read_bytes() == whole
    verify_folder(tmp_path / "out/toy")


def test_verify_finds_what_was_changed_taken_or_added(tmp_path):
    folder = prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out").parent
    tile = folder / "spring/masks/spring_0.tif"
    data = tile.read_bytes()
    tile.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="spring_0.tif differs"): verify_folder(folder)
    tile.unlink()
    with pytest.raises(ValueError, match="spring_0.tif is missing"): verify_folder(folder)
    tile.write_bytes(data)
    verify_folder(folder)
    (folder / "spring/masks/spring_9.tif").write_bytes(data)
    with pytest.raises(ValueError, match="spring_9.tif is not in the index"): verify_folder(folder)


def test_both_archive_and_extracted_folder_are_refused(tmp_path):
    source = fill(tmp_path / "in")
    zipped(source, source)
    with pytest.raises(ValueError, match="the same file twice; give archives or"): prepare_with(toy(), source, tmp_path / "out")


def test_kinds_that_have_to_be_unpacked_are_named(tmp_path):
    (tmp_path / "toy.7z").write_bytes(b"7z")
    with pytest.raises(ValueError, match="toy.7z.*unpacked first"): list_members(tmp_path)


def test_a_domain_without_scenes_shows_the_tree(tmp_path):
    source = fill(tmp_path / "in")
    for path in source.rglob("autumn*"): path.unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)nothing was found for autumn.*toy/\{image,label\}"): prepare_with(toy(), source, tmp_path / "out")


def test_links_folders_and_spellings(tmp_path):
    source = fill(tmp_path / "in")
    (source / "toy/image/loop").symlink_to(source)
    assert len(list_members(source)) == 12 # every folder once
    (source / "toy/image/loop").unlink()
    (source / "toy/image/spring_9.tif").mkdir() # a folder named like a file
    assert read_manifest(prepare_with(toy(), source, tmp_path / "out").parent)["domains"]["spring"]["scenes"] == 3
    (source / "toy/label/spring_0.tif").unlink()
    (source / "toy/label/spring_0.tif").symlink_to("moved.tif")
    with pytest.raises(FileNotFoundError, match=r"1 links lead nowhere .toy/label/spring_0.tif -> moved.tif.: restore"): list_members(source)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    source = fill(tmp_path / "in")
    (source / "toy/label").chmod(0)
    try:
        with pytest.raises(PermissionError, match="label cannot be read"): list_members(source)
    finally: (source / "toy/label").chmod(0o755)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_one_letter_or_two(tmp_path, form):
    import unicodedata
    from dataclasses import replace
    def scenes(members, chosen):
        pick = lambda kind: find_members(members, rf"{kind}/((été|spring|autumn)_\d+)\.tif")
        return [Scene("autumn" if s == "autumn" else "spring", k, i, m, LAYOUT) for (k, s), i, m in pair_up(pick("image"), pick("label"), "toy", chosen["skip"])]
    source, name = fill(tmp_path / "in"), unicodedata.normalize(form, "été_1")
    for kind in ("image", "label"): (source / f"toy/{kind}/spring_1.tif").rename(source / f"toy/{kind}/{name}.TIF")
    recipe = replace(toy(), scenes=scenes)
    assert "spring/images/été_1.tif" in {p.relative_to(tmp_path / "out/toy").as_posix() for p in (prepare_with(recipe, source, tmp_path / "out").parent).rglob("*.tif")}
    for skip in ("NFC", "NFD"):
        said = read_manifest(prepare_with(recipe, source, tmp_path / skip, {"skip": unicodedata.normalize(skip, "été_1")}).parent)
        assert said["domains"]["spring"]["scenes"] == 2


def test_images_tagged_cmyk_are_read_as_stored(tmp_path):
    source = fill(tmp_path / "in")
    from dataclasses import replace
    four = Layout(("red", None, None, "nir"), LAYOUT.values)
    recipe = replace(toy(), scenes=lambda members, chosen: [s._replace(layout=four) for s in toy().scenes(members, chosen)])
    stored = {}
    for path in (source / "toy/image").iterdir():
        with rasterio.open(path) as image: a = image.read()
        stored[path.stem] = write(path, a[[0, 1, 1, 2]], photometric="CMYK") and a[[0, 2]]
    folder = prepare_with(recipe, source, tmp_path / "out").parent
    for name, values in stored.items():
        with rasterio.open(next(folder.rglob(f"images/{name}.tif"))) as tile: assert (tile.read() == values).all()


def test_a_band_that_is_the_same_everywhere_is_refused_and_nothing_is_lost(tmp_path):
    source = fill(tmp_path / "in")
    for path in (source / "toy/image").glob("spring*"):
        with rasterio.open(path) as image: a = image.read()
        a[2] = 9
        write(path, a)
    with pytest.raises(ValueError, match=r"toy: band nir is 9 in all 6,000 pixels of spring .standard deviation 0"): prepare_with(toy(), source, tmp_path / "out")
    assert not (tmp_path / "out/toy/manifest.json").exists()
    assert len((tmp_path / "out/toy/.work/journal.jsonl").read_text().splitlines()) == 7


def test_what_differs_from_what_was_published_is_said_with_numbers(tmp_path):
    import hashlib
    from dataclasses import replace
    source = zipped(fill(tmp_path / "in", n=2), tmp_path / "zip")
    archive = source / "toy.zip"
    right = dict(expected={"spring": 2, "autumn": 2}, md5={"toy.zip": hashlib.md5(archive.read_bytes()).hexdigest()}, sizes={"toy.zip": archive.stat().st_size})
    said = lambda to, options=None, **known: read_manifest(prepare_with(replace(toy(), **known), source, tmp_path / to, options).parent)["warnings"]
    assert said("right", **right) == said("tiles", {"tile": 16}, **right) == []
    with pytest.warns(PrepareWarning, match="spring has 2 of 9,432 published tiles"): assert len(said("few", expected={"spring": 9432})) == 1
    with pytest.warns(PrepareWarning, match="toy.zip has md5 .*, published is 0a"): said("md5", md5={"toy.zip": "0a" * 16})
    with pytest.warns(PrepareWarning, match="toy.zip has .* MB, published are 50,000.0 MB"): said("size", sizes={"toy.zip": 5e10})


def test_messages_show_ten_values(tmp_path):
    source = fill(tmp_path / "in", n=30)
    shutil.rmtree(source / "toy/label")
    (source / "toy/label").mkdir()
    with pytest.raises(FileNotFoundError, match="60 of 60 images have no mask .*autumn_17 and 50 more"): prepare_with(toy(), source, tmp_path / "out")


def test_members_of_hidden_and_mac_folders_are_no_data(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("__MACOSX/toy/._x.tif", "")
        z.writestr("toy/.DS_Store", "")
        z.writestr("toy/x.tif", "x")
    assert [m.name for m in list_members(tmp_path)] == ["toy/x.tif"]


def test_manifest_is_json_and_damage_is_said(tmp_path):
    folder = prepare_with(toy(), fill(tmp_path / "in"), tmp_path / "out").parent
    text = (folder / "manifest.json").read_text()
    assert json.loads(text)["plan"]["options"]["tile"] == 512
    (folder / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match="is not JSON"): read_manifest(folder)
