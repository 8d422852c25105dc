"Experiments: refused early, stopped openly, recorded always, resumed."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from spectralmoe.cli import app
from spectralmoe.reporting.records import (Cell, RunRecord, code_state, finished, index_page, pooled_scores, read_record, read_records,
                                 recording, results_table, seed_scores, write_table)
from spectralmoe.reproduce import (PROFILES, ExperimentFailed, choose_profile, demo, grid_cells, load_data, read_parameters, reproduce,
                                   run_folder, run_grid, run_method)

PARAMETERS = """steps = 3  # how many = not few
methods = ["frozen"]  # what to train
lr = 1e-4  # learning rate
title = "a # b"  # any text
folder = ""  # where records go"""

TRAIN = """from spectralmoe.reproduce import RunRecord, finished, recording
for method in methods:
    record = RunRecord("work", "made_tiles", method, 0, config={"steps": steps})
    if finished(record, folder): print(method, "is finished"); continue
    with recording(record, folder):
        if method == "bad": raise MemoryError("11 GB wanted")
        record.metrics = {"source": {"miou": 0.5}, "dusk": {"miou": 0.4}}
        print(method, "trained", steps, lr)"""


def write_notebook(path, *code, tags=("parameters",)):
    cells = [nbformat.v4.new_markdown_cell("# Work"), *map(nbformat.v4.new_code_cell, code)]
    cells[1].metadata["tags"] = list(tags)
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Experiments in one folder, an empty one for the runs, and a third to stand in."
    write_notebook(tmp_path / "notebooks" / "work.ipynb", PARAMETERS, "import sys, os\nprint(sys.executable, os.getcwd())", TRAIN)
    monkeypatch.setenv("SPECTRALMOE_NOTEBOOKS", str(tmp_path / "notebooks"))
    monkeypatch.delenv("SPECTRALMOE_RUNS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "runs"


def printed(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


def run(method="frozen", seed=0, miou=0.5, **kwargs):
    return RunRecord("work", "made_tiles", method, seed, **{"config": {"steps": 3}, "metrics": {
        "source": {"miou": miou, "iou": {"water": 0.9}}, "dusk": {"miou": miou - 0.1}}, "status": "done", **kwargs})


@pytest.mark.parametrize("wrong, error, message", [
    ({"step": 3}, KeyError, "has no parameter 'step'. Did you mean 'steps'"),
    ({"zzz": 3}, KeyError, "There are: steps, methods, lr, title, folder"),
    ({"steps": "3"}, TypeError, "steps='3': is of type str, expected int, such as 3"),
    ({"steps": 3.5}, TypeError, "expected int"),
    ({"steps": True}, TypeError, "of type bool"),
    ({"steps": None}, TypeError, "of type NoneType"),
    ({"methods": "frozen"}, TypeError, "expected list, such as"),
    ({"methods": ["frozen", 1]}, TypeError, "entry 1 is of type int"),
])
def test_wrong_parameters_stop_before_any_work(folder, wrong, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")): reproduce("work", wrong, folder)
    assert not folder.exists()


def test_command_line_refuses_without_traceback(folder):
    result = CliRunner().invoke(app, ["run", "work", "-p", "stesp=4", "-f", str(folder)])
    assert result.exit_code == 2 and "steps" in result.output and "Traceback" not in result.output
    assert not folder.exists()


def test_run_resume_and_failure(folder, capsys):
    first = reproduce("work", {"methods": ["frozen"], "lr": 1}, folder)
    assert first.parent == folder / "work" and first.stem.startswith("work-")
    assert f"{sys.executable} {folder.parent / 'here'}" in printed(first)  # this interpreter, the caller's directory
    assert "frozen trained 3 1" in printed(first)
    assert "frozen trained" in capsys.readouterr().out and "frozen trained" in first.with_suffix(".log").read_text(encoding="utf-8")

    with pytest.raises(ExperimentFailed, match="cell 5 .* raised MemoryError: 11 GB wanted") as failure:
        reproduce("work", {"methods": ["frozen", "bad", "full"]}, folder, stream=False)
    partial = next(p for p in folder.glob("work/*.ipynb") if p != first)
    assert str(partial) in str(failure.value)
    assert "frozen is finished" in printed(partial)  # kept, and not trained twice
    records = {r.method: r for r in read_records(folder).values()}
    assert {m: r.status for m, r in records.items()} == {"frozen": "done", "bad": "failed"}
    assert records["bad"].error == "MemoryError: 11 GB wanted" and records["bad"].seconds is not None
    assert not list((folder.parent / "here").iterdir())  # nothing is written anywhere else


def test_record_survives_disk_and_knows_its_run(tmp_path):
    record = run(miou=float("nan"), config={"steps": 3, "sizes": (1, 2)}, parameters={"methods": ["frozen"]})
    path = record.write(tmp_path)
    read = read_record(path)
    assert read.id == record.id and read.metrics["source"]["miou"] is None and read.versions["torch"]
    assert set(read.code) == {"commit", "dirty"} and read.device
    assert len({r.id for r in (run(), run(seed=1), run("full"), run(config={}), run(data={"source": "a"}))}) == 5
    assert run(metrics={}, status="failed").id == run().id
    with pytest.raises(TypeError, match="cannot be written to a record"): run(config={"model": object()}).write(tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change, message", [
    (lambda v: v.pop("status"), r"missing \['status'\]"),
    (lambda v: v.update(extra=1), r"unexpected \['extra'\]"),
    (lambda v: v.update(status="fine"), "status 'fine' is none of"),
    (lambda v: v["config"].update(steps=4), "it was edited"),
])
def test_records_that_were_changed_are_refused(tmp_path, change, message):
    values = json.loads(run().write(tmp_path).read_text(encoding="utf-8"))
    change(values)
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=message): read_record(tmp_path / "a.json")


def test_only_what_is_done_is_finished(tmp_path):
    record = run()
    assert finished(record, tmp_path) is None
    with pytest.raises(KeyboardInterrupt), recording(record, tmp_path):
        assert read_record(record.path(tmp_path)).status == "running"
        raise KeyboardInterrupt
    assert read_record(record.path(tmp_path)).status == "failed" and finished(record, tmp_path) is None
    with recording(run(), tmp_path): pass
    assert finished(record, tmp_path).status == "done"


def test_table_counts_seeds_and_names_what_was_not_run(tmp_path):
    for seed, miou in enumerate((0.5, 0.6, 0.7)): run(seed=seed, miou=miou).write(tmp_path)
    run("full", status="failed", metrics={}).write(tmp_path)
    table = results_table(read_records(tmp_path), methods=["frozen", "full", "released"], targets=["dusk", "dawn"])
    cell = table.loc["frozen", "source validation"]
    assert (round(cell.mean, 6), cell.seeds, len(cell.files)) == (60, 3, 3)
    assert cell.half_width == pytest.approx(4.302653 * 10 / 3**0.5)  # Student t, two degrees of freedom
    assert str(table.loc["frozen", "dusk"]) == "50.0 ± 24.8 (3)"
    assert [str(table.loc["frozen", c]) for c in ("dawn", "all targets")] == ["not run"] * 2
    assert table.loc["full", "dusk"].status == "failed" and table.loc["released", "dusk"] == Cell()
    assert results_table(read_records(tmp_path), "iou.water").loc["frozen", "source validation"].mean == pytest.approx(90)
    with pytest.raises(ValueError, match="two runs of 'frozen' with seed 0"):
        results_table({**read_records(tmp_path), tmp_path: run(config={"steps": 9})})


def test_every_number_opens_its_record(tmp_path):
    for seed in range(2): run(seed=seed).write(tmp_path)
    table = results_table(read_records(tmp_path), methods=["frozen", "raw_conv"])
    markdown, csv, latex = write_table(table, tmp_path / "work" / "table")
    links = [part.split(")")[0] for part in markdown.read_text(encoding="utf-8").split("](")[1:]]
    assert len(links) == 4 and {read_record(markdown.parent / link).seed for link in links} == {0, 1}
    assert csv.read_text(encoding="utf-8").count("not run") == 2  # source and the one target, which needs no mean
    assert r"50.0 $\pm$ 0.0 (2)" in latex.read_text(encoding="utf-8") and r"raw\_conv" in latex.read_text(encoding="utf-8")
    page = index_page(tmp_path, "A & B").read_text(encoding="utf-8")
    assert "A &amp; B" in page and "not run" in page and "http" not in page
    assert all((tmp_path / part.split('"')[0]).is_file() for part in page.split('href="')[1:])


@pytest.mark.parametrize("cell, message", [
    ("steps: int = 3", "is not `name = literal`"), ("steps = 2 + 1 * 4", "is not `name = literal`"), ("import os", "is not `name = literal`"), ("a = b = 1", "is not `name = literal`")])
def test_parameters_cells_hold_bare_literals(tmp_path, cell, message):
    with pytest.raises(ValueError, match=message): read_parameters(write_notebook(tmp_path / "nb" / "a.ipynb", cell))


def test_parameters_are_read_as_python(folder):
    found = read_parameters(folder.parent / "notebooks" / "work.ipynb")
    assert {n: p.default for n, p in found.items()} == {"steps": 3, "methods": ["frozen"], "lr": 1e-4, "title": "a # b", "folder": ""}
    assert found["steps"].help == "how many = not few" and found["title"].help == "any text"
    with pytest.raises(ValueError, match="0 cells are tagged"):
        read_parameters(write_notebook(folder.parent / "none" / "a.ipynb", "a = 1", tags=()))


def test_missing_notebooks_say_how_to_find_them(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTRALMOE_NOTEBOOKS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="SPECTRALMOE_NOTEBOOKS"): reproduce("benchmark")
    with pytest.raises(FileNotFoundError, match="SPECTRALMOE_NOTEBOOKS"): demo(folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_runs_that_share_their_data_are_the_same_runs(tmp_path):
    "Data opened once for all seeds, or anew for each: same record, same numbers."
    module = load_data("smoke", "made_tiles")
    for seed in (1, 0):
        shared = run_method("made_tiles", "frozen", seed, "smoke", tmp_path / "shared", module, progress=None)
        alone = run_method("made_tiles", "frozen", seed, "smoke", tmp_path / "alone", progress=None)
        assert shared.id == alone.id and shared.data == alone.data
        assert all(shared.metrics[d]["confusion"] == alone.metrics[d]["confusion"] for d in alone.metrics)
    with pytest.raises(ValueError, match="of 'made_tiles' and the run is of 'wildfire_cross_region'"):
        run_method("wildfire_cross_region", "frozen", 0, "smoke", tmp_path, module)


def counts(right, wrong=0, n=100):
    "Scores of two classes: so many of n pixels of the first are right, and `wrong` of the second are called the first."
    return pooled_scores([dict(classes=["land", "water"], confusion=[[right, n - right], [wrong, n - wrong]])])


def test_several_targets_have_one_score_and_oracles_one_row():
    far, near = counts(90), counts(2, n=10)
    records = {Path(f"{m}{s}"): RunRecord("benchmark", "coast", m, s, status="done", metrics={"source": counts(99), "far": far, "near": near})
               for m in ("frozen", "spectralmoe") for s in (0, 1)}
    records |= {Path(f"{d}{s}"): RunRecord("benchmark", f"coast-oracle-{d}", "frozen", s, status="done", metrics={"source": counts(97), d: m})
                for d, m in (("near", near), ("far", far)) for s in (0, 1)}
    records |= {Path("no"): RunRecord("benchmark", "coast-oracle-far", "random", 0, status="done", metrics={"far": counts(1)})}
    table, together = results_table(records), pooled_scores([far, near])["miou"]
    assert list(table.index) == ["frozen", "spectralmoe", "oracle"] and list(table.columns) == ["source validation", "far", "near", "all targets"]
    assert together != pytest.approx((far["miou"] + near["miou"]) / 2)
    assert table["all targets"]["frozen"].mean == table["all targets"]["oracle"].mean == pytest.approx(100 * together)
    assert len(table["all targets"]["oracle"].files) == 4 and table["far"]["oracle"].mean == pytest.approx(100 * far["miou"])
    assert str(table.loc["oracle", "source validation"]) == "-"
    del records[Path("near1")]
    assert list(seed_scores(records, "oracle", ["far", "near"])) == [0], "a seed without one of its oracles has no common score"
    with pytest.raises(ValueError, match="two runs of 'frozen' with seed 0"):
        results_table({**records, Path("x"): RunRecord("benchmark", "coast-oracle-far", "frozen", 0, config={"steps": 9})})


def test_a_run_is_known_by_everything_that_shapes_it(tmp_path):
    smoke = PROFILES["smoke"]
    def config(method="frozen", tiles=6, **kwargs):
        given = {k: kwargs.pop(k) for k in ("overrides", "lr") if k in kwargs}
        return run_method("made_tiles", method, 0, replace(smoke, **{"steps": 1, **kwargs}), tmp_path, train_tiles=tiles, progress=None, **given)
    runs = [config(), config(tiles=5), config(steps=2), config(lr=3e-3), config(crop=32), config("random"), config("spectralmoe"),
            config("spectralmoe", overrides={"top_k": 2}), config(vfm={**smoke.vfm, "seed": 1})]
    assert len({r.id for r in runs}) == len(runs) == len(read_records(tmp_path))
    assert runs[0].config["weights"].keys() == {"vfm"} and runs[6].config["weights"].keys() == {"vfm", "dfm"}
    assert runs[0].config["weights"] != runs[8].config["weights"] and runs[5].config["weights"] == {}
    assert runs[1].config["train_tiles"] == 5 and runs[3].config["lr"] == runs[3].config["profile"]["lr"] == 3e-3
    assert config().started == runs[0].started
    searched = choose_profile("smoke", steps=1, lr={"full": 5e-4, "": smoke.lr})
    again = run_method("made_tiles", "frozen", 0, searched, tmp_path, train_tiles=6, progress=None)
    assert again.started == runs[0].started, "a rate chosen for another method changes nothing here"
    assert run_method("made_tiles", "full", 0, searched, tmp_path, progress=None).config["lr"] == 5e-4
    assert not list(run_folder(again, tmp_path).glob("*.ckpt")) and (run_folder(again, tmp_path) / "model").is_dir()


class Deadly:
    "Ends the process that reads it."
    def __reduce__(self): return os._exit, (3,)


def test_a_grid_goes_on_when_runs_fail_and_repeats_nothing(tmp_path, capsys):
    cells = grid_cells(["made_tiles"], ["frozen", "raw_conv", "nonsense"], [0], profile="smoke")
    cells.insert(1, dict(benchmark="made_tiles", method="frozen", seed=7, profile=Deadly()))
    found = run_grid(cells, tmp_path, processes=2)
    assert [(r.method, r.seed, r.status) for r in found] == [("frozen", 0, "done"), ("frozen", 7, "failed"), ("raw_conv", 0, "done"), ("nonsense", 0, "failed")]
    assert "exit code 3" in found[1].error and "KeyError" in found[3].error
    said = capsys.readouterr().out
    assert "4/4" in said and "2 of 4 runs failed" in said and "min left" in said
    again = run_grid([cells[0], cells[2]], tmp_path)
    assert [r.started for r in again] == [found[0].started, found[2].started], "neither processes nor their number change a run"


def test_oracles_are_cells_of_a_grid():
    cells = grid_cells(["fbp_cross_sensor", "flair"], ["random", "oracle"], [0, 1], profile="mini", experiment="benchmark")
    assert [c["seed"] for c in cells] == [0] * 6 + [1] * 6
    assert {(c["benchmark"].name, c["method"]) for c in cells} == {
        ("fbp_cross_sensor", "random"), ("flair", "random"), ("flair-oracle-other_departments", "frozen"),
        *((f"fbp_cross_sensor-oracle-{t}", "frozen") for t in ("gf1", "planetscope", "sentinel2"))}


def test_a_run_needs_no_notebook_tools(tmp_path):
    "A machine that only trains has neither papermill nor nbformat nor nbdev."
    code = f"""if __name__ == "__main__":
    import sys
    for name in ("papermill", "nbformat", "nbclient", "nbdev", "fastcore", "execnb", "ipykernel", "IPython"): sys.modules[name] = None
    from spectralmoe.reproduce import run_method
    print(run_method("made_tiles", "spectralmoe", 0, "smoke", {str(tmp_path)!r}, progress=None).status)"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ran.stdout.strip().endswith("done"), ran.stderr


def test_copied_code_can_be_told_its_commit(tmp_path, monkeypatch):
    import spectralmoe
    (tmp_path / "spectralmoe").mkdir()
    monkeypatch.setattr(spectralmoe, "__file__", str(tmp_path / "spectralmoe" / "__init__.py"))
    monkeypatch.delenv("SPECTRALMOE_COMMIT", raising=False)
    assert code_state() == {"commit": None, "dirty": None}
    monkeypatch.setenv("SPECTRALMOE_COMMIT", "abc")
    assert code_state() == {"commit": "abc", "dirty": None}


def test_page_says_what_mini_means_and_what_was_not_run(tmp_path):
    run().write(tmp_path)
    assert "simulated scenes" not in index_page(tmp_path).read_text(encoding="utf-8")
    record = RunRecord("benchmark", "flair", "frozen", 0, status="done", metrics={"source": counts(90), "south": counts(80)})
    write_table(results_table({record.write(tmp_path): record}), tmp_path / "benchmark" / "tables" / "flair-miou")
    page = index_page(tmp_path, tasks=["flair", "loveda"]).read_text(encoding="utf-8")
    assert "simulated scenes" in page and "loveda-miou</h3><p>not run" in page and "flair-miou</h3><p>not run" not in page


def test_the_demo_on_real_images_wants_real_images(folder, tmp_path):
    for name in ("benchmark", "routing"): write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "a = 1  # any")
    with pytest.raises(FileNotFoundError, match="no folder wildfire_ca"): demo(tmp_path, folder)
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path), "--folder", str(folder)])
    assert result.exit_code == 2 and "wildfire_ca" in result.output and not folder.exists()


def test_mini_profile_has_the_strides_of_the_paper():
    mini = PROFILES["mini"]
    assert (mini.vfm, mini.dfm, mini.crop, mini.steps) == ({"name": "mini_vfm"}, {"name": "mini_dfm"}, 128, None)
    assert mini.lr == {"": 3e-3, "full": 1e-3}  # as the search on source validation chose
    assert [8 / s for s in mini.head_sizes["scales"]] == [16 / s for s in (4, 2, 1, 0.5)] == [4, 8, 16, 32]
