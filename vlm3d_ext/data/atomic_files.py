"""Writing files so that, whatever happens, each is either whole or absent.

Every writer makes a temporary file beside the target, flushes it to disk and renames it. The bytes depend on the
content only: no clock, no file name, so the same content gives the same file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["TEMPORARY_SUFFIX", "whole_or_absent", "write_bytes", "write_gzip", "write_json", "write_npz"]

TEMPORARY_SUFFIX = ".partial"


@contextmanager
def whole_or_absent(path: str | os.PathLike, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which takes the place of `path` when the block ends without an error.

    For what should not pass through memory, such as checkpoints; else `write_bytes` and its kin are simpler.

    Args:
        path: the file.
        durable: wait until the disk has it, so that even a power failure leaves the file whole or absent. False, for
            many small files that can be made again, is several times faster on a busy disk; a killed process still
            leaves nothing half-written.

    Raises:
        OSError: if the file cannot be written (disk full, read-only folder). Whatever is raised, the temporary file is
            removed and `path` is what it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike, content: bytes, durable: bool = True) -> None:
    """Write `content` to `path`, which afterwards holds all of it or what it held before.

    Raises:
        OSError: if the file cannot be written (disk full, read-only folder); the temporary file is removed.
    """
    with whole_or_absent(path, durable) as file:
        file.write(content)


def write_json(path: str | os.PathLike, content: Any, durable: bool = True) -> None:
    """Write `content` as indented UTF-8 JSON; NaN is refused, because JSON has none."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n", durable)


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray], compressed: bool = True) -> None:
    """Write named arrays as NPZ, without pickled objects.

    Raises:
        TypeError: if an array has the object dtype.
    """
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"array {name!r} holds Python objects; an NPZ of ours holds plain numbers only.")
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def write_gzip(path: str | os.PathLike, content: bytes, level: int = 6, durable: bool = True) -> None:
    """Write `content` gzip-compressed, with neither time nor name in the header."""
    write_bytes(path, gzip.compress(content, compresslevel=level, mtime=0), durable)


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
