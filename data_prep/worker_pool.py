"""A pool of processes that outlives its workers.

`concurrent.futures` gives up the whole pool when one worker is killed (by the kernel, for memory, say). Here each
worker has one task and one pipe of its own, so a death costs its task only, and a new worker takes the place. The task
is tried again at the end, when nothing else is left to compete with it for memory, as often as asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from data_prep.one_thread import use_one_thread

__all__ = ["TaskRunner", "WorkerDied", "run_tasks"]

TaskRunner = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]
"""What runs a function on tasks and yields (index of the task, result or exception) as they come: `run_tasks` with its
further arguments bound, or `data_prep.dask_cluster.run_on_cluster`."""


class WorkerDied(RuntimeError):
    """The process that worked on a task ended without an answer."""


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], num_workers: int, num_retries: int = 0
) -> Iterator[tuple[int, Any | Exception]]:
    """Yield (index of the task, result), as they come.

    Args:
        function: a picklable function of one task, by module path; run in freshly started ("spawn") processes, so it
            sees nothing of this process's state. 0 workers run it right here.
        tasks: picklable tasks, begun in order.
        num_workers: number of processes.
        num_retries: how often a task is begun again, after all others, when the process that worked on it died.

    Yields:
        The result, or the exception that `function` raised, or `WorkerDied`.
    """
    if num_workers < 1:
        for index, task in enumerate(tasks):
            yield index, _call(function, task)
        return
    waiting = deque(enumerate(tasks))
    deaths = [0] * len(tasks)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                workers.append(_Worker(function))
                workers[-1].begin(*waiting.popleft())
            ready = set(wait([worker.connection for worker in workers]))
            for worker in [worker for worker in workers if worker.connection in ready]:
                index, result = worker.collect()
                died = isinstance(result, WorkerDied)
                again = died and deaths[index] < num_retries
                if waiting and not died:
                    worker.begin(*waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.stop()
                if again:
                    deaths[index] += 1
                    waiting.append((index, tasks[index]))
                else:
                    yield index, result
    finally:
        for worker in workers:
            worker.stop(kill=True)


class _Worker:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._index = -1

    def begin(self, index: int, task: Any) -> None:
        self._index = index
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is dead; collect() says so

    def collect(self) -> tuple[int, Any]:
        try:
            return self._index, self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return self._index, WorkerDied(_how_it_ended(self._process.exitcode))

    def stop(self, kill: bool = False) -> None:
        self.connection.close()
        if kill:
            self._process.kill()
        self._process.join()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it stops us
    use_one_thread()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A worker must not go on writing when the run it belongs to is dead and perhaps started again.
        threading.Thread(target=_leave_with_parent, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, task))


def _leave_with_parent(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _call(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:
        return error


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
