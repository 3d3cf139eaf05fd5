"""Say at the start of a run what it stands on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

import ignite.distributed as idist
from ignite.engine import Engine, Events

from ..checkpoint_files import file_sha256
from ..lineage import Lineage, LineageError, check_chain, format_lineage, read_lineage

__all__ = ["LineageHandler"]


class LineageHandler:
    """Prints, when the engine starts, one block: the lineage of each loaded checkpoint, and of this run.

    The checkpoints are also checked to belong together (`vlm3d_ext.lineage.check_chain`). Only rank 0 prints; every
    rank checks.

    Args:
        lineage: this run's lineage, or None where nothing will be saved (evaluation, inference).
        checkpoints: bundle name -> path of a checkpoint that was loaded.
        allow_mismatch: warn about checkpoints that do not belong together or carry no lineage, instead of stopping.
        stream: where to print; standard output by default.

    Raises:
        ValueError: if there is neither a lineage nor a checkpoint.
    """

    def __init__(
        self,
        lineage: Lineage | None = None,
        checkpoints: Mapping[str, str | os.PathLike] | None = None,
        allow_mismatch: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.lineage = lineage
        self.checkpoints = dict(checkpoints or {})
        self.allow_mismatch = allow_mismatch
        self.stream = stream
        if lineage is None and not self.checkpoints:
            raise ValueError("LineageHandler needs a lineage, checkpoints or both; got neither.")

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Check and print.

        Raises:
            FileNotFoundError: if a checkpoint does not exist.
            LineageError: if the checkpoints do not belong together, or one carries no lineage, unless `allow_mismatch`.
        """
        lines = []
        known: dict[str, Lineage | str | os.PathLike] = {}
        for name, path in self.checkpoints.items():
            title = f"loaded {name} from {path} (sha256 {file_sha256(path)[:12]})"
            try:
                lines.append(format_lineage(read_lineage(path), title))
                known[name] = path
            except LineageError:
                if not self.allow_mismatch:
                    raise
                lines.append(f"{title}: no lineage")
        if self.lineage is not None:
            lines.append(format_lineage(self.lineage.state_dict(), "this run"))
            known["this run"] = self.lineage
        check_chain(known, allow_mismatch=self.allow_mismatch)
        if idist.get_rank() == 0:
            print("\n".join(["Lineage", *(f"  {line}" for block in lines for line in block.split("\n"))]), flush=True,
                  file=self.stream or sys.stdout)  # fmt: skip
