"""The row of two ranks: its arithmetic, what it refuses, and a whole run of seconds."""

import copy
import json
import subprocess
import sys

import pytest

from benchmarks import rank_rows
from benchmarks.row import ResultsDiffer

HISTORY = [
    {"epoch": 1, "iteration": 6, "loss": 2.0, "losses": {"region_share": 1.0}},
    {"epoch": 2, "iteration": 12, "loss": 1.0, "losses": {"region_share": 0.5}},
]


def _write_histories(folder, change):
    other = copy.deepcopy(HISTORY)
    change(other[1])
    for name, rows in (("one", HISTORY), ("two", other)):
        (folder / name / "output").mkdir(parents=True)
        (folder / name / "output" / "history.json").write_text(json.dumps(rows))
    return folder / "one", folder / "two"


def test_the_largest_difference_by_hand(tmp_path):
    runs = _write_histories(tmp_path, lambda row: row["losses"].update(region_share=0.500025))
    assert rank_rows._difference(*runs) == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 1.001}, "loss of epoch 2 is 1.0 on one rank and 1.001 on two"),
        ({"losses": {"region_share": float("nan")}}, "region_share of epoch 2"),
        ({"iteration": 11}, "12 steps and 11"),
    ],
)
def test_trainings_that_differ_are_refused(tmp_path, change, message):
    with pytest.raises(ResultsDiffer, match=message):
        rank_rows._difference(*_write_histories(tmp_path, lambda row: row.update(change)))


def test_epochs_are_what_passes_between_their_ends():
    assert rank_rows._per_epoch([[10.0, 13.0, 17.0], [20.0, 22.0]]) == [3.0, 4.0, 2.0]


def test_children_that_still_run_are_counted():
    script = (
        "import subprocess, sys, time\n"
        "spin = 'import time\\nwhile time.process_time() < 0.4: pass\\nprint(1, flush=True)\\ntime.sleep(30)'\n"
        "child = subprocess.Popen([sys.executable, '-c', spin], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(1, flush=True); sys.stdin.read(); child.kill()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert 0.4 <= rank_rows._used_by_all(process.pid) < 2.0
    finally:
        process.communicate()


@pytest.mark.slow
def test_a_training_that_fails_says_why(tmp_path):
    options = {"demo_dir": tmp_path, "run_dir": tmp_path / "run", "epochs": 1}
    with pytest.raises(RuntimeError, match=r"ended with 1 after 0 of 1 epochs:[\s\S]*CaseManifest"):
        rank_rows._train(1, options)


@pytest.mark.slow
def test_a_whole_run(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = rank_rows.two_ranks(
        num_patients=8, size=(16, 48, 48), spatial_size=(8, 32, 32), num_cases=4, global_batch_size=2, epochs=3,
        rounds=1, options={"hidden_size": 24, "num_layers": 1, "mlp_dim": 32, "num_text_buckets": 64},
    )  # fmt: skip
    assert len(row.figures["ours_s"]) == len(row.figures["peer_s"]) == 2
    assert all(seconds > 0 for seconds in (*row.figures["ours_s"], *row.figures["peer_s"]))
    assert "losses of all 3 epochs" in row.equality
    assert row.verdict == "refused" or row.ratio > 0
