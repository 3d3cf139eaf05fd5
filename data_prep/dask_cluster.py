"""Tasks on the workers of a Dask cluster: the interface of the pool of processes, on as many machines as there are.

Dask gives the tasks of a worker that dies to others. What it leaves open is settled here: workers that see other files
than this machine, a scheduler that is gone, and no worker left.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vlm3d_ext
from data_prep.one_thread import use_one_thread
from data_prep.worker_pool import WorkerDied
from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["ClusterError", "ClusterLost", "run_on_cluster"]

# A scheduler that is there answers at once; workers of a batch system may take a while to be given their machines.
_CONNECT_S = 10
_FIRST_WORKER_S = 60
# For each thread one task at work, and one that is there already when the first is done.
_TASKS_PER_THREAD = 2
_POLL_S = 1.0
_RESULT_S = 60
_COUNT_AGAIN_S = 10.0


class ClusterError(ValueError):
    """A cluster that cannot do the work: one line says what was found, what was expected, and what to do."""


class ClusterLost(RuntimeError):
    """A cluster that was there is gone; the results that were yielded stand."""


def run_on_cluster(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    scheduler: str,
    output: Path,
    sources: Sequence[Path] = (),
    num_retries: int = 2,
    patience_s: float = 300,
) -> Iterator[tuple[int, Any | Exception]]:
    """Yield (index of the task, result), as they come, of tasks that a Dask cluster works on.

    No more than two tasks for each thread of the cluster are in flight, however many there are. A task may run twice at
    the same time, where the connection to a worker is lost and the worker lives on; it must bear that.

    Args:
        function: a picklable function of one task, by module path, which the workers can import.
        tasks: picklable tasks, begun in order.
        scheduler: address of a running scheduler (``"tcp://host:8786"``), or path of its scheduler file.
        output: folder that the tasks write to, which must exist; every worker must see it and may write there.
        sources: files or folders that every worker must see as they are seen here.
        num_retries: how often a task is begun again when a worker died on it. The cluster itself begins it again
            `distributed.scheduler.allowed-failures` times (3, unless configured otherwise), even where this is less.
        patience_s: how long to wait for a worker once all are gone.

    Yields:
        The result, or the exception that `function` raised, or `WorkerDied`.

    Raises:
        ClusterError: before any task is begun, if there is no such scheduler, no worker, or one that does not see the
            files or has another version of this package.
        ClusterLost: if the scheduler is lost, or all workers are for too long.
    """
    if not tasks:
        return
    client = _connected(scheduler)
    try:
        _check_workers(client, scheduler, output, sources)
        flight = _Flight(client, function, tasks, scheduler, patience_s)
        waiting = deque(range(len(tasks)))
        deaths = [0] * len(tasks)
        while waiting or flight.futures:
            while waiting and len(flight.futures) < flight.capacity():
                flight.begin(waiting.popleft())
            index, result = flight.next_result()
            if isinstance(result, _WorkersDied):
                deaths[index] += result.number
                if deaths[index] <= num_retries:
                    waiting.append(index)
                    continue
                result = WorkerDied(f"its Dask worker, {deaths[index]} times")
            yield index, result
    finally:
        # A client that has lost its scheduler has nobody to take leave of.
        with contextlib.suppress(Exception):
            client.close(timeout=_POLL_S)


class _WorkersDied(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Flight:
    """The tasks that the cluster has."""

    def __init__(
        self,
        client: Client,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        scheduler: str,
        patience_s: float,
    ) -> None:
        self.futures: dict[Future, int] = {}
        self._client = client
        self._function = function
        self._tasks = tasks
        self._scheduler = scheduler
        self._patience_s = patience_s
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._num_threads = 1
        self._counted_at = -_COUNT_AGAIN_S

    def capacity(self) -> int:
        """How many tasks may be in flight; follows a cluster that grows or shrinks."""
        if time.monotonic() - self._counted_at > _COUNT_AGAIN_S:
            self._num_threads = max(1, self._count_threads())
            self._counted_at = time.monotonic()
        return _TASKS_PER_THREAD * self._num_threads

    def begin(self, index: int) -> None:
        if self._client.status != "running":
            raise self._lost()
        # A key of its own, so that neither another run on this cluster nor an earlier attempt is taken for this one.
        key = f"prepare-{uuid.uuid4().hex}"
        try:
            future = self._client.submit(_work_in_one_thread, self._function, self._tasks[index], key=key, pure=False)
        except OSError:  # the connection broke at this very moment
            raise self._lost() from None
        self.futures[future] = index
        future.add_done_callback(self._done.put)

    def next_result(self) -> tuple[int, Any]:
        future = self._next_done()
        index = self.futures.pop(future)
        return index, self._result(future)

    def _next_done(self) -> Future:
        workers_seen_at = time.monotonic()
        while True:
            try:
                return self._done.get(timeout=_POLL_S)
            except queue.Empty:
                if self._count_threads():
                    workers_seen_at = time.monotonic()
                elif time.monotonic() - workers_seen_at > self._patience_s:
                    raise ClusterLost(
                        f"the cluster of {self._scheduler} had no worker for {self._patience_s:g} s"
                    ) from None

    def _result(self, future: Future) -> Any:
        from distributed import KilledWorker
        from distributed.comm import CommClosedError

        try:
            if future.status == "error":
                error = future.exception(timeout=_RESULT_S)
                if isinstance(error, KilledWorker):
                    return _WorkersDied(error.allowed_failures + 1)
                if not isinstance(error, CommClosedError):
                    return error
            # This run cancels nothing: futures are cancelled where the connection to the scheduler breaks.
            elif future.status != "cancelled":
                return future.result(timeout=_RESULT_S)
        except TimeoutError:
            return _WorkersDied(1)  # the one that had the result, before it was fetched
        except (asyncio.CancelledError, concurrent.futures.CancelledError, CommClosedError):
            pass
        raise self._lost()

    def _lost(self) -> ClusterLost:
        return ClusterLost(f"the scheduler at {self._scheduler} was lost")

    def _count_threads(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except (OSError, RuntimeError):  # the scheduler does not answer; the futures will say if it is gone
            return 0


def _connected(scheduler: str) -> Client:
    try:
        from distributed import Client
    except ImportError:
        raise ClusterError(
            "a Dask cluster needs the package distributed, which is not installed; pip install 'vlm3d[dask]', or leave "
            "out --dask-scheduler."
        ) from None
    place = {"address": scheduler} if "://" in scheduler else {"scheduler_file": scheduler}
    if "scheduler_file" in place and not os.path.isfile(scheduler):
        raise ClusterError(
            f"--dask-scheduler {scheduler}: is neither an address such as tcp://host:8786 nor a file, expected one of "
            "them; take what 'dask scheduler' prints, or its --scheduler-file."
        )
    try:
        return Client(**place, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, KeyError) as error:
        raise ClusterError(
            f"--dask-scheduler {scheduler}: no scheduler answers there ({type(error).__name__}); start one with 'dask "
            "scheduler', and check address and firewall."
        ) from None


def _check_workers(client: Client, scheduler: str, output: Path, sources: Sequence[Path]) -> None:
    """Ask every worker whether it sees what is seen here. A path of the same name may be another disk's, so what is
    looked for in the output is a file made just now."""
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
    except TimeoutError:
        raise ClusterError(
            f"--dask-scheduler {scheduler}: has no worker after {_FIRST_WORKER_S} s, expected at least one; start them "
            f"with 'dask worker {scheduler} --nthreads 1'."
        ) from None
    sizes = {str(path): _size(path) for path in sources}
    with tempfile.NamedTemporaryFile(dir=output, prefix=".cluster.", suffix=TEMPORARY_SUFFIX) as marker:
        answers = client.run(_what_is_wrong, vlm3d_ext.__version__, marker.name, sizes, on_error="return")
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, ImportError):
            answer = f"cannot import this package ({answer}); install the same version there"
        if answer is not None:
            raise ClusterError(f"--dask-scheduler {scheduler}: the worker at {worker} {answer}.")


def _what_is_wrong(version: str, marker: str, sizes: Mapping[str, int]) -> str | None:
    """What keeps this worker from the work, in words; None if nothing does."""
    if vlm3d_ext.__version__ != version:
        return f"has version {vlm3d_ext.__version__}, expected {version}; install the same version there"
    folder = os.path.dirname(marker)
    if not os.path.exists(marker):
        return f"does not see the output {folder}; mount the same file system at the same place on every machine"
    if not os.access(folder, os.W_OK):
        return f"may not write to the output {folder}; check the permissions of the worker's user"
    for path, size in sizes.items():
        if not os.path.exists(path) or _size(Path(path)) != size:
            return f"does not see {path} as it is here; mount the same file system at the same place on every machine"
    return None


def _size(path: Path) -> int:
    """Bytes of a file; of a folder, where sizes differ between file systems, how many names it holds."""
    return len(os.listdir(path)) if path.is_dir() else path.stat().st_size


def _work_in_one_thread(function: Callable[[Any], Any], task: Any) -> Any:
    use_one_thread()
    return function(task)
