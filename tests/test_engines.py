"Engines: a lost worker costs a retry and no number; a driver that dies is started again and does the rest."
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import die_once

from spectralmoe import engines
from spectralmoe.reporting.pages import index_page
from spectralmoe.reporting.records import read_records
from spectralmoe.reporting.tables import results_table, write_table
from spectralmoe.runs import PROFILES, grid_cells, planned, run_grid

HERE = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)] # the package and this file, for other processes
TIMES = {"started", "finished", "seconds", "peak_memory", "images_per_second", "code"} # and the commit, which may change while tests run


def without_times(value):
    "A record, or a part of one, without what no two runs share."
    if isinstance(value, dict): return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def left_behind(folder):
    "Everything that a report is made of and made into: records, tables and page, apart from times."
    records = read_records(folder)
    found = {p.relative_to(folder): json.dumps(without_times(json.loads(p.read_text()))) for p in records}
    for file in write_table(results_table(records), folder / "benchmark" / "tables" / "made_tiles-miou"): found[file.relative_to(folder)] = file.read_bytes()
    page = index_page(folder, "Runs").read_text(encoding="utf-8")
    assert (times := re.findall(r"<td>\d+ s</td>", page)) and len(times) == len(records)
    page = re.sub(r"<td>[0-9a-f]{10}</td></tr>", "</tr>", page)
    return found | {"page": re.sub(r"<td>\d+ s</td>", "<td>so long</td>", page)}


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)
    return found


def at_work(folder):
    "Run -> process, of those that are being trained."
    notes = {}
    for note in Path(folder).glob("benchmark/models/.*lock.json"):
        try: notes[note.name] = json.loads(note.read_text())["pid"]
        except (OSError, ValueError): pass # gone, or just being written
    return notes


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


CELLS = grid_cells(["made_tiles"], ["frozen", "raw_conv"], [0], profile=replace(PROFILES["smoke"], steps=40)) # long enough to be killed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Folder of the same runs, one after the other in this process."
    folder = tmp_path_factory.mktemp("alone")
    assert [r.status for r in run_grid(CELLS, folder, threads=1)] == ["done", "done"]
    return folder


def test_a_node_that_is_lost_changes_no_report(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300") # a busy machine is no failure
    monkeypatch.setenv("RAY_worker_niceness", "0") # tests that run beside this one would starve its workers
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'spectralmoe[cluster]'")
    import threading
    import ray
    from ray.cluster_utils import Cluster
    size = dict(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
    cluster, outcome = Cluster(initialize_head=True, head_node_args=size), {}
    try:
        node = cluster.add_node(num_cpus=1, object_store_memory=size["object_store_memory"])
        engine = engines.Ray(cluster.address)
        sweep = threading.Thread(target=lambda: outcome.update(records=run_grid(CELLS, tmp_path, engine=engine)))
        sweep.start()
        began = wait_for(lambda: len(at := at_work(tmp_path)) == 2 and at) # one on each node
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: not all(map(alive, began.values())))
        sweep.join(600)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert [r.status for r in outcome["records"]] == ["done", "done"], outcome
    assert left_behind(tmp_path) == left_behind(alone)


def test_a_job_of_submitit_leaves_the_same_record(tmp_path, alone):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'spectralmoe[cluster]'")
    record, = run_grid(CELLS[1:], tmp_path, engine=engines.Slurm("local", cpus=1))
    there = json.loads(record.path(alone).read_text())
    assert record.status == "done" and without_times(json.loads(record.path(tmp_path).read_text())) == without_times(there)
    assert record.started != there["started"]


def test_a_job_that_is_lost_is_sent_again(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'spectralmoe[cluster]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(HERE))
    assert list(engines.Slurm("local")(die_once, [tmp_path / "a"], tmp_path / "jobs")) == [(0, "a")]
    (_, lost), = engines.Slurm("local", max_retries=0)(die_once, [tmp_path / "b"], tmp_path / "jobs")
    assert isinstance(lost, engines.Lost) and lost.why


def test_a_driver_that_dies_is_started_again_and_does_the_rest(tmp_path):
    code = "import sys; from test_engines import CELLS, run_grid; run_grid(CELLS, sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(HERE)}
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    second = planned(**CELLS[1])
    try: wait_for(lambda: second.path(tmp_path).exists())
    finally: driver.kill()
    driver.wait()
    before = {r.method: r for r in read_records(tmp_path).values()}
    assert {m: r.status for m, r in before.items()} == {"frozen": "done", "raw_conv": "running"}
    after = run_grid(CELLS, tmp_path)
    assert [r.status for r in after] == ["done", "done"]
    assert (after[0].started, after[0].finished) == (before["frozen"].started, before["frozen"].finished), "what was done is not done again"
