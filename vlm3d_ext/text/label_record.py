"""Which findings a checkpoint was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .label_set import LabelSet, load_label_set

__all__ = ["LabelRecord"]

_STATE_KEYS = ("label_set", "finding_keys", "finding_names")


class LabelRecord:
    """The findings of a label set, to be kept in a checkpoint and compared when it is loaded.

    Two sets may have as many findings, so that shapes alone would let a checkpoint of one pass for the other's.

    Args:
        label_set: the set, its name or its path, several joined by "+".
    """

    def __init__(self, label_set: LabelSet | str | os.PathLike) -> None:
        self.label_set = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)

    def state_dict(self) -> dict[str, Any]:
        """Return what the labels are, as plain types, for a checkpoint."""
        return {
            "label_set": self.label_set.name,
            "finding_keys": list(self.label_set.keys),
            "finding_names": list(self.label_set.names),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint was trained on the same findings in the same order; nothing is changed.

        Raises:
            ValueError: if it was not; the message names what differs.
        """
        absent = [key for key in _STATE_KEYS if key not in state_dict]
        if absent:
            raise ValueError(f"the checkpoint does not say its labels ({absent} missing); train it again.")
        theirs, ours = list(state_dict["finding_keys"]), list(self.label_set.keys)
        if theirs == ours:
            return
        name = state_dict["label_set"]
        only_theirs = [
            called for called, key in zip(state_dict["finding_names"], theirs, strict=True) if key not in ours
        ]
        only_ours = [called for called, key in zip(self.label_set.names, ours, strict=True) if key not in theirs]
        differs = [
            f"only {where} has {', '.join(names)}"
            for where, names in (("the checkpoint", only_theirs), ("this run", only_ours))
            if names
        ] or ["the same findings in another order"]
        raise ValueError(
            f"the checkpoint is of label set {name} ({len(theirs)} findings), this run of {self.label_set.name} "
            f"({len(ours)}): {'; '.join(differs)}; choose --label_set {name}, or another checkpoint."
        )
