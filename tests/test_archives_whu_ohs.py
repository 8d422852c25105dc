"WHU-OHS: every option, every broken copy, archives as folders, going on where it stopped."
import json
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio

from spectralmoe.archives.recipes import Member, PrepareFailed, list_members, prepare_with
from spectralmoe.archives.whu_ohs import (OHS_BROKEN, OHS_CITIES, OHS_CLASSES, WHU_OHS, compare_counts, find_tiles, ohs_spectra,
                                          published_tiles, read_merge, write_whu_ohs)
from spectralmoe.bands import SENSORS
from spectralmoe.benchmarks import BENCHMARKS, IGNORE
from spectralmoe.datasets import SegmentationTiles
from spectralmoe.reading.manifest import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*published:spectralmoe.archives.recipes.PrepareWarning")

FEW = {"source_cities": ["S1", "O24"], "target_cities": ["T1", "T2"]}
TASK = BENCHMARKS["real_whu_ohs"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_whu_ohs(tmp_path_factory.mktemp("few"), scenes=2, cities=["S1", "O24", "T1", "T2"])


def scenes(folder, **other):
    return WHU_OHS.scenes(list_members(folder), WHU_OHS.choose(FEW | other))


def names(found, domain):
    return [s.name for s in found if s.domain == domain]


def unpack(archives, folder):
    for path in archives.glob("*.zip"):
        with zipfile.ZipFile(path) as z: z.extractall(folder)
    return folder


# ---- what is known

def test_table_of_cities_matches_the_published_sums():
    groups = {g: [c for c in OHS_CITIES if c[0] == g] for g in "STO"}
    assert {g: [published_tiles(c, [s]) for s in ("tr", "val", "ts")] for g, c in groups.items()} == {
        "S": [892, 95, 477], "T": [928, 98, 424], "O": [3001, 320, 1558]}


def test_classes_fit_the_benchmark_and_its_palette_is_taken_from_them():
    assert sorted(TASK.label_map) == list(OHS_CLASSES) == list(range(25))
    assert len({c for _, c in OHS_CLASSES.values()}) == 25
    assert set(TASK.palette) <= {c for _, c in OHS_CLASSES.values()}


# ---- the small copy

def test_small_copy_is_laid_out_as_the_real_one(tmp_path):
    folder = write_whu_ohs(tmp_path)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 2e6
    tiles, seen = find_tiles(list_members(folder)), {"S": set(), "T": set(), "O": set()}
    assert {t.city for t in tiles} == set(OHS_CITIES) and len(tiles) == 42 * 3 * 2
    for tile, m in tiles.items():
        with rasterio.open(f"zip://{m.holder}!{m.name}") as source:
            image = tile.kind == "image"
            assert (source.count, source.dtypes[0], source.shape) == ((32, "int16", (16, 16)) if image else (1, "uint8", (16, 16)))
            if image: assert source.profile["interleave"] == "pixel"
            else: seen[tile.city[0]] |= set(source.read(1).ravel().tolist())
    assert all(values == set(range(25)) for values in seen.values())


def test_spectra_are_reflectance_and_all_different():
    spectra = ohs_spectra()
    assert spectra.shape == (25, 32) and 0 < spectra.min() and spectra.max() < 1
    apart = np.abs(spectra[:, None] - spectra).max(-1) + np.eye(25)
    assert apart.min() > .005


# ---- options

def test_cities_and_splits(few):
    found = scenes(few)
    assert names(found, "source_cities") == ["tr_O24_0001", "tr_O24_0002", "tr_S1_0001", "tr_S1_0002",
                                             "val_O24_0003", "val_O24_0004", "val_S1_0003", "val_S1_0004"]
    assert names(found, "target_cities") == ["ts_T1_0001", "ts_T1_0002", "ts_T2_0001", "ts_T2_0002"]
    found = scenes(few, source_cities="O24,O24", source_splits="ts,ts", target_cities="S1", target_splits="val,tr")
    assert names(found, "source_cities") == ["ts_O24_0001", "ts_O24_0002"]
    assert sorted(names(found, "target_cities")) == ["tr_S1_0001", "tr_S1_0002", "val_S1_0003", "val_S1_0004"]


def test_options_that_cannot_be(few):
    for wrong, said in ({"source_cities": "T1"}, "T1 and T1 (Jilin) in source and target"), ({"target_splits": "test"}, "tr, val, ts"), \
                       ({"source_cities": "S9"}, "S1, S2"), ({"source_cities": "S1,S3"}, "no image in tr of S3, expected 113 tiles"), \
                       ({"source_cities": "O19", "target_cities": "O20"}, "O19 and O20 (Tongjiang_2)"), ({"citys": "S1"}, "no option citys"):
        with pytest.raises((ValueError, FileNotFoundError)) as error: scenes(few, **wrong)
        assert said in str(error.value)


def test_defaults_take_all_source_and_other_scenes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image in tr of S2, S3"):
        prepare_with(WHU_OHS, write_whu_ohs(tmp_path, cities=["S1", "T1"]), tmp_path / "out")


def test_the_published_lists_give_the_expected_counts():
    members = [Member(Path("all.zip"), f"{split}/{kind}/{city}_{i:04d}.tif", 1) for split in ("tr", "val", "ts")
               for kind in ("image", "label") for city in OHS_CITIES for i in range(published_tiles([city], [split]))]
    assert Counter(s.domain for s in WHU_OHS.scenes(members, WHU_OHS.choose({}))) == WHU_OHS.expected


def test_merge_goes_to_the_manifest_and_to_no_mask(few, tmp_path):
    table = tmp_path / "merge.csv"
    table.write_text("id,merged\n" + "\n".join(f"{i},{0 if i == 14 else TASK.label_map[i] + 1}" for i in range(1, 25)))
    plain, other = (read_manifest(prepare_with(WHU_OHS, few, tmp_path / str(k), FEW | merge).parent)
                    for k, merge in enumerate(({}, {"merge": str(table)})))
    assert plain["domains"] == other["domains"] and "label_map" not in plain
    assert {int(v): k for v, k in other["label_map"].items()} == {**TASK.label_map, 14: IGNORE}


@pytest.mark.parametrize("text, said", [
    ("", "a row cannot be read"), ("id,merged\n1,1", "ids 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 13 more are missing"), ("value,merged\n1,1", "no column 'id'"), ("id,merged\n1,one", "a row cannot be read"),
    ("id,merged\n" + "\n".join(f"{i},1" for i in [*range(1, 25), 3]), "ids 3 are missing, unknown or there twice"),
    ("id,merged\n" + "\n".join(f"{i},1" for i in range(1, 26)), "ids 25 "),
    ("id,merged\n0,3\n" + "\n".join(f"{i},1" for i in range(1, 25)), "0: 3 (id: merged) out of range")])
def test_merge_tables_that_cannot_be(few, tmp_path, text, said):
    (tmp_path / "merge.csv").write_text(text)
    with pytest.raises(ValueError) as error: scenes(few, merge=str(tmp_path / "merge.csv"))  # before anything is cut
    assert said in str(error.value) and "expected a csv" in str(error.value)


def test_merge_table_from_a_spreadsheet(tmp_path):
    rows = "\r\n".join(f"{i},{TASK.label_map[i] + 1}" for i in reversed(range(25)) if i)
    (tmp_path / "merge.csv").write_bytes(b"\xef\xbb\xbfid,merged\r\n0,0\r\n" + rows.encode())
    assert read_merge(tmp_path / "merge.csv") == dict(TASK.label_map)


def test_tiles_smaller_than_the_scene(few, tmp_path):
    manifest = prepare_with(WHU_OHS, few, tmp_path, FEW | {"tile": 9, "compress": "deflate"})
    assert read_manifest(manifest.parent)["domains"]["target_cities"]["tiles"] == 4 * 4
    assert compare_counts(manifest.parent).loc[("target_cities", "T1", "ts")].to_dict() == {"found": 2, "published": 58}


# ---- broken copies

WORDS = {
    "truncated": "cut off or damaged", "bands": "has 31 bands, expected 32", "label": "[(25, ", "size": "the mask (15, 16)",
    "missing_mask": "1 of 2 images have no mask (tr_S1_0001", "missing_image": "1 of 2 masks have no image (tr_S1_0001)",
    "scaled": "divided already. Multiply by 10000", "8bit": "the image is uint8", "city": "tr/image/O27_0001.tif",
    "suffix": "tr/image/S1_0001.img"}


def test_every_broken_variant_is_tested(): assert set(WORDS) == set(OHS_BROKEN)


@pytest.mark.parametrize("broken, said", WORDS.items())
def test_broken(tmp_path, broken, said):
    folder = write_whu_ohs(tmp_path / "in", scenes=2, cities=["S1", "T1"], broken=broken)
    one = {"source_cities": ["S1"], "target_cities": ["T1"]}
    with pytest.raises((PrepareFailed, ValueError, FileNotFoundError)) as error: prepare_with(WHU_OHS, folder, tmp_path / "out", one)
    assert said in str(error.value) and ("O27_0001" if broken == "city" else "S1_0001") in str(error.value)
    assert not (tmp_path / "out" / "whu_ohs" / "manifest.json").exists()
    if broken in ("city", "suffix"): return
    manifest = prepare_with(WHU_OHS, folder, tmp_path / "without", one | {"skip": ["tr_S1_0001"]})  # the way out that is offered
    assert read_manifest(manifest.parent)["domains"]["source_cities"]["tiles"] == 3


# ---- where files lie, and of which type

def test_archives_folders_and_tar_give_the_same(few, tmp_path):
    folder = unpack(few, tmp_path / "deep" / "WHU-OHS")
    (folder / "tr" / "image" / "S1_0001.tif.aux.xml").write_text("<PAMDataset/>")
    (folder / "readme.txt").write_text("notes")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "all.tar", "w") as tar: tar.add(folder, "data")
    (tmp_path / "bare").mkdir()
    for split in ("tr", "val", "ts"):  # an archive named by its split that does not repeat it inside
        with zipfile.ZipFile(tmp_path / "bare" / f"{split}.zip", "w") as z:
            for path in (folder / split).rglob("*.tif"): z.write(path, path.relative_to(folder / split))
    said = [read_manifest(prepare_with(WHU_OHS, source, tmp_path / str(k), FEW).parent)
            for k, source in enumerate((few, tmp_path / "deep", tmp_path / "tar", tmp_path / "bare"))]
    for other in said[1:]: assert {k: other[k] for k in ("domains", "statistics")} == {k: said[0][k] for k in ("domains", "statistics")}


@pytest.mark.parametrize("missing, said", [("tr/label", "4 of 4 images have no mask"),
                                           ("val/image", "no image in val of S1, O24"), ("ts", "there are tiles in tr, val")])
def test_part_of_the_download_is_missing(few, tmp_path, missing, said):
    shutil.rmtree(unpack(few, tmp_path) / missing)
    with pytest.raises(FileNotFoundError, match=said): scenes(tmp_path)


def test_flattened_renamed_and_merged_copies_are_refused(few, tmp_path):
    folder = unpack(few, tmp_path)
    (folder / "tr" / "label").rename(folder / "tr" / "label_merged")
    with pytest.raises(ValueError, match="8 files fit no pattern"): scenes(folder)
    (folder / "tr" / "label_merged").rename(folder / "tr" / "label")
    (folder / "source_dir").mkdir()
    (folder / "tr" / "image").rename(folder / "source_dir" / "image")
    with pytest.raises(ValueError, match="flattened tiles sorted into their splits"): scenes(folder)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_types_with_room_for_the_numbers_read_alike(few, tmp_path, dtype):
    folder = write_whu_ohs(tmp_path / "in", scenes=2, cities=["S1", "O24", "T1", "T2"], dtype=dtype)
    said = [read_manifest(prepare_with(WHU_OHS, source, tmp_path / str(k), FEW).parent) for k, source in enumerate((few, folder))]
    np.testing.assert_allclose(said[0]["statistics"]["mean"], said[1]["statistics"]["mean"], rtol=1e-6)
    assert [d["labels"] for d in said[0]["domains"].values()] == [d["labels"] for d in said[1]["domains"].values()]


# ---- the result

def test_two_preparations_end_with_the_same_bytes(few, tmp_path):
    one, two = (prepare_with(WHU_OHS, few, tmp_path / str(n), FEW, workers=n) for n in (1, 3))
    assert one.read_bytes() == two.read_bytes()


def test_the_benchmark_reads_it_in_reflectance(few, tmp_path):
    prepare_with(WHU_OHS, few, tmp_path, FEW)
    task = TASK.at(tmp_path)
    for domain, n in zip(task.domains, (8, 4)):
        tiles = SegmentationTiles.from_domain(domain, task)
        assert len(tiles) == n and tiles.sensor is SENSORS["ohs"]
    m = find_tiles(list_members(few))["ts", "image", "T1_0002"]
    with rasterio.open(f"zip://{m.holder}!{m.name}") as source: wrote = source.read()
    item = next(i for i in tiles if i["name"] == "ts_T1_0002")
    np.testing.assert_allclose(item["image"].numpy(), wrote / 1e4, rtol=1e-5)
    m = find_tiles(list_members(few))["ts", "label", "T1_0002"]
    with rasterio.open(f"zip://{m.holder}!{m.name}") as source: ids = source.read(1)
    assert item["label"].tolist() == [[TASK.label_map[int(v)] for v in row] for row in ids]
    assert json.loads((tmp_path / "whu_ohs" / "manifest.json").read_text())["statistics"]["bands"] == list(TASK.bands)
