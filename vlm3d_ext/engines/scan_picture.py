"""The picture of a scan that results are shown on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.intensity_windows import window_centre_width
from ..data.prepared_case import prepared_image_path, read_prepared_case, read_sidecar
from ..data.scan import Rescale, UnusableScanError
from ..data.scan_reader import read_scan
from ..data.volume_geometry import VolumeGeometry
from ..data.volume_resampling import resample_volume

__all__ = ["ScanPicture", "read_picture"]


@dataclass(frozen=True, eq=False)
class ScanPicture:
    """A scan to look at.

    Args:
        hu: (D, H, W), canonical LPS, in HU.
        geometry: its grid, the canonical one of the source.
        notes: what is to be said of it.
    """

    hu: np.ndarray
    geometry: VolumeGeometry
    notes: tuple[str, ...] = ()


def read_picture(source: Path, sidecar_path: Path, series_number: int | None = None) -> ScanPicture:
    """Read the scan itself, or where there is none any more what was prepared of it, brought back onto its grid.

    A prepared case has lost what lies outside its windows; the widest of them is shown, and it is said.

    Args:
        source: the scan; a prepared NPZ has no other than itself.
        sidecar_path: of the prepared case, beside its volume.
        series_number: of a DICOM folder with several series.

    Raises:
        PreparedCaseError: if the prepared case is not readable.
    """
    sidecar = read_sidecar(sidecar_path)
    grid = VolumeGeometry.from_dict(sidecar["canonical_geometry"])
    reason = "it came as a prepared case"
    if sidecar["source_format"] != "npz":
        stored = sidecar.get("stored_values")
        try:
            scan = read_scan(
                source,
                rescale=Rescale(*stored) if stored else None,
                spacing_mm=VolumeGeometry.from_dict(sidecar["source_geometry"]).spacing_mm if stored else None,
                check_hu=False,
                series_number=series_number if sidecar["source_format"] == "dicom" else None,
            )
        except UnusableScanError as error:
            reason = f"the scan cannot be read any more ({error})"
        else:
            if scan.geometry.is_close(grid):
                return ScanPicture(scan.hu, scan.geometry)
            reason = "the scan lies on another grid now than when it was prepared"
    imgs = read_prepared_case(prepared_image_path(sidecar_path)).imgs
    windows = sidecar["window"]
    widest = max(range(len(windows)), key=lambda number: window_centre_width(windows[number])[1])
    centre, width = window_centre_width(windows[widest])
    levels = imgs if imgs.ndim == 3 else imgs[widest]
    hu = centre - width / 2 + levels.astype(np.float32) / 255 * width
    prepared = VolumeGeometry.from_dict(sidecar["prepared_geometry"])
    fill = float(hu.min())
    shown = resample_volume(hu, prepared, grid, fill=fill)
    note = f"shown as prepared for the network, at its resolution and in the {windows[widest]} window: {reason}"
    return ScanPicture(shown, grid, (note,))
