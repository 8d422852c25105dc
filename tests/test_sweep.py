"Reproducing a profile: the runs of a plan are those of its pages, and the paper's plan runs through on small stand-ins."
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectralmoe.archives.prepare import FIXTURES, RECIPES, prepare
from spectralmoe.cli import app
from spectralmoe.reporting.plans import read_plan
from spectralmoe.reporting.records import read_records
from spectralmoe.reporting.sweep import page_cells, plan_sweep, profile_plans
from spectralmoe.runs import planned

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "nbs" / "experiments" / "plans"


def test_every_committed_run_of_the_simulated_tasks_is_one_that_its_plan_makes(monkeypatch):
    "What notebooks run and what a sweep plans cannot drift apart unseen."
    monkeypatch.setattr("spectralmoe.reporting.records.code_state", lambda: {"commit": None, "dirty": None})
    monkeypatch.setattr("spectralmoe.reporting.records.package_versions", dict)
    plan = read_plan(PLANS / "mini.json")
    ids = {}
    for page in plan.pages:
        for cell in page_cells(page):
            if cell["seed"]: continue # settings do not depend on the seed
            record = planned(**cell)
            ids[record.id] = record.config["weights"] = {} # weights of an earlier edition are another run
            ids[record.id] = page.page
    first = [r for r in read_records(ROOT / "reports" / "mini").values() if not r.seed and "profile" in r.config]
    for r in first: r.config["weights"] = {}
    unknown = [r for r in first if r.id not in ids]
    assert len(first) > 100 and not unknown, [(r.experiment, r.benchmark, r.method, r.config["steps"]) for r in unknown[:5]]


def test_the_papers_plan_refuses_and_names_all_that_is_missing(tmp_path, monkeypatch):
    for name in ("SPECTRALMOE_CACHE", "HF_HUB_CACHE", "SPECTRALMOE_RUNS"): monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("SPECTRALMOE_DATA", raising=False)
    result = CliRunner().invoke(app, ["reproduce", "--profile", "paper", "--data", str(tmp_path / "data")])
    assert result.exit_code == 1 and "Traceback" not in result.output
    for recipe in RECIPES.values():
        assert f"spectralmoe data prepare {recipe.name} --from" in result.output and recipe.home in result.output
        for archive in recipe.archives: assert archive in result.output
    for weights in ("dinov3-vitl16", "prompt-depth-anything-vitl"): assert f"spectralmoe weights fetch {weights}" in result.output
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_the_papers_plan_is_of_the_papers_settings():
    plan, = profile_plans()["paper"]
    cells = {p.page: page_cells(p) for p in plan.pages}
    for task in plan.tasks:
        found = cells[f"benchmark/{task}"] + cells[f"benchmark/{task}_authors"]
        assert {c["profile"].vfm["name"] for c in found} == {"dinov3-vitl16"} and {c["profile"].dfm["name"] for c in found} == {"prompt-depth-anything-vitl"}
        task_of = {c["benchmark"].name: c["benchmark"] for c in found}
        assert set(task_of) == {task, f"{task}_authors"} and {(t.batch_size, t.crop, t.lr) for t in task_of.values()} == {(8, 512, 1e-4)}
        assert {t.steps for t in task_of.values()} == {task_of[task].steps} and all(c["profile"].steps is None for c in found)
        few = task in ("real_loveda", "real_openearthmap")
        assert {c["overrides"].get("n_experts", 6) for c in found} == {3 if few else 6}


@pytest.fixture
def stand_ins(tmp_path):
    "The paper's plan with small models whose weights are drawn, and the data set of one task made of its fixture."
    plan = json.loads((PLANS / "paper.json").read_text(encoding="utf-8"))
    for page in plan["pages"]:
        if "profile" in page["parameters"]: page["parameters"]["profile"] = "smoke"
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "paper.json").write_text(json.dumps(plan), encoding="utf-8")
    prepare("loveda", FIXTURES["loveda"](tmp_path / "downloads"), tmp_path / "data", {"tile": 64})
    return ["reproduce", "--profile", "paper", "--plans", str(tmp_path / "plans"), "--data", str(tmp_path / "data"), "-f", str(tmp_path / "reports")]


def test_the_papers_plan_runs_through_on_fixtures_with_tiny_random_weights(stand_ins, tmp_path):
    command = [*stand_ins, "--only", "benchmark/real_loveda,summary/ours_and_the_paper", "--methods", "frozen,spectralmoe", "--seeds", "0"]
    dry = CliRunner().invoke(app, [*command, "--dry"])
    assert dry.exit_code == 0 and "2 runs, 0 of them recorded, 2 to run" in dry.output and not (tmp_path / "reports").exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = tmp_path / "reports" / "paper"
    records = {r.method: r for r in read_records(report).values()}
    assert {m: r.status for m, r in records.items()} == {"frozen": "done", "spectralmoe": "done"}
    scores = (report / "benchmark" / "tables" / "real_loveda-miou.md").read_text(encoding="utf-8")
    assert "| full | not run | not run |" in scores and "| spectralmoe | [" in scores
    summary = (report / "summary" / "tables" / "ours-and-paper.csv").read_text(encoding="utf-8").splitlines()
    row = next(line for line in summary if line.startswith("real_loveda,spectralmoe"))
    assert ",59.11,printed,," in row and "dinov3-vits16 in place of dinov3-vitl16" in row, "stands beside the paper's number, and has no difference"
    assert (report / "index.html").exists() and "paper/index.html" in (tmp_path / "reports" / "README.md").read_text(encoding="utf-8")
    again = plan_sweep("paper", ["benchmark/real_loveda"], ["frozen", "spectralmoe"], [0], tmp_path / "reports", tmp_path / "data", plans=tmp_path / "plans")
    assert not again.parts[0].todo and "2 of them recorded, 0 to run" in str(again)
