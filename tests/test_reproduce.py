"Experiments: refused early, stopped openly, recorded always, resumed."
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from spectralmoe.cli import app
from spectralmoe.files import only_one
from spectralmoe.reporting.pages import index_page
from spectralmoe.reporting.records import RunRecord, code_state, finished, read_record, read_records, recording
from spectralmoe.reporting.tables import Cell, pooled_scores, results_table, seed_scores, write_table
from spectralmoe.reproduce import ExperimentFailed, demo, find_experiment, read_parameters, reproduce

PARAMETERS = """steps = 3  # how many = not few
methods = ["frozen"]  # what to train
lr = 1e-4  # learning rate
title = "a # b"  # any text
folder = ""  # where records go"""

TRAIN = """from spectralmoe.reporting.records import RunRecord, finished, recording
for method in methods:
    record = RunRecord("work", "made_tiles", method, 0, config={"steps": steps})
    if finished(record, folder): print(method, "is finished"); continue
    with recording(record, folder):
        if method == "random": raise MemoryError("11 GB wanted")
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
    ({"methods": ["frozn"]}, ValueError, "found 'frozn', expected one of raw_conv"),
    ({"methods": []}, ValueError, "is empty, expected one entry or more"),
    ({"methods": ["full", "full"]}, ValueError, "found 'full', expected every entry once"),
    ({"steps": -5}, ValueError, "steps=-5: found -5, expected 0 or more"),
    ({"lr": float("nan")}, ValueError, "lr=nan: found nan, expected a finite number"),
    ({"lr": float("inf")}, ValueError, "expected a finite number"),
    ({"lr": -1.0}, ValueError, "found -1.0, expected 0 or more"),
])
def test_wrong_parameters_stop_before_any_work(folder, wrong, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")): reproduce("work", wrong, folder)
    assert not folder.exists()


@pytest.mark.parametrize("wrong", [
    {"processes": 0}, {"processes": -1}, {"threads": -1}, {"seeds": []}, {"seeds": [0, 0]}, {"seeds": [-1]}, {"lrs": {"frozn": 0.1}},
    {"lrs": {"full": 0.0}}, {"lrs": {"full": "fast"}}, {"profile": "quick"}, {"benchmark": "flare"}, {"train_tiles": -1}])
def test_the_experiments_of_the_package_know_what_they_can_use(wrong, monkeypatch):
    monkeypatch.delenv("SPECTRALMOE_NOTEBOOKS", raising=False)
    (name, _), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}=") as refused: find_experiment("benchmark").check(wrong)
    assert "expected" in str(refused.value)


def test_every_default_of_an_experiment_can_be_used(monkeypatch):
    monkeypatch.delenv("SPECTRALMOE_NOTEBOOKS", raising=False)
    from spectralmoe.reproduce import experiments
    from spectralmoe.runs import check_setting
    for experiment in experiments().values():
        for p in experiment.parameters.values(): check_setting(p.name, p.default)


@pytest.mark.parametrize("given, message", [
    (["stesp=4"], "steps"), (["lr=NaN"], "expected a finite number"), (["lr=Infinity"], "expected a finite number"), (["steps=-5"], "0 or more"),
    (["methods=[]"], "is empty"), (["steps=010"], "steps='010': is of type str, expected int"), (["steps=12:30"], "is of type str, expected int"),
    (["methods=[frozen"], "neither JSON nor YAML"), (["lr=1", "lr=2"], "lr is given twice"), (["steps"], "not of the form name=value")])
def test_command_line_refuses_without_traceback(folder, given, message):
    words = [w for p in given for w in ("-p", p)]
    result = CliRunner().invoke(app, ["run", "work", *words, "-f", str(folder)])
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and message in said and "Traceback" not in said
    assert not folder.exists()


def test_two_at_once_and_what_the_second_is_told(folder):
    path = reproduce("work", {}, folder, stream=False)
    with only_one(path.parent, "running work", name=f"{path.stem}."):
        result = CliRunner().invoke(app, ["run", "work", "-f", str(folder)])
    assert result.exit_code == 1 and f"process {os.getpid()}" in result.output and "Traceback" not in result.output


def test_kernels_started_together_do_not_share_a_port(folder, tmp_path):
    "Four experiments at once, each a kernel of its own (papermill #511)."
    write_notebook(tmp_path / "notebooks" / "quick.ipynb", "number = 0  # any", "print(number)")
    code = "import sys; from spectralmoe.reproduce import reproduce; reproduce('quick', {'number': int(sys.argv[1])}, sys.argv[2], stream=False)"
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root}
    ran = [subprocess.Popen([sys.executable, "-c", code, str(i), str(folder)], env=env, stderr=subprocess.PIPE, text=True) for i in range(4)]
    said = [p.communicate(timeout=300)[1] for p in ran]
    assert [p.returncode for p in ran] == [0] * 4, said
    assert {printed(p).strip() for p in folder.glob("quick/*.ipynb")} == {"0", "1", "2", "3"}


def full_disk(monkeypatch, what):
    "From now on no file whose name holds `what` can be written."
    write, move = open, os.replace
    def no_space(): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def full_open(path, mode="r", *args, **kwargs):
        if what in str(path) and set(mode) & set("wxa"):
            write(path, mode, *args, **kwargs).close() # a file of no bytes is left, as on a disk that is full
            no_space()
        return write(path, mode, *args, **kwargs)
    monkeypatch.setattr("builtins.open", full_open)
    monkeypatch.setattr(os, "replace", lambda a, b, **k: no_space() if what in str(b) else move(a, b, **k))


def test_a_full_disk_leaves_the_old_page_and_no_half_one(folder, monkeypatch):
    path = reproduce("work", {}, folder, stream=False)
    before = path.read_text(encoding="utf-8")
    full_disk(monkeypatch, path.stem)
    with pytest.raises(ExperimentFailed, match="was not written: the disk is full: free some space, then run the same again"):
        reproduce("work", {}, folder, stream=False)
    result = CliRunner().invoke(app, ["run", "work", "-f", str(folder)])
    assert result.exit_code == 1 and "disk is full" in result.output and "Traceback" not in result.output and len(result.output) < 500
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == before
    assert {p.name for p in path.parent.glob("*") if p.is_file() and "lock" not in p.name} == {path.name, path.with_suffix(".log").name}


def test_run_resume_and_failure(folder, capsys):
    first = reproduce("work", {"methods": ["frozen"], "lr": 1}, folder)
    assert first.parent == folder / "work" and first.stem.startswith("work-")
    assert f"{sys.executable} {folder.parent / 'here'}" in printed(first)  # this interpreter, the caller's directory
    assert "frozen trained 3 1" in printed(first)
    assert "frozen trained" in capsys.readouterr().out and "frozen trained" in first.with_suffix(".log").read_text(encoding="utf-8")

    with pytest.raises(ExperimentFailed, match="cell 5 .* raised MemoryError: 11 GB wanted") as failure:
        reproduce("work", {"methods": ["frozen", "random", "full"]}, folder, stream=False)
    partial = next(p for p in folder.glob("work/*.ipynb") if p != first)
    assert str(partial) in str(failure.value)
    assert "frozen is finished" in printed(partial)  # kept, and not trained twice
    records = {r.method: r for r in read_records(folder).values()}
    assert {m: r.status for m, r in records.items()} == {"frozen": "done", "random": "failed"}
    assert records["random"].error == "MemoryError: 11 GB wanted" and records["random"].seconds is not None
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
    (lambda v: v.pop("status"), "missing status, unexpected nothing"),
    (lambda v: v.update(extra=1), "missing nothing, unexpected extra"),
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


def test_every_number_leads_to_its_records(tmp_path):
    for seed in range(2): run(seed=seed).write(tmp_path)
    table = results_table(read_records(tmp_path), methods=["frozen", "raw_conv"])
    markdown, csv = write_table(table, tmp_path / "work" / "table")
    links = {markdown.parent / part.split(")")[0] for part in markdown.read_text(encoding="utf-8").split("](")[1:]}
    behind = [p for link in links for p in ([link] if link.is_file() else link.glob("*.json"))]
    assert {read_record(p).seed for p in behind} == {0, 1}
    assert csv.read_text(encoding="utf-8").count("not run") == 2  # source and the one target, which needs no mean
    page = index_page(tmp_path, "A & B").read_text(encoding="utf-8")
    assert "A &amp; B" in page and "http" not in page
    hrefs = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert hrefs and all((tmp_path / href).exists() for href in hrefs if not href.startswith("#"))


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
    assert "simulated" not in index_page(tmp_path).read_text(encoding="utf-8")
    record = RunRecord("benchmark", "flair", "frozen", 0, status="done", metrics={"source": counts(90), "south": counts(80)})
    record.write(tmp_path)
    page = index_page(tmp_path, tasks=["flair", "loveda"]).read_text(encoding="utf-8")
    assert "simulated" in page and page.count("<p>Not run.</p>") == 1


def test_the_demo_on_real_images_wants_real_images(folder, tmp_path):
    for name in ("benchmark", "routing"): write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "a = 1  # any")
    with pytest.raises(FileNotFoundError, match="no folder wildfire_ca"): demo(tmp_path, folder)
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path), "--folder", str(folder)])
    assert result.exit_code == 2 and "wildfire_ca" in result.output and not folder.exists()


