"""Walking a folder tree in a fixed order, saying what could not be read instead of passing over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["walk_readable"]


def walk_readable(root: Path, folder: str, remarks: list[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (directory, its subfolders, its files) below ``root / folder``, sorted, without hidden ones.

    Removing names from the list of subfolders keeps the walk out of them, as with `os.walk`.

    Args:
        root: what remarks name folders relative to.
        folder: where to begin, relative to `root`.
        remarks: folders that cannot be read, and links to folders, which could lead in circles, are written here.
    """

    def note(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        remarks.append(
            f"{name}: the folder cannot be read ({os.strerror(error.errno or 0)}), so what is in it is missing here"
        )

    for directory, subfolders, names in os.walk(root / folder, onerror=note):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(directory), subfolders, sorted(name for name in names if not name.startswith("."))
        for name in subfolders:
            path = Path(directory, name)
            if path.is_symlink():
                remarks.append(
                    f"{os.path.relpath(path, root)}: is a link to a folder, which is not followed, so what is in it is "
                    "missing here"
                )
