import os
import signal
import time

import pytest

from data_prep.worker_pool import WorkerDied, run_tasks


def work(task):
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leave":
        os._exit(7)
    if task == "fail":
        raise ValueError("no good")
    time.sleep(0.01)
    return task * 2, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_dead_worker_costs_its_own_task_only(num_workers):
    tasks = [1, "die", 2, "fail", 3, "leave", 4]

    results = dict(run_tasks(work, tasks, num_workers))

    assert sorted(results) == list(range(7))
    assert [results[index][0] for index in (0, 2, 4, 6)] == [2, 4, 6, 8]
    assert isinstance(results[1], WorkerDied) and str(results[1]) == "signal SIGKILL"
    assert isinstance(results[3], ValueError) and str(results[3]) == "no good"
    assert isinstance(results[5], WorkerDied) and str(results[5]) == "exit code 7"


def test_without_workers_everything_happens_here():
    assert dict(run_tasks(work, [5], 0)) == {0: (10, os.getpid())}
    assert list(run_tasks(work, [], 2)) == []


def test_stopping_early_leaves_no_process():
    tasks = run_tasks(work, list(range(50)), 2)
    _, (_, pid) = next(tasks)
    tasks.close()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def die_at_first(path):
    if not path.exists():
        path.write_bytes(b"")
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def test_a_task_whose_worker_died_is_tried_again_last(tmp_path):
    tasks = [tmp_path / name for name in "abcd"]
    for path in tasks[1:]:
        path.write_bytes(b"")

    assert list(run_tasks(die_at_first, tasks, 1, num_retries=1)) == [(1, "b"), (2, "c"), (3, "d"), (0, "a")]


def test_retries_come_to_an_end():
    results = dict(run_tasks(work, [1, "die", 2], 2, num_retries=2))

    assert sorted(results) == [0, 1, 2] and isinstance(results[1], WorkerDied)


def threads_of_blas(_):
    import numpy  # noqa: F401 - loads a BLAS
    import threadpoolctl

    return [library["num_threads"] for library in threadpoolctl.threadpool_info()]


def test_workers_compute_in_one_thread():
    (_, threads), *_ = run_tasks(threads_of_blas, [None], 1)
    assert threads and set(threads) == {1}
