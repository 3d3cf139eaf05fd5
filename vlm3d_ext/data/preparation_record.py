"""How the data were prepared that a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .case_manifest import CaseManifest

__all__ = ["PreparationRecord"]


class PreparationRecord:
    """The settings of the preparation, to be kept in a checkpoint, so that a new scan can be prepared alike.

    Args:
        manifest: of the training data.
    """

    def __init__(self, manifest: CaseManifest) -> None:
        self.settings: dict[str, Any] = dict(manifest.content.get("settings") or {})

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, plain types."""
        return {"settings": self.settings}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint's data were prepared as these are; nothing is changed.

        Raises:
            ValueError: if they were not; the message names what differs.
        """
        theirs = dict(state_dict["settings"])
        names = sorted({*theirs, *self.settings})
        differs = [
            f"{name} is {theirs.get(name)!r} there and {self.settings.get(name)!r} here"
            for name in names
            if theirs.get(name) != self.settings.get(name)
        ]
        if differs:
            raise ValueError(
                f"the checkpoint's data were prepared otherwise: {'; '.join(differs)}; prepare the data alike, or "
                "choose another checkpoint."
            )
