"""Preparation on a local Dask cluster: the pool's bytes, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import vlm3d_ext
from data_prep import case_preparation, dask_cluster, preparation_run
from data_prep.dask_cluster import ClusterError, ClusterLost, run_on_cluster
from data_prep.prepare import main
from data_prep.worker_pool import WorkerDied
from tests.data_prep.test_worker_pool import die_at_first, threads_of_blas
from tests.data_prep.tiny_release import SIZE, TinyRelease, folder_bytes

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")

ROOT = Path(__file__).parents[2]
NUM_CASES = 8


@contextmanager
def started(folder, num_workers=2, nanny=False, **environment):
    """A scheduler and workers; yields the path of the scheduler's file and the scheduler's process."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "scheduler.json"
    environment = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical", **environment}

    def start(program, *arguments):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--scheduler-file", str(file)]
        return subprocess.Popen(
            [*command, "--no-dashboard", *arguments], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )

    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0")]
    while not file.exists():
        time.sleep(0.02)
    how = "--nanny" if nanny else "--no-nanny"
    place = ("--local-directory", str(folder))
    processes += [start("worker", "--nthreads", "1", how, *place) for _ in range(num_workers)]
    try:
        yield str(file), processes[0]
    finally:
        for process in processes[::-1]:
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("cluster")) as (file, _):
        yield file


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, NUM_CASES + 1):
        release.add(f"train_{number}_a_1", positive=("Lung nodule",), seed=number)
    release.write_tables()
    return release.root


def prepare(source, output, *more):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", "0", *more])


@pytest.fixture
def whole(release, tmp_path):
    assert prepare(release, tmp_path / "whole") == 0
    return folder_bytes(tmp_path / "whole")


def test_the_clusters_bytes_are_the_pools(release, whole, cluster, tmp_path):
    (release / "train_fixed" / "train_3" / "train_3_a" / "train_3_a_1.nii.gz").write_bytes(b"no volume")

    assert prepare(release, tmp_path / "pool") == 3
    assert prepare(release, tmp_path / "out", "--dask-scheduler", cluster) == 3

    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "pool") != whole


def doubled(number):
    if number == 3:
        raise ValueError("no good")
    return 2 * number


def test_results_and_errors_come_back_and_few_tasks_are_in_flight(cluster, tmp_path, monkeypatch):
    most = []
    begin = dask_cluster._Flight.begin
    monkeypatch.setattr(
        dask_cluster._Flight, "begin", lambda flight, index: (begin(flight, index), most.append(len(flight.futures)))
    )

    results = dict(run_on_cluster(doubled, range(40), cluster, tmp_path))

    assert isinstance(results.pop(3), ValueError)
    assert results == {number: 2 * number for number in range(40) if number != 3}
    assert max(most) <= 4, "two workers of one thread"
    assert list(run_on_cluster(doubled, [], "tcp://nowhere", tmp_path)) == []
    (_, threads), *_ = run_on_cluster(threads_of_blas, [None], cluster, tmp_path)
    assert threads and set(threads) == {1}


def die_at_case_3(task):
    if task.case.volume_id == "train_3_a_1" and not (task.output / "died").exists():
        (task.output / "died").write_bytes(b"")
        (task.output / "volumes").mkdir(exist_ok=True)
        (task.output / "volumes" / ".train_3_a_1.npz.x.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return case_preparation.prepare_case(task)


def test_a_killed_worker_costs_nothing(release, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation_run, "prepare_case", die_at_case_3)
    with started(tmp_path / "cluster") as (file, _):
        assert prepare(release, tmp_path / "out", "--dask-scheduler", file) == 0

    (tmp_path / "out" / "died").unlink()
    assert folder_bytes(tmp_path / "out") == whole
    assert prepare(release, tmp_path / "pool", "--workers", "2") == 0
    (tmp_path / "pool" / "died").unlink()
    assert folder_bytes(tmp_path / "pool") == whole


def die(task):
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_task_that_kills_every_worker_is_given_up(tmp_path):
    with started(tmp_path, nanny=True, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as (file, _):
        results = dict(run_on_cluster(die, [*"abc", "die", *"de"], file, tmp_path, num_retries=1))
        died = results.pop(3)
        assert isinstance(died, WorkerDied) and str(died) == "its Dask worker, 2 times"
        # With no second chance from the scheduler, a task beside the killer may be blamed as often, but not for long.
        assert {index: value for index, value in results.items() if not isinstance(value, WorkerDied)}
        assert dict(run_on_cluster(die_at_first, [tmp_path / "once"], file, tmp_path, num_retries=1)) == {0: "once"}


def slowly(task):
    time.sleep(0.4)
    return case_preparation.prepare_case(task)


def test_a_lost_scheduler_ends_the_run_and_what_is_done_stays(release, whole, tmp_path, monkeypatch, capsys):
    with started(tmp_path / "cluster") as (file, scheduler):

        def kill_after_three():
            while len(list((tmp_path / "out" / "volumes").glob("*.json"))) < 3:
                time.sleep(0.02)
            scheduler.kill()

        killer = threading.Thread(target=kill_after_three)
        killer.start()
        with monkeypatch.context() as patch:
            patch.setattr(preparation_run, "prepare_case", slowly)
            assert prepare(release, tmp_path / "out", "--dask-scheduler", file) == 2
        killer.join()

    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: the scheduler at {file} was lost; ")
    assert f" of {NUM_CASES} cases are done and kept; start the same command again" in message
    kept = set(folder_bytes(tmp_path / "out" / "volumes"))
    assert 3 <= sum(name.endswith(".json") for name in kept) < NUM_CASES
    assert not (tmp_path / "out" / "manifest.json").exists()

    assert prepare(release, tmp_path / "out") == 0
    assert folder_bytes(tmp_path / "out") == whole


def test_a_cluster_without_workers(tmp_path, monkeypatch):
    with started(tmp_path, num_workers=0) as (file, _):
        monkeypatch.setattr(dask_cluster, "_FIRST_WORKER_S", 0.5)
        with pytest.raises(ClusterError, match=r"has no worker after 0.5 s.*dask worker"):
            list(run_on_cluster(doubled, [1], file, tmp_path))
    with started(tmp_path / "second", num_workers=1) as (file, _):
        with pytest.raises(ClusterLost, match="had no worker for 2 s"):
            list(run_on_cluster(die, ["die"], file, tmp_path, patience_s=2))


def test_what_a_user_can_do_wrong(release, cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dask_cluster, "_CONNECT_S", 0.5)
    for scheduler, message in (
        ("tcp://127.0.0.1:1", "no scheduler answers there"),
        ("127.0.0.1:1", "no scheduler answers there"),
        (str(tmp_path / "absent.json"), "is neither an address"),
    ):
        assert prepare(release, tmp_path / "out", "--dask-scheduler", scheduler) == 2
        printed = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in printed and printed.startswith("error: ")


def test_workers_that_see_other_files_are_told_apart(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "scan.nii.gz"
    marker.write_bytes(b"")
    file.write_bytes(b"123")
    sizes = {str(tmp_path): 2, str(file): 3}

    wrong = dask_cluster._what_is_wrong
    assert wrong(vlm3d_ext.__version__, str(marker), sizes) is None
    assert "expected 0.0.0" in wrong("0.0.0", str(marker), sizes)
    assert "does not see the output" in wrong(vlm3d_ext.__version__, str(tmp_path / "other"), sizes)
    assert f"does not see {file}" in wrong(vlm3d_ext.__version__, str(marker), {str(file): 4})
    assert "does not see" in wrong(vlm3d_ext.__version__, str(marker), {str(tmp_path / "absent"): 4})


def test_a_worker_that_sees_other_files_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(dask_cluster, "_size", lambda path: 99)
    with pytest.raises(ClusterError, match=r"the worker at tcp.* does not see .* as it is here; mount"):
        list(run_on_cluster(doubled, [1], cluster, tmp_path, sources=[tmp_path]))
