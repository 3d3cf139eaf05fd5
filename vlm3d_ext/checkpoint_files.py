"""Reading checkpoints and fingerprinting files, with errors that say what to do."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["CheckpointError", "file_sha256", "load_upstream_weights", "read_checkpoint"]

_Module = TypeVar("_Module", bound=nn.Module)
_CHUNK_BYTES = 1 << 20
_SHOWN = 4
_known_sha256: dict[tuple[str, int, int], str] = {}


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message names the file, what is wrong and the next step."""


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    A file of the same path, size and time of change is read once per process: the encoder's checkpoint is asked for
    by several handlers.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _known_sha256:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        _known_sha256[key] = digest.hexdigest()
    return _known_sha256[key]


def read_checkpoint(path: str | os.PathLike, *, hint: str = "") -> dict[str, Any]:
    """Read a checkpoint onto the CPU, memory-mapped, without ever running code that a file may hold.

    Args:
        path: a file that `torch.save` wrote.
        hint: what to do about a missing or broken file; put at the end of the message.

    Returns:
        The dictionary in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a checkpoint, is damaged, holds more than tensors and plain types, or is not a
            dictionary.
    """
    path = Path(path)
    tail = f" {hint}" if hint else ""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist.{tail}")
    try:
        # files older than the zip format cannot be memory-mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "global" not in str(error):
            raise CheckpointError(f"{path} is no checkpoint that torch.save wrote.{tail}") from error
        raise CheckpointError(
            f"{path} holds more than tensors and plain types; it was not opened, because that could run code.{tail}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # on damaged bytes the reader fails in any way there is, IndexError among them
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{path} is no readable checkpoint, perhaps cut short ({reason}).{tail}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of state dicts.{tail}")
    return content


def load_upstream_weights(
    module: _Module,
    checkpoint: str | os.PathLike,
    *,
    key: str = "model",
    parameter_name: str = "encoder_ckpt",
    command: str = "",
    prefix: str = "",
) -> _Module:
    """Load another bundle's weights into a module, all of them or none.

    Args:
        module: the module to fill; its parameters keep their device and dtype.
        checkpoint: file that the upstream bundle wrote.
        key: entry of the file that holds the state dict; an exported file that is itself a state dict is taken as it
            is.
        parameter_name: config key that holds the path, to be named in errors.
        command: command line that makes the file, to be named in errors.
        prefix: take only the parameters whose names begin with this, and cut it off; e.g. ``"encoder."``.

    Returns:
        The module.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is unreadable, has no such key, or its parameters do not fit: missing,
            unexpected or of other shapes.
    """
    make = f"Make it with: {command}, or" if command else "Train the upstream bundle first, or"
    hint = f"{make} point to another file with --{parameter_name} PATH."
    content = read_checkpoint(checkpoint, hint=hint)
    if key in content:
        state = content[key]
    elif content and all(isinstance(value, torch.Tensor) for value in content.values()):
        state = content
    else:
        raise CheckpointError(f"{checkpoint} has no entry {key!r}; it has {sorted(map(str, content))}. {hint}")
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"entry {key!r} of {checkpoint} is not a state dict of tensors. {hint}")
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    problems = _misfits(module.state_dict(), state)
    if problems:
        raise CheckpointError(f"the weights in {checkpoint} do not fit {type(module).__name__}: {problems}. {hint}")
    module.load_state_dict(state, strict=True)
    return module


def _misfits(wanted: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> str:
    """Describe in words how two state dicts differ in names and shapes; empty if they do not."""
    shapes = [
        f"{name} is {tuple(given[name].shape)} in the file and {tuple(value.shape)} here"
        for name, value in wanted.items()
        if name in given and isinstance(value, torch.Tensor) and given[name].shape != value.shape
    ]
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    parts = []
    for what, names in (("", shapes), ("missing in the file: ", missing), ("not known here: ", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{what}{', '.join(names[:_SHOWN])}{more}")
    return "; ".join(parts)
