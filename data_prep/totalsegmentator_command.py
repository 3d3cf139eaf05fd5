"""Running TotalSegmentator on a scan, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.raw_case import LayoutError
from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX
from vlm3d_ext.data.scan import Scan, UnusableScanError

__all__ = ["require_totalsegmentator", "run_totalsegmentator"]

_COMMAND = "TotalSegmentator"


def require_totalsegmentator() -> str:
    """Return the path of the TotalSegmentator command.

    Raises:
        LayoutError: if it is not installed.
    """
    command = shutil.which(_COMMAND)
    if command is None:
        raise LayoutError(
            f"--anatomical-masks totalsegmentator: the command {_COMMAND} is not installed; "
            "run `pip install TotalSegmentator`, or give a folder of masks, or --anatomical-masks none."
        )
    return command


def run_totalsegmentator(scan: Scan, target: Path) -> Path:
    """Segment a scan into one multi-label file, unless `target` exists already.

    The command gets the scan as it was read (HU, canonical), so that CT-RATE v1 and DICOM need no special care. The
    file appears whole or not at all.

    Args:
        scan: the scan.
        target: the ``.nii.gz`` file to make, on `scan.geometry`.

    Returns:
        `target`.

    Raises:
        LayoutError: if the command is not installed.
        UnusableScanError: if it fails; the message holds the last line it printed.
    """
    if target.is_file():
        return target
    command = require_totalsegmentator()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="totalsegmentator_") as folder:
        scan_file = Path(folder, "scan.nii.gz")
        nib.save(nib.Nifti1Image(np.ascontiguousarray(scan.hu.T), scan.geometry.affine_ras), scan_file)
        mask_file = Path(folder, "mask.nii.gz")
        run = subprocess.run(
            [command, "-i", str(scan_file), "-o", str(mask_file), "--ml"], capture_output=True, text=True, check=False
        )
        if run.returncode != 0 or not mask_file.is_file():
            lines = [line for line in (run.stderr + run.stdout).splitlines() if line.strip()]
            last = lines[-1].replace(folder, "") if lines else "it printed nothing"
            raise UnusableScanError(
                f"{target.name}: {_COMMAND} ended with code {run.returncode} ({last}); run it by hand on this "
                f"scan, or give a "
                "folder of masks."
            )
        temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
        shutil.copyfile(mask_file, temporary)
        os.replace(temporary, target)
    return target
