"""Reading checkpoints and fingerprinting files and weights, with errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = [
    "CheckpointError",
    "UpstreamCheckpoint",
    "checkpoint_entry",
    "file_sha256",
    "load_upstream_weights",
    "read_checkpoint",
    "state_dict_sha256",
]

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


def state_dict_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over the sorted names, dtypes, shapes and bytes of tensors, wherever they are.

    Tensors that are spread over ranks are gathered one by one, for which every rank has to call this.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    except OSError as error:
        # the reader of files older than the zip format jumps to places that a damaged file names
        if error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{path} is no readable checkpoint, perhaps cut short ({error.strerror}).{tail}"
        ) from error
    except Exception as error:  # on damaged bytes the reader fails in any way there is, IndexError among them
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{path} is no readable checkpoint, perhaps cut short ({reason}).{tail}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of state dicts.{tail}")
    return content


def checkpoint_entry(path: str | os.PathLike, key: str, *, parameter_name: str = "ckpt_path") -> Any:
    """Return one entry of a checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is unreadable, or has no such entry.
    """
    hint = f"Train the bundle first, or point to another file with --{parameter_name} PATH."
    content = read_checkpoint(path, hint=hint)
    if key not in content:
        raise CheckpointError(f"{path} has no entry {key!r}; it has {sorted(map(str, content))}. {hint}")
    return content[key]


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


class UpstreamCheckpoint:
    """Modules that one checkpoint fills; see `load_upstream_weights` for what can be wrong.

    Args:
        checkpoint: the file.
        objects: key in the checkpoint -> module.
        parameter_name: the config key that points to the file, for the error message.
        command: the command that makes the file, for the error message.
        checks: key in the checkpoint -> object whose `load_state_dict` refuses what does not belong together, such as
            `vlm3d_ext.text.label_record.LabelRecord`; asked before any weight is loaded.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        objects: Mapping[str, nn.Module],
        parameter_name: str = "ckpt_path",
        command: str = "python -m monai.bundle run --config_file bundles/encoder/configs/train.json",
        checks: Mapping[str, Any] | None = None,
    ) -> None:
        self.checks = dict(checks or {})
        self.checkpoint = checkpoint
        self.objects = dict(objects)
        self.parameter_name = parameter_name
        self.command = command

    @property
    def _hint(self) -> str:
        return f"Make it with: {self.command}, or point to another file with --{self.parameter_name} PATH."

    def check_file(self) -> None:
        """Refuse a missing file at once, before data are read and the file's fingerprint is asked for.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint {self.checkpoint} does not exist. {self._hint}")

    def load(self, logger: logging.Logger) -> None:
        """Check, and load.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file or its weights do not fit.
            ValueError: if one of the checks refuses it.
        """
        content = read_checkpoint(self.checkpoint, hint=self._hint) if self.checks else {}
        for key, check in self.checks.items():
            if key not in content:
                raise CheckpointError(f"{self.checkpoint} has no entry {key!r}; it has {sorted(content)}. {self._hint}")
            try:
                check.load_state_dict(content[key])
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}") from None
        for key, module in self.objects.items():
            load_upstream_weights(
                module, self.checkpoint, key=key, parameter_name=self.parameter_name, command=self.command
            )
        logger.info(f"Weights of {', '.join(self.objects)} from {self.checkpoint}.")


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
