"""Results of a run over many volumes, one file each, that all come from one origin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic_files import write_json
from .rank_share import share_of_rank

__all__ = ["ResultStore", "ResultStoreError"]


class ResultStoreError(ValueError):
    """A folder of results does not fit what is asked of it; the message says what to do."""


class ResultStore:
    """A folder with an index that says of which checkpoint and data the results are, and one file per volume.

    Files are whole or absent, so that a run can be stopped and continued.

    Args:
        folder: where the store is or will be.
        origin: what must be the same for all files: the checkpoint's sha256, the manifest's fingerprint, and the like.
            None opens an existing store as it is.

    Raises:
        ResultStoreError: if the folder holds results of another origin, or none where an existing store is opened.
    """

    kind = "results"
    index_name = "results.json"
    suffix = ".json"
    made_by = "inference.json"
    error: type[ResultStoreError] = ResultStoreError

    def __init__(self, folder: str | os.PathLike, origin: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        index = self.folder / self.index_name
        existing = self._read_index(index)
        if origin is None:
            if existing is None:
                raise self.error(f"{index}: no such file; make {self.kind} first with {self.made_by}.")
            self.origin: dict[str, Any] = existing
            return
        self.origin = json.loads(json.dumps(dict(origin)))
        if existing is None:
            write_json(index, self.origin)
        elif existing != self.origin:
            differing = sorted(k for k in {*existing, *self.origin} if existing.get(k) != self.origin.get(k))
            raise self.error(
                f"{index}: the {self.kind} there were made with another {', '.join(differing)}; "
                f"choose another --output_dir or delete {self.folder}."
            )

    def path(self, volume_id: str) -> Path:
        """Return where a volume's results are."""
        return self.folder / f"{volume_id}{self.suffix}"

    def pending(self, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the cases whose results are not there yet."""
        return [case for case in cases if not self.path(case["volume_id"]).is_file()]

    def pending_share(self, cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return what this process of torchrun has to do: of its share of the cases, those without results.

        Shared out before asking what is there, because the other processes are at work already.
        """
        return self.pending(share_of_rank(cases))

    def _read_index(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise self.error(f"{path}: not JSON ({error}); delete {path.parent} and make it again.") from None
