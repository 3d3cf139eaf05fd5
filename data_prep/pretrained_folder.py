"""Writing a model's folder so that, whatever happens, it is whole or as it was."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX

__all__ = ["refuse_existing", "whole_folder"]


def refuse_existing(output: Path, overwrite: bool, kind: str = "text model") -> None:
    """Refuse a folder that holds something which must not be lost.

    Args:
        output: the folder to be made; it may be missing or empty.
        overwrite: whether a model in Hugging Face format (a config.json) may be replaced.
        kind: of model, for messages.

    Raises:
        FileExistsError: if `output` holds such a model and `overwrite` is off, or holds anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / "config.json").is_file():
        raise FileExistsError(f"{output}: exists and holds no {kind}; choose another --output.")
    if not overwrite:
        raise FileExistsError(f"{output}: holds a {kind}; choose another --output, or replace it with --overwrite.")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Make a temporary folder beside `output`, which takes its place when the block ends without an error.

    Whoever may read files that this user makes may read the folder. If anything is raised, the temporary folder is
    removed and `output` is what it was.

    Raises:
        OSError: if the folder cannot be made, or a file of it not be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=TEMPORARY_SUFFIX, dir=output.parent))
    try:
        # What makes temporary folders, and safetensors, leave others no right to read; a model is no secret.
        probe = temporary / "probe"
        probe.touch()
        readable = probe.stat().st_mode & 0o777
        probe.unlink()
        yield temporary
        for path in temporary.iterdir():
            path.chmod(readable)
        temporary.chmod(readable | (readable & 0o444) >> 2)  # who may read a folder's files must be let in
        _put_in_place(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    # A folder cannot take the place of a full one, so that the old one steps aside for a moment.
    aside = temporary.with_name(f"{temporary.name}.replaced")
    output.rename(aside)
    try:
        temporary.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside)
