"""Which base language model a checkpoint of adapters and projector belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint_files import file_sha256

__all__ = ["LanguageModelRecord"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class LanguageModelRecord:
    """The base language model, to be kept in a checkpoint and compared when it is loaded.

    Models are told apart by their weight files, not by their names: adapters that were trained over four-bit weights go
    on over the whole ones of the same files, but fit no other model, even where every shape does.

    Args:
        name: name or folder that it was loaded by.
        folder: where its files are.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = Path(folder)

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 over names and contents of the weight files; reading them takes about a second for each GB.

        Raises:
            FileNotFoundError: if there is none, with which all such folders would be the same model.
        """
        files = sorted({path for pattern in _WEIGHTS for path in self.folder.glob(pattern)})
        if not files:
            raise FileNotFoundError(
                f"language model {self.name}: {self.folder} holds no weights ({', '.join(_WEIGHTS)}); give a folder "
                "with its weights as --language_model."
            )
        digests = [[path.name, file_sha256(path)] for path in files]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Return plain types for a checkpoint."""
        return {"name": self.name, "weights_sha256": self.weights_sha256}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint is of the same base model; nothing is changed.

        Raises:
            ValueError: if it is not.
        """
        theirs = state_dict.get("weights_sha256")
        if theirs != self.weights_sha256:
            raise ValueError(
                f"the projector and adapters are of language model {state_dict.get('name')} (weights "
                f"{str(theirs)[:12]}), this run loads {self.name} (weights {self.weights_sha256[:12]}); give the model "
                "they were trained with as --language_model."
            )
