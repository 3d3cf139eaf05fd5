"""Chest CTs to measure with, at full size: a real one where there is one, else a phantom."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm3d_ext.data.case_manifest import CaseManifest

from .repository import ROOT

__all__ = ["chest_ct", "prepared_cases", "temporary_folder"]

FULL_SIZE = (64, 512, 512)
# name a NIfTI of your own in this variable
REAL_CT = "BENCHMARK_CT"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vlm3d_benchmark_") as folder:
        yield Path(folder)


def chest_ct(folder: Path, num_slices: int = 256) -> tuple[Path, str]:
    """Return the NIfTI of a chest CT and what it is: a real one, or a phantom made in the folder.

    Args:
        folder: for the phantom.
        num_slices: of the phantom; it has 512 x 512 pixels.
    """
    named = os.environ.get(REAL_CT)
    beside = sorted((ROOT.parent / "shared/data/ct_chest").glob("*/ct.nii.gz"))
    if named and not Path(named).is_file():
        raise FileNotFoundError(f"{REAL_CT}={named}: no such file; name the NIfTI of a chest CT, or unset it.")
    if named or beside:
        path = Path(named) if named else beside[0]
        return path, f"a real chest CT ({path.parent.name})"
    _run(
        "data_prep.synthesize", "--output", folder / "raw", "--num-train-patients", 0, "--num-valid-patients", 1,
        "--size", num_slices, 512, 512,
    )  # fmt: skip
    return next((folder / "raw").rglob("*.nii.gz")), f"a phantom of {num_slices} slices"


def prepared_cases(
    folder: Path, volume_format: str, number: int, window: str = "soft_tissue", size: tuple[int, int, int] = FULL_SIZE
) -> tuple[list[dict[str, Any]], str]:
    """Prepare one chest CT under several names; return the manifest's cases and what the CT is.

    Args:
        folder: for all that is made.
        volume_format: of the prepared volumes.
        number: of cases, each with files of its own.
        window: name of the intensity window.
        size: (D, H, W) of the prepared volumes.
    """
    scan, what = chest_ct(folder / "scan")
    scans, output = folder / "scans", folder / f"prepared_{volume_format}"
    scans.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        link = scans / f"scan_{index}.nii.gz"
        if not link.exists():
            os.symlink(scan, link)
    _run(
        "data_prep.prepare", "--source", scans, "--output", output, "--spatial-size", *size, "--window", window,
        "--volume-format", volume_format, "--anatomical-masks", "none",
    )  # fmt: skip
    return CaseManifest(output / "manifest.json").cases("test"), what


def _run(module: str, *arguments: Any) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
