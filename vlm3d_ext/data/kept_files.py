"""What was read from files, kept in memory for the epochs that will read the same files again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

__all__ = ["KeptFiles", "ReadsFiles"]

_BYTES_PER_MIB = 2**20

Arrays = tuple[np.ndarray, ...]


class KeptFiles:
    """Keeps the arrays of files up to a size; what no longer fits is read again each time.

    Nothing is thrown out for something new: an epoch comes to each file once, in another order each time, so that what
    came in last would be thrown out before it is wanted. A file that was changed is read again. A worker process of a
    data loader keeps its own, as long as it lives.

    Args:
        max_mib: mebibytes of arrays; 0 keeps nothing.

    Raises:
        ValueError: if it is negative.
    """

    def __init__(self, max_mib: float = 0.0) -> None:
        if not max_mib >= 0:
            raise ValueError(f"max_mib must be at least 0, got {max_mib}.")
        self.max_bytes = int(max_mib * _BYTES_PER_MIB)
        self.num_bytes = 0
        self._kept: dict[str, tuple[tuple[int, int], Arrays]] = {}
        self._lock = threading.Lock()

    def read(self, path: str | os.PathLike, reader: Callable[[str], Arrays]) -> Arrays:
        """Return what `reader` gives for a file, from memory where it is there; these arrays cannot be written to.

        Args:
            path: of the file.
            reader: the same for the same file, always. What it raises is handed on, and nothing is kept.
        """
        path = os.fspath(path)
        if not self.max_bytes or not os.path.isfile(path):
            return reader(path)
        status = os.stat(path)
        version = (status.st_mtime_ns, status.st_size)
        with self._lock:
            kept_version, arrays = self._kept.get(path, (None, ()))
            if kept_version == version:
                return arrays
            if kept_version is not None:
                del self._kept[path]
                self.num_bytes -= _num_bytes(arrays)
        arrays = reader(path)
        with self._lock:
            if path not in self._kept and self.num_bytes + _num_bytes(arrays) <= self.max_bytes:
                for array in arrays:
                    array.setflags(write=False)
                self._kept[path] = (version, arrays)
                self.num_bytes += _num_bytes(arrays)
        return arrays

    def __getstate__(self) -> dict[str, object]:
        # a lock cannot travel to another process
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()


class ReadsFiles:
    """A transform that reads files through `kept_files`, which keep nothing unless a dataset gives it others."""

    kept_files: KeptFiles = KeptFiles()


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
