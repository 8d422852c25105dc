"Records of every layout are found, also while others are written, and every report is what its plan makes."
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectralmoe.reporting.pages import index_page
from spectralmoe.reporting.plans import kept_state, page_state, read_plan, write_index
from spectralmoe.reporting.records import RunRecord, finished, read_record, read_records

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
PLANS = sorted(ROOT.glob("nbs/experiments/plans/*.json"))


def run(method="frozen", seed=0, **config):
    return RunRecord("regime", "loveda", method, seed, config=config, status="done", metrics={"source": {"miou": 0.5}})


def old_path(record, folder):
    "Where version 0.1 put it."
    return folder / record.experiment / "records" / f"{record.benchmark}-{record.method}-s{record.seed}-{record.id}.json"


@pytest.mark.parametrize("report", sorted(p.name for p in REPORTS.iterdir() if p.is_dir()))
def test_every_kept_record_is_found_where_it_lies(report):
    records = read_records(REPORTS / report)
    assert records and all(r.path(REPORTS / report) == path for path, r in records.items())
    assert all(finished(r, REPORTS / report) == r for r in records.values() if r.status == "done")


def test_a_folder_of_version_0_1_goes_on_in_its_layout_beside_new_records(tmp_path):
    old, new = run(steps=100), run(steps=300)
    old_path(old, tmp_path).parent.mkdir(parents=True)
    old.write(tmp_path).rename(old_path(old, tmp_path))
    (tmp_path / "regime" / "models" / old_path(old, tmp_path).stem).mkdir(parents=True)
    assert finished(run(steps=100), tmp_path).id == old.id and old.write(tmp_path) == old_path(old, tmp_path)
    assert old.run_folder(tmp_path).name == old_path(old, tmp_path).stem
    assert new.write(tmp_path).relative_to(tmp_path).as_posix() == "regime/records/loveda/frozen-s0.json"
    assert {r.config["steps"] for r in read_records(tmp_path).values()} == {100, 300}


def test_settings_written_at_once_do_not_replace_each_other(tmp_path):
    records = [run(steps=n) for n in range(24)]
    with ThreadPoolExecutor(12) as pool: files = list(pool.map(lambda r: r.write(tmp_path), records))
    assert len(set(files)) == len(records) and {r.id for r in read_records(tmp_path).values()} == {r.id for r in records}
    assert [read_record(f).id for f in files] == [r.id for r in records]
    assert sum(f.name == "frozen-s0.json" for f in files) == 1


def test_what_a_killed_process_left_is_no_record(tmp_path):
    path = run().write(tmp_path)
    path.with_name(".frozen-s0.77.json").write_text('{"id": "', encoding="utf-8")
    assert list(read_records(tmp_path)) == [path]


@pytest.mark.parametrize("text, says", [("", r"is empty \(0 bytes\)"), ('{"id": ', "is not JSON"), ("[1]", "holds a list")])
def test_a_damaged_record_is_named_wherever_it_is_met(tmp_path, text, says):
    path = run().write(tmp_path)
    path.write_text(text, encoding="utf-8")
    for meet in (lambda: read_records(tmp_path), lambda: finished(run(), tmp_path), lambda: index_page(tmp_path), lambda: run().write(tmp_path)):
        with pytest.raises(ValueError, match=f"frozen-s0.json {says}.*delete it and run again"): meet()


def test_a_run_of_an_earlier_version_is_shown_but_never_stands_in_for_one_that_is_wanted(tmp_path):
    earlier = run(steps=300)
    earlier.write(tmp_path)
    wanted = run(steps=300, labels="ab", weights={"vfm": "cd"})
    assert finished(wanted, tmp_path) is None and finished(wanted, tmp_path, earlier=True).id == earlier.id
    assert finished(run(steps=100, labels="ab"), tmp_path, earlier=True) is None
    other = RunRecord("regime", "loveda", "frozen", 0, config=wanted.config, data={"source": "other"})
    assert finished(other, tmp_path, earlier=True) is None


def test_what_is_left_out_inside_a_setting_is_a_default_and_not_unrecorded(tmp_path):
    run(adapter={"rank": 8}).write(tmp_path)
    assert finished(run(adapter={"rank": 8, "fusion": "add"}), tmp_path, earlier=True) is None
    assert finished(run(adapter={"rank": 8}, labels="ab"), tmp_path, earlier=True)


BEGUN = [p for p in PLANS if (REPORTS / p.stem).is_dir()]


def test_every_report_has_a_plan_and_every_plan_a_report_unless_its_data_are_not_to_be_had():
    assert {p.stem for p in BEGUN} == {p.name for p in REPORTS.iterdir() if p.is_dir()}
    assert {read_plan(p).profile for p in set(PLANS) - set(BEGUN)} <= {"paper"}


@pytest.mark.parametrize("path", BEGUN, ids=lambda p: p.stem)
def test_every_page_of_a_report_is_what_its_plan_makes(path):
    plan, folder = read_plan(path), REPORTS / path.stem
    assert {f"{folder / p.page}.ipynb" for p in plan.pages} == {str(p) for p in folder.rglob("[!.]*.ipynb") if "unfinished" not in p.name}
    stale = [p.page for p in plan.pages if not p.needs and kept_state(folder / f"{p.page}.ipynb") != page_state(p, folder)]
    assert not stale, f"run `make reports`: {stale}"
    kept = [json.loads((folder / f"{p.page}.ipynb").read_text(encoding="utf-8")) for p in plan.pages]
    assert not [nb for nb in kept if "papermill" in nb["metadata"] or any(set(c["metadata"]) - {"tags"} for c in nb["cells"])]


def test_the_pages_that_lead_to_reports_are_made_from_them(tmp_path):
    plans = sorted(map(read_plan, PLANS), key=lambda plan: (-len(plan.tasks), plan.name))
    for name in {p.stem for p in BEGUN}: (tmp_path / name).symlink_to(REPORTS / name)
    for made in write_index(plans, tmp_path):
        assert made.read_text(encoding="utf-8") == (REPORTS / made.name).read_text(encoding="utf-8"), f"run `make reports`: {made.name}"
    assert not [p for p in REPORTS.rglob("*") if p.suffix in (".tex", ".log")]
