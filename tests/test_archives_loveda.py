"LoveDA, OpenEarthMap, Potsdam and Vaihingen: what their page does not show."
import json
import shutil
import warnings
import zipfile

import pytest
import rasterio

from spectralmoe.archives.recipes import prepare_with, read_manifest, verify_folder
from spectralmoe.benchmarks import benchmark
from spectralmoe.archives.loveda import (CONTINENTS, LOVEDA, OPENEARTHMAP, POTSDAM_AREAS, POTSDAM_VAIHINGEN, VAIHINGEN_TRAIN,
                             VAIHINGEN_VAL, read_regions, write_loveda, write_openearthmap, write_potsdam_vaihingen)

ALL = {"loveda": (LOVEDA, write_loveda), "openearthmap": (OPENEARTHMAP, write_openearthmap),
       "potsdam_vaihingen": (POTSDAM_VAIHINGEN, write_potsdam_vaihingen)}
pytestmark = [pytest.mark.filterwarnings("ignore:OpenEarthMap"),
              pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    "A small archive of every data set, not to be changed."
    root = tmp_path_factory.mktemp("rgb")
    return {name: write(root / name, side=64) for name, (_, write) in ALL.items()}


def made(recipe, source, to, **options):
    manifest = prepare_with(recipe, source, to, {"compress": "none", **options}, workers=1)
    return {d: said for d, said in read_manifest(manifest.parent)["domains"].items()}


def unpack(source, to, nest=False):
    "Every zip into a folder of its own, or of its own inside two others."
    for path in sorted(source.glob("*.zip")):
        with zipfile.ZipFile(path) as z: z.extractall(to / "a" / "b" / path.stem if nest else to / path.stem)
    return to


@pytest.mark.parametrize("name", ALL)
def test_fixture_is_small_repeatable_and_has_every_class(name, tmp_path):
    recipe, write = ALL[name]
    files = {p.name: p.read_bytes() for p in write(tmp_path / "one").iterdir()}
    assert sum(map(len, files.values())) < 2e6
    assert files == {p.name: p.read_bytes() for p in write(tmp_path / "two").iterdir()}
    assert files != {p.name: p.read_bytes() for p in write(tmp_path / "three", seed=1).iterdir()}
    values = set(map(str, benchmark(recipe.task).label_map))
    for domain, said in made(recipe, tmp_path / "one", tmp_path / "to").items(): assert set(said["labels"]) == values, domain


@pytest.mark.parametrize("name", ALL)
def test_number_of_scenes_and_side(name, tmp_path):
    recipe, write = ALL[name]
    count = lambda n: sum(d["scenes"] for d in made(recipe, write(tmp_path / f"in{n}", side=64, scenes=n),
                                                    tmp_path / f"to{n}").values())
    few, more = count(1), count(2)
    assert more == 2 * few
    for bad in (dict(side=63), dict(scenes=0), dict(broken="wings")):
        with pytest.raises(ValueError, match="expected"): write(tmp_path / "bad", **bad)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("nest", (False, True))
def test_extracted_folders_give_the_same(name, nest, archives, tmp_path):
    recipe = ALL[name][0]
    packed = made(recipe, archives[name], tmp_path / "packed")
    assert made(recipe, unpack(archives[name], tmp_path / "in", nest), tmp_path / "unpacked") == packed
    one, two = (read_manifest(tmp_path / k / name)["statistics"] for k in ("packed", "unpacked"))
    assert one == two and one["bands"] == ["red", "green", "blue"]
    assert verify_folder(tmp_path / "unpacked" / name) == 2 * sum(d["tiles"] for d in packed.values())


@pytest.mark.parametrize("name", ALL)
def test_twice_is_once(name, archives, tmp_path):
    recipe = ALL[name][0]
    path = prepare_with(recipe, archives[name], tmp_path, workers=1)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert prepare_with(recipe, archives[name], tmp_path, workers=1) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    with pytest.raises(ValueError, match="prepared or begun otherwise"):
        prepare_with(recipe, archives[name], tmp_path, {"tile": 64})


@pytest.mark.parametrize("name", ALL)
def test_archive_and_what_was_unpacked_are_not_mixed(name, archives, tmp_path):
    both = shutil.copytree(archives[name], tmp_path / "in")
    with pytest.raises(ValueError, match="not both"): made(ALL[name][0], unpack(both, both), tmp_path / "to")


@pytest.mark.parametrize("name, broken, error, message", [
    ("loveda", "truncated", ValueError, "Val.zip.*get it again"),
    ("loveda", "bands", RuntimeError, "4 bands, expected 3"),
    ("loveda", "label", RuntimeError, r"\[\(8, 1\)\]"),
    ("loveda", "missing_mask", FileNotFoundError, "LoveDA Train/Rural: 1 of 1 images have no mask"),
    ("loveda", "name", ValueError, r"1 files fit no pattern \(Train.zip:Train/Rural/images_png/0 \(copy\).png\)"),
    ("loveda", "split", FileNotFoundError, "Val/Rural.*get Val.zip"),
    ("openearthmap", "truncated", ValueError, "OpenEarthMap.zip.*get it again"),
    ("openearthmap", "bands", RuntimeError, "1 bands, expected 3"),
    ("openearthmap", "label", RuntimeError, r"\[\(9, 1\)\]"),
    ("openearthmap", "missing_mask", FileNotFoundError, "images have no mask .accra_1"),
    ("openearthmap", "missing_image", FileNotFoundError, "masks have no image .accra_1"),
    ("openearthmap", "region", ValueError, "atlantis.*expected of the 97.*regions=PATH"),
    ("openearthmap", "name", ValueError, "tonga_9.tif.*expected REGION/images"),
    ("openearthmap", "size", RuntimeError, "expected the same"),
    ("potsdam_vaihingen", "truncated", ValueError, "2_Ortho_RGB.zip.*get it again"),
    ("potsdam_vaihingen", "bands", RuntimeError, "4 bands, expected 3"),
    ("potsdam_vaihingen", "label", RuntimeError, "colours that are in no table"),
    ("potsdam_vaihingen", "missing_mask", FileNotFoundError, "Vaihingen: 1 of 3 .*area1.*eroded_COMPLETE.zip"),
    ("potsdam_vaihingen", "participants", FileNotFoundError, "3 of 3 .*5_Labels_all_noBoundary.zip.*only the part given to participants"),
    ("potsdam_vaihingen", "area", ValueError, "Potsdam: 9_9 is no area"),
])
def test_damage_is_refused(name, broken, error, message, tmp_path):
    recipe, write = ALL[name]
    with pytest.raises(error, match=message): made(recipe, write(tmp_path / "in", side=64, broken=broken), tmp_path / "to")
    assert not (tmp_path / "to" / name / "manifest.json").exists()


@pytest.mark.parametrize("name, broken, skip", [("loveda", "missing_mask", "train_0"), ("loveda", "label", "train_0"),
    ("openearthmap", "size", "accra_1"), ("potsdam_vaihingen", "missing_mask", "area1"), ("potsdam_vaihingen", "bands", "2_10,2_13,7_10")])
def test_what_is_damaged_can_be_skipped(name, broken, skip, tmp_path):
    recipe, write = ALL[name]
    source = write(tmp_path / "in", side=64, broken=broken)
    if skip.count(","):  # nothing is left of the source
        with pytest.raises(FileNotFoundError, match="nothing was found for potsdam"):
            made(recipe, source, tmp_path / "to", skip=skip)
    else: assert sum(d["scenes"] for d in made(recipe, source, tmp_path / "to", skip=skip).values()) == {"loveda": 3, "openearthmap": 6}.get(name, 5)


def test_recipes_fit_their_benchmarks():
    for name, (recipe, _) in ALL.items():
        task = benchmark(recipe.task)
        assert recipe.name == name and recipe.task == f"real_{name}"
        assert set(recipe.expected) == {d.name for d in task.domains}
        assert any("UNCONFIRMED" in o.help for o in recipe.options.values())
    assert len(set(POTSDAM_AREAS)) == 38 and len({*VAIHINGEN_TRAIN, *VAIHINGEN_VAL}) == 33
    assert POTSDAM_VAIHINGEN.expected["potsdam"] == 38 * 12 * 12 and LOVEDA.expected == {"rural": 4 * 2358, "urban": 4 * 1833}


# LoveDA

def test_loveda_splits(archives, tmp_path):
    some = made(LOVEDA, archives["loveda"], tmp_path, source_splits="train", target_splits="val")
    assert {d: s["scenes"] for d, s in some.items()} == {"rural": 1, "urban": 1}
    assert {p.name for p in (tmp_path / "loveda").glob("*/images/*")} == {"train_0.tif", "val_3514.tif"}
    assert made(LOVEDA, archives["loveda"], tmp_path / "twice", source_splits="train,train", target_splits="val") == some
    for options, message in ((dict(source_splits="test"), "expected of train, val"), (dict(source_splits=""), "source_splits is empty")):
        with pytest.raises(ValueError, match=message): made(LOVEDA, archives["loveda"], tmp_path / "to", **options)


def test_loveda_train_alone_is_enough_where_nothing_else_is_asked_for(archives, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(archives["loveda"] / "Train.zip", tmp_path / "in")
    assert made(LOVEDA, tmp_path / "in", tmp_path, source_splits="train", target_splits="train")["urban"]["scenes"] == 1
    with pytest.raises(FileNotFoundError, match="target_splits is train,val; get Val.zip"):
        made(LOVEDA, tmp_path / "in", tmp_path / "to", source_splits="train")


def test_loveda_masks_without_images(archives, tmp_path):
    source = unpack(archives["loveda"], tmp_path / "in")
    (source / "Train/Train/Urban/images_png/1366.png").rename(source / "Train/Train/Urban/images_png/7.png")
    with pytest.raises(FileNotFoundError, match="1 of 1 masks have no image .train_1366"):
        made(LOVEDA, source, tmp_path / "to")


def test_strays_are_no_pictures(archives, tmp_path):
    source = unpack(archives["loveda"], tmp_path / "in")
    for name in ("Thumbs.db", "readme.txt"): (source / "Train/Train/Urban/images_png" / name).write_text("stray")
    assert made(LOVEDA, source, tmp_path / "to")["urban"]["scenes"] == 2


# OpenEarthMap

def test_regions_table():
    table = read_regions()
    assert list(table.index) == sorted(table.index) and set(table.continent) == set(CONTINENTS)
    assert (len(table), table.images.astype(int).sum(), table.note.str.startswith("xBD").sum()) == (97, 3500, 22)
    assert {r for r in table.index if "UNCONFIRMED" in table.note[r]} == {"western", "svaneti", "leilane_estates"}


def test_own_regions(archives, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text("region,continent\n" + "".join(f"{r},{'here' if r < 'b' else 'there'}\n" for r in
                   ("accra", "al_qurnah", "austin", "buenos_aires", "khartoum", "kujawsko-pomorskie", "tonga")), encoding="utf-8")
    got = made(OPENEARTHMAP, archives["openearthmap"], tmp_path / "to", regions=str(own), target_continents="there")
    assert {d: s["scenes"] for d, s in got.items()} == {"source_continents": 3, "target_continents": 4}
    with pytest.raises(ValueError, match="Africa, Europe not known; expected of here, there"):
        made(OPENEARTHMAP, archives["openearthmap"], tmp_path / "no", regions=str(own))
    for text, message in (("region,continent\naccra,Africa\naccra,Asia\n", "accra stand there twice"), ("place,continent\nx,y\n", "no column region")):
        own.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message): read_regions(own)
    with pytest.raises(FileNotFoundError, match="no such file"): read_regions(tmp_path / "none.csv")


@pytest.mark.parametrize("continents, scenes", [("Africa", (5, 2)), ("Asia,Oceania", (5, 2)), (["South America"], (6, 1))])
def test_continents(continents, scenes, archives, tmp_path):
    got = made(OPENEARTHMAP, archives["openearthmap"], tmp_path, target_continents=continents)
    assert tuple(s["scenes"] for s in got.values()) == scenes


def test_wrong_continents(archives, tmp_path):
    for value, message in (("Atlantis", "Atlantis not known"), ("", "is empty"), (list(CONTINENTS), "no continent for the source")):
        with pytest.raises(ValueError, match=message): made(OPENEARTHMAP, archives["openearthmap"], tmp_path, target_continents=value)


@pytest.mark.filterwarnings("default:OpenEarthMap")
def test_xbd_labels_are_counted_and_come_in_with_their_images(archives, tmp_path):
    with pytest.warns(UserWarning, match="1 labels in 1 regions are left out"):
        before = made(OPENEARTHMAP, archives["openearthmap"], tmp_path / "a")
    source = unpack(archives["openearthmap"], tmp_path / "in")
    top = source / "OpenEarthMap/OpenEarthMap/OpenEarthMap_wo_xBD"
    (top / "les_cayes/images").mkdir()
    shutil.copy(top / "tonga/images/tonga_1.tif", top / "les_cayes/images/les_cayes_7.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        after = made(OPENEARTHMAP, source, tmp_path / "b")
    assert after["source_continents"]["scenes"] == before["source_continents"]["scenes"] + 1
    (top / "xbd_files.csv").unlink()
    (top / "les_cayes/images/les_cayes_7.tif").unlink()
    with pytest.raises(FileNotFoundError, match="no image .les_cayes_7"): made(OPENEARTHMAP, source, tmp_path / "c")


def test_test_images_are_excused_by_the_list_alone(archives, tmp_path):
    source = unpack(archives["openearthmap"], tmp_path / "in")
    made(OPENEARTHMAP, source, tmp_path / "with")
    assert not list((tmp_path / "with").rglob("images/*_2.tif"))
    next(source.rglob("test.txt")).unlink()
    with pytest.raises(FileNotFoundError, match="4 of 8 images have no mask .al_qurnah_2, austin_2"):
        made(OPENEARTHMAP, source, tmp_path / "to")


def test_pictures_of_odd_sizes(tmp_path):
    source = write_openearthmap(tmp_path / "in", side=150)
    got = made(OPENEARTHMAP, source, tmp_path, tile=100)
    assert got["target_continents"]["tiles"] == 4 + 1 + 4  # khartoum is 93 pixels wide


# Potsdam and Vaihingen

def test_full_labels_have_no_border(archives, tmp_path):
    full = made(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path / "full", labels="full")
    eroded = made(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path / "eroded")
    for city in full:
        assert full[city]["off_palette"] == full[city]["labels"]["0"] == 4 * 3
        assert eroded[city]["off_palette"] == 0 and eroded[city]["labels"]["0"] > 100
    ids = {}
    for kind in ("full", "eroded"):
        with rasterio.open(tmp_path / kind / "potsdam_vaihingen/potsdam/masks/2_10.tif") as mask: ids[kind] = mask.read()
    both = (ids["full"] > 0) & (ids["eroded"] > 0)
    assert both.any() and (ids["full"] == ids["eroded"])[both].all()


@pytest.mark.parametrize("target, areas", [("all", {"area1", "area2", "area3"}), ("val", {"area2"})])
def test_target_areas(target, areas, archives, tmp_path):
    made(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path, target_areas=target)
    assert {p.stem for p in (tmp_path / "potsdam_vaihingen/vaihingen/images").iterdir()} == areas


def test_labels_of_each_kind_can_be_missing(archives, tmp_path):
    source = shutil.copytree(archives["potsdam_vaihingen"], tmp_path / "in")
    (source / "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE.zip").unlink()
    with pytest.raises(FileNotFoundError, match="Vaihingen: 3 of 3 .*labels=eroded.*eroded_COMPLETE.zip, or choose the other"):
        made(POTSDAM_VAIHINGEN, source, tmp_path / "to")
    assert made(POTSDAM_VAIHINGEN, source, tmp_path / "to", labels="full")["vaihingen"]["scenes"] == 3
    (source / "2_Ortho_RGB.zip").unlink()
    with pytest.raises(FileNotFoundError, match="Potsdam: no image .only RGBIR, label, mask.; get 2_Ortho_RGB.zip"):
        made(POTSDAM_VAIHINGEN, source, tmp_path / "no")


def test_labels_inside_a_folder_of_their_archive(archives, tmp_path):
    source = shutil.copytree(archives["potsdam_vaihingen"], tmp_path / "in")
    path = source / "5_Labels_all_noBoundary.zip"
    with zipfile.ZipFile(path) as z: inside = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, data in inside.items(): z.writestr(f"5_Labels_all_noBoundary/{name}", data)
    assert made(POTSDAM_VAIHINGEN, source, tmp_path / "a") == made(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path / "b")


def test_a_renamed_image_is_named(archives, tmp_path):
    source = unpack(archives["potsdam_vaihingen"], tmp_path / "in")
    path = next(source.rglob("top_potsdam_7_10_RGB.tif"))
    path.rename(path.with_name("top_potsdam_07_10_rgb.tif"))
    with pytest.raises(ValueError, match="top_potsdam_07_10_rgb.tif.*expected top_potsdam_2_10_RGB.tif"):
        made(POTSDAM_VAIHINGEN, source, tmp_path / "to")


def test_vaihingen_is_fed_near_infrared_first(archives, tmp_path):
    from spectralmoe.datasets import SegmentationTiles
    made(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path)
    for protocol, order in (("default", [0, 1, 2]), ("released", [2, 1, 0])):
        task = benchmark("real_potsdam_vaihingen", protocol).at(tmp_path)
        tiles = SegmentationTiles.from_domain(task.targets[0], task, role="target")
        with zipfile.ZipFile(archives["potsdam_vaihingen"] / "ISPRS_semantic_labeling_Vaihingen.zip") as z:
            data = z.read("top/top_mosaic_09cm_area1.tif")
        with rasterio.MemoryFile(data) as memory, memory.open() as source: stored = source.read()
        assert (tiles[0]["image"].numpy() == stored[order]).all()


def test_manifest_is_plain_json(archives, tmp_path):
    path = prepare_with(POTSDAM_VAIHINGEN, archives["potsdam_vaihingen"], tmp_path, {"skip": "7_10"}, workers=1)
    said = json.loads(path.read_text(encoding="utf-8"))
    assert said["plan"]["options"]["skip"] == ["7_10"] and said["domains"]["potsdam"]["scenes"] == 2
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_tiles_may_lie_beside_the_archives(name, archives, tmp_path):
    recipe, source = ALL[name][0], unpack(archives[name], tmp_path)
    assert made(recipe, source, tmp_path) == made(recipe, source, tmp_path)
