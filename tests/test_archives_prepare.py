"Each of the seven: archive as distributed -> tiles -> checked -> a batch -> an epoch in the benchmark notebook."
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from conftest import run_cells

from spectralmoe.archives import prepare as pp
from spectralmoe.benchmarks import IGNORE, benchmark
from spectralmoe.datasets import DomainDataModule
from spectralmoe.reading.manifest import read_manifest
from spectralmoe.reporting.records import read_records

pytestmark = pytest.mark.filterwarnings("ignore:.*(published|part of xBD):spectralmoe.archives.recipes.PrepareWarning")
OPTIONS = {"fbp_cross_region": lambda archives: {"targets": sorted(archives.rglob("*_24label.png"))[0].stem.removesuffix("_24label")}}


@pytest.fixture(scope="module", params=list(pp.RECIPES))
def ready(request, tmp_path_factory):
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    archives = pp.FIXTURES[name](root / "downloads")
    pp.prepare(name, archives, root / "data", OPTIONS.get(name, lambda a: {})(archives))
    return name, root / "data"


def test_every_file_is_as_the_manifest_says(ready):
    name, data = ready
    tiles = sum(d["tiles"] for d in read_manifest(data / name)["domains"].values())
    assert pp.verify(name, data) == 2 * tiles > 0


def test_a_batch_has_shape_type_wavelengths_and_labels(ready):
    name, data = ready
    module = DomainDataModule(f"real_{name}", data, batch_size=2, crop=32)
    task = module.benchmark
    for part in (module.train_dataloader(), *module.target_dataloaders().values()):
        batch = next(iter(part))
        b = len(batch["image"])
        assert batch["image"].shape == (b, len(task.bands), 32, 32) and batch["image"].dtype == torch.float32
        assert batch["label"].shape == (b, 32, 32) and batch["label"].dtype == torch.int64
        assert batch["image"].isfinite().all() and set(batch["label"].unique().tolist()) <= {*range(task.n_classes), IGNORE}
    assert len(task.input_sensor.wavelengths) == len(task.bands) and all(.4 < w < 1 for w in task.input_sensor.wavelengths)
    seen = set(torch.cat([t["label"].flatten() for t in module.source]).unique().tolist()) - {IGNORE}
    assert seen == set(range(task.n_classes))  # the fixtures hold every class


def test_bands_are_those_of_the_files_by_name_and_targets_have_their_own_sensor(ready):
    name, data = ready
    module = DomainDataModule(f"real_{name}", data, batch_size=2, crop=32)
    for tiles in (module.source, *module.targets.values()):
        with rasterio.open(tiles.files[0].image) as file:
            held = [tiles.sensor.bands[tiles.sensor.index(d)] for d in file.descriptions]
            values = file.read().astype("float32")
        raw = tiles.standardised(None)[0]["image"].numpy()
        for k, band in enumerate(module.benchmark.bands):
            i = held.index(tiles.sensor.bands[tiles.sensor.index(band)])
            np.testing.assert_allclose(raw[k], values[i] * held[i].scale + held[i].offset, rtol=1e-6)


def test_statistics_and_checks_come_from_the_manifest_and_scenes_are_held_out_whole(ready):
    name, data = ready
    module = DomainDataModule(f"real_{name}", data, batch_size=2, crop=32)
    said = read_manifest(data / name)
    assert list(module.statistics.mean) == said["statistics"]["mean"]
    assert not {f.scene for f in module.source_train.files} & {f.scene for f in module.source_val.files}
    assert all(said["domains"][d]["index"] in f for d, f in module.fingerprints.items())
    counted = {d: tiles.label_counts().pixels.sum() for d, tiles in {module.benchmark.source.name: module.source, **module.targets}.items()}
    assert {d: t.pixels.sum() for d, t in module.check().labels.items()} == counted


def test_authors_protocol_reads_the_same_tiles_in_its_own_way(ready):
    name, data = ready
    task = benchmark(f"real_{name}", "authors")
    ours, theirs = DomainDataModule(f"real_{name}", data, batch_size=2, crop=32), DomainDataModule(task, data, batch_size=2, crop=32)
    assert theirs.fingerprints == ours.fingerprints and theirs.statistics.mean == tuple(task.statistics["mean"])
    if task.bands[0] == "blue":  # blue first, standardised with the mean of red
        plain, bgr = ours.source.standardised(None)[0]["image"], theirs.source.standardised(theirs.statistics)[0]["image"]
        torch.testing.assert_close(bgr[0], (plain[2] - 123.675 if name != "openearthmap" else plain[2] - 118.246) / task.statistics["std"][0])


def test_an_epoch_in_the_benchmark_notebook(ready, tmp_path):
    name, data = ready
    module = DomainDataModule(f"real_{name}", data, batch_size=2, crop=48)
    steps = -(-len(module.source_train) // 2)
    run_cells("benchmark", dict(benchmark=f"real_{name}", data=str(data), methods=["spectralmoe"], steps=steps), tmp_path)
    (record,) = read_records(tmp_path).values()
    assert record.status == "done" and record.config["steps"] == steps
    assert set(record.metrics) == {"source", *(t.name for t in module.benchmark.targets)}
    assert record.data == module.fingerprints


def test_label_values_of_recipe_and_benchmark_agree(ready):
    name, data = ready
    task = benchmark(f"real_{name}")
    for d, said in read_manifest(data / name)["domains"].items(): assert {int(v) for v in said["labels"]} <= set(task.label_map), d


def test_a_merge_of_your_own_reaches_the_labels(tmp_path):
    merge, usual = tmp_path / "merge.csv", benchmark("real_whu_ohs").label_map
    merge.write_text("id,merged\n" + "\n".join(f"{i},{4 if i == 21 else usual[i] + 1}" for i in range(1, 25)))  # marsh is water
    archives = pp.FIXTURES["whu_ohs"](tmp_path / "downloads")
    manifest = pp.prepare("whu_ohs", archives, tmp_path / "data", {"merge": merge})
    said = json.loads(manifest.read_text())["label_map"]
    module = DomainDataModule("real_whu_ohs", tmp_path / "data", batch_size=2, crop=32)
    assert module.benchmark.label_map == {int(k): v for k, v in said.items()} == {**usual, 21: 3}


def test_an_unprepared_task_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("spectralmoe data prepare loveda")): DomainDataModule("real_loveda", tmp_path)


def test_a_benchmark_of_ones_own_on_prepared_tiles_is_not_given_the_manifests_labels(ready):
    name, data = ready
    task = benchmark(f"real_{name}")
    two = {v: (c if c == IGNORE else min(c, 1)) for v, c in task.label_map.items()}
    mine = replace(task, name="mine", classes=("a", "b"), palette=((0, 0, 0), (1, 1, 1)), label_map=two, authors={})
    assert DomainDataModule(mine, data, batch_size=2, crop=32).benchmark.label_map == two
