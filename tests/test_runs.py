"Runs: every record in reports/ is still found, failures are told before or recorded after, work is not lost."
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import development_data

from spectralmoe.benchmarks import BENCHMARKS, benchmark, oracle, shift_laboratory
from spectralmoe.files import only_one
from spectralmoe.reporting.records import read_record, read_records
from spectralmoe.reporting.studies import smaller
from spectralmoe.runs import (PROFILES, Profile, choose_profile, grid_cells, load_data, planned, run_folder, run_grid, run_method, weights_hash)

REPORTS = Path(__file__).resolve().parent.parent / "reports"


def recorded():
    "Records under reports/ whose data the package can make again: simulated tasks and made tiles."
    for path, record in read_records(REPORTS).items():
        made = record.data and all(f.startswith("recipe ") for f in record.data.values()) or record.benchmark == "made_tiles"
        if made and "profile" in record.config: yield path, record # a training run, no measurement


def task_of(record):
    "The task of a record, from its name; the laboratory's factors and severities from its domains."
    name, _, target = record.benchmark.partition("-oracle-")
    name = name.partition("_heights")[0] # the profile says which heights
    if name == "shift_lab":
        steps = [d.rpartition("_") for d in record.data if "_" in d]
        task = shift_laboratory(list(dict.fromkeys(factor for factor, *_ in steps)), steps=max(int(k) for *_, k in steps))
    elif name in BENCHMARKS: task = benchmark(name)
    else: task = smaller(*(int(p) if p.isdigit() else p for p in name.rsplit("_", 1)))
    return oracle(task, target) if target else task


def test_every_record_is_the_record_that_is_planned_for_its_settings(monkeypatch):
    "No change of the code changes what a run is: ids are those of the last release."
    monkeypatch.setattr("spectralmoe.reporting.records.code_state", lambda: {"commit": None, "dirty": None})
    found, weights, other = list(recorded()), {}, 0
    assert len(found) > 200, "reports/ holds hardly any record of a simulated task"
    for path, record in found:
        c = record.config
        p = Profile(**c["profile"])
        overrides = {k: v for k, v in c["adapter"].items() if p.adapter.get(k) != v}
        plan = planned(task_of(record), record.method, record.seed, p, experiment=record.experiment, overrides=overrides, lr=c["lr"],
                       train_tiles=c["train_tiles"])
        for kind, known in c["weights"].items(): weights.setdefault(kind, set()).add(known)
        if plan.config["weights"] != c["weights"]: # a run with an earlier edition of the weights is another run
            other += 1
            plan.config["weights"] = c["weights"]
        assert plan.data == record.data, path
        assert plan.id == record.id, path
        assert plan.started is None
    assert other < 0.1 * len(found)
    for kind, known in weights.items():
        assert weights_hash(kind, json.dumps({"name": f"mini_{kind}"})) in known, f"no record knows the weights of mini_{kind}"


def test_a_laboratory_record_is_found_among_them():
    "The laboratory, oracles and several source sizes are all among what is looked at above."
    names = {r.benchmark for _, r in recorded()}
    assert "shift_lab" in names and any("-oracle-" in n for n in names)
    assert len({r.config["train_tiles"] for _, r in recorded()}) > 1


def test_records_on_real_images_are_found_too():
    "Profile and weights of the package, images of the California burned areas."
    data = development_data("wildfire_ca").parent
    for path, r in read_records(REPORTS / "wildfire_mini").items():
        if r.seed: continue
        plan = planned(r.benchmark, r.method, r.seed, Profile(**r.config["profile"]), data, lr=r.config["lr"], train_tiles=r.config["train_tiles"])
        assert (plan.data, plan.id) == (r.data, r.id), path


def test_looking_up_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRALMOE_CACHE", str(tmp_path / "cache"))
    cells = grid_cells(["fbp_cross_sensor"], ["frozen", "oracle"], [0], profile="mini")
    assert run_grid(cells, tmp_path / "runs", train=False) == []
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()


def test_fields_that_came_later_are_hashed_where_they_differ():
    p = PROFILES["mini_mask2former"]
    assert "head" not in planned("flair", "frozen", 0, p).config["profile"]
    assert planned("flair", "frozen", 0, replace(p, head="pixel_shuffle", head_sizes={})).config["profile"]["head"] == "pixel_shuffle"


def unlabelled(task, name):
    "The task with one more target, which nobody labelled."
    return replace(task, targets=(*task.targets, replace(task.targets[0], name=name, masks=None)))


def test_a_target_without_labels_is_named_and_is_no_part_of_the_run(tmp_path):
    made = load_data("smoke", "made_tiles").benchmark
    task = unlabelled(made, "tomorrow")
    with pytest.warns(UserWarning, match="tomorrow"): record = run_method(task, "raw_conv", 0, "smoke", tmp_path, progress=None)
    assert record.status == "done" and set(record.metrics) == {"source", "target"} and set(record.data) == {"source", "target"}
    again = run_method(made, "raw_conv", 0, "smoke", tmp_path, progress=None)
    assert (again.id, again.started) == (record.id, record.started), "without it, the run that is done is the same run"


def test_what_cannot_be_scored_costs_no_training(tmp_path, monkeypatch):
    import spectralmoe.evaluation
    score = spectralmoe.evaluation.evaluate
    def fail(*args, **kwargs): raise ValueError("no labelled pixel")
    monkeypatch.setattr(spectralmoe.evaluation, "evaluate", fail)
    with pytest.raises(ValueError, match="made_tiles, domain 'source' was not scored: no labelled pixel"):
        run_method("made_tiles", "raw_conv", 0, "smoke", tmp_path, progress=None)
    record, = read_records(tmp_path).values()
    assert record.status == "failed" and (run_folder(record, tmp_path) / "model" / "model.safetensors").exists()
    monkeypatch.setattr(spectralmoe.evaluation, "evaluate", score)
    monkeypatch.setattr("spectralmoe.training.SegmentationTask.training_step", lambda *a: pytest.fail("it was trained again"))
    assert run_method("made_tiles", "raw_conv", 0, "smoke", tmp_path, progress=None).status == "done"


def test_two_processes_do_not_train_the_same_run(tmp_path):
    plan = planned("made_tiles", "raw_conv", 0, "smoke")
    with only_one(tmp_path / "benchmark" / "models", "running made_tiles raw_conv seed 0", name=f"{plan.id}."):
        found = run_grid(grid_cells(["made_tiles"], ["raw_conv"], [0], profile="smoke"), tmp_path, processes=2)
    assert "is in use by process" in found[0].error and str(os.getpid()) in found[0].error
    assert not read_records(tmp_path), "the record of the one that trains is left alone"


@pytest.mark.parametrize("where", ["checkpoint", "everything"])
def test_a_full_disk_is_one_sentence_a_failed_record_and_no_drafts(tmp_path, monkeypatch, where):
    move, begun = os.replace, []
    def full(source, target, **kwargs):
        if where == "checkpoint" and not str(target).endswith(".ckpt") or where == "everything" and not begun:
            if "records" in Path(target).parts and not Path(target).name.startswith("."): begun.append(target)
            return move(source, target, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full: free some space, then run the same again"):
        run_method("made_tiles", "raw_conv", 0, "smoke", tmp_path, progress=None)
    monkeypatch.undo()
    record, = read_records(tmp_path).values()
    assert record.status == "failed" and "disk is full" in record.error
    drafts = [p for p in tmp_path.rglob(".*") if p.is_file() and "lock" not in p.name]
    assert not drafts, drafts
    assert run_method("made_tiles", "raw_conv", 0, "smoke", tmp_path, progress=None).status == "done"


class Deadly(Profile):
    "Ends the process that reads it."
    def __reduce__(self): return os._exit, (3,)


def test_a_grid_goes_on_when_runs_fail_and_repeats_nothing(tmp_path, capsys):
    cells = grid_cells(["made_tiles"], ["frozen", "raw_conv"], [0], profile="smoke")
    cells.insert(1, dict(benchmark="made_tiles", method="frozen", seed=7, profile=Deadly(**vars(PROFILES["smoke"]))))
    cells.append(dict(benchmark="wildfire_cross_region", method="frozen", seed=0, profile="smoke", data=tmp_path))
    found = run_grid(cells, tmp_path, processes=2)
    assert [(r.method, r.seed, r.status) for r in found] == [("frozen", 0, "done"), ("frozen", 7, "failed"), ("raw_conv", 0, "done"), ("frozen", 0, "failed")]
    assert "exit code 3" in found[1].error and "FileNotFoundError" in found[3].error
    said = capsys.readouterr().out
    assert "4/4" in said and "2 of 4 runs failed" in said and "min left" in said
    again = run_grid([cells[0], cells[2]], tmp_path)
    assert [r.started for r in again] == [found[0].started, found[2].started], "neither processes nor their number change a run"


@pytest.mark.parametrize("wrong, message", [
    (dict(processes=0), "processes=0: found 0, expected 1 or more"), (dict(processes=-1), "processes=-1"), (dict(threads=-1), "threads=-1")])
def test_a_grid_refuses_before_anything_starts(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message): run_grid(grid_cells(["made_tiles"], ["raw_conv"], [0], profile="smoke"), tmp_path / "runs", **wrong)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("changes", [dict(lr=float("nan")), dict(lr=float("inf")), dict(lr=-1), dict(steps=-5), dict(crop=-5), dict(crop=1.5),
                                     dict(batch_size=-1), dict(val_fraction=1.0), dict(lr={"frozn": 0.1}), dict(precision="fp16")])
def test_a_profile_refuses_what_no_run_can_use(changes):
    (name, value), = changes.items()
    with pytest.raises(ValueError, match=rf"lrs?=|{name}=") as refused: choose_profile("smoke", **changes)
    assert "expected" in str(refused.value)


@pytest.mark.parametrize("given", [dict(seed=-1), dict(lr=float("nan")), dict(train_tiles=-3), dict(method="frozn")])
def test_a_run_refuses_it_too(tmp_path, given):
    cell = {**dict(benchmark="made_tiles", method="raw_conv", seed=0, profile="smoke"), **given}
    with pytest.raises(ValueError, match="expected"): run_method(**cell, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_oracles_are_cells_of_a_grid():
    cells = grid_cells(["fbp_cross_sensor", "flair"], ["random", "oracle"], [0, 1], profile="mini", experiment="benchmark")
    assert [c["seed"] for c in cells] == [0] * 6 + [1] * 6
    assert {(c["benchmark"].name, c["method"]) for c in cells} == {
        ("fbp_cross_sensor", "random"), ("flair", "random"), ("flair-oracle-other_departments", "frozen"),
        *((f"fbp_cross_sensor-oracle-{t}", "frozen") for t in ("gf1", "planetscope", "sentinel2"))}


def test_runs_that_share_their_data_are_the_same_runs(tmp_path):
    "Data opened once for all seeds, or anew for each: same record, same numbers."
    module = load_data("smoke", "made_tiles")
    for seed in (1, 0):
        shared = run_method("made_tiles", "frozen", seed, "smoke", tmp_path / "shared", module, progress=None)
        alone = run_method("made_tiles", "frozen", seed, "smoke", tmp_path / "alone", progress=None)
        assert shared.id == alone.id and shared.data == alone.data
        assert all(shared.metrics[d]["confusion"] == alone.metrics[d]["confusion"] for d in alone.metrics)


def test_a_run_is_known_by_everything_that_shapes_it(tmp_path):
    smoke, made = PROFILES["smoke"], load_data("smoke", "made_tiles")
    def plan(method="frozen", tiles=6, **kwargs):
        given = {k: kwargs.pop(k) for k in ("overrides", "lr") if k in kwargs}
        return planned("made_tiles", method, 0, replace(smoke, **{"steps": 1, **kwargs}), train_tiles=tiles, **given)
    plans = [plan(), plan(tiles=5), plan(steps=2), plan(lr=3e-3), plan(crop=32), plan("random"), plan("spectralmoe"),
             plan("spectralmoe", overrides={"top_k": 2}), plan(vfm={**smoke.vfm, "seed": 1})]
    assert len({r.id for r in plans}) == len(plans) and plan().id == plans[0].id
    assert plans[0].config["weights"].keys() == {"vfm"} and plans[6].config["weights"].keys() == {"vfm", "dfm"}
    assert plans[0].config["weights"] != plans[8].config["weights"] and plans[5].config["weights"] == {}
    assert plans[1].config["train_tiles"] == 5 and plans[3].config["lr"] == plans[3].config["profile"]["lr"] == 3e-3
    searched = choose_profile("smoke", steps=1, lr={"full": 5e-4, "": smoke.lr})
    assert planned("made_tiles", "frozen", 0, searched, train_tiles=6).id == plans[0].id, "a rate chosen for another method changes nothing here"
    assert planned("made_tiles", "full", 0, searched, made).config["lr"] == 5e-4


def test_a_run_needs_no_notebook_tools(tmp_path):
    "A machine that only trains has neither papermill nor nbformat nor nbdev."
    code = f"""if __name__ == "__main__":
    import sys
    for name in ("papermill", "nbformat", "nbclient", "nbdev", "execnb", "ipykernel", "IPython"): sys.modules[name] = None
    from spectralmoe.runs import run_method
    print(run_method("made_tiles", "spectralmoe", 0, "smoke", {str(tmp_path)!r}, progress=None).status)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ran.stdout.strip().endswith("done"), ran.stderr


def test_mini_profile_has_the_strides_of_the_paper():
    mini = PROFILES["mini_mask2former"]
    assert (mini.vfm, mini.dfm, mini.crop, mini.steps) == ({"name": "mini_vfm"}, {"name": "mini_dfm"}, 128, None)
    assert mini.lr == {"": 3e-3, "full": 1e-3} # as the search on source validation chose
    assert [8 / s for s in mini.head_sizes["scales"]] == [16 / s for s in (4, 2, 1, 0.5)] == [4, 8, 16, 32]


def test_heights_are_read_in_the_place_of_a_depth_model_on_the_task_with_heights():
    p = PROFILES["mini"]
    known, measured = (replace(p, dfm=d) for d in (dict(name="true_heights"), dict(name="height_sensor", noise=1.0, cell=4)))
    plain, true, noisy = (planned("loveda", "spectralmoe", 0, q, overrides=dict(fusion="add")) for q in (p, known, measured))
    assert [r.benchmark for r in (plain, true, noisy)] == ["loveda", "loveda_heights", "loveda_heights_1m_4px"]
    assert len({r.id for r in (plain, true, noisy)}) == 3 and true.data != noisy.data
    assert true.config["weights"]["dfm"] == noisy.config["weights"]["dfm"] # one projection; the data differ


@pytest.mark.parametrize("wrong, about", [(dict(methods="frozen"), "methods='frozen': expected a list"), (dict(seeds=3), "seeds=3: expected a list")])
def test_a_list_that_is_none_is_named(wrong, about):
    with pytest.raises(TypeError, match=about): grid_cells(["loveda"], **{**dict(methods=["frozen"], seeds=[0]), **wrong})
