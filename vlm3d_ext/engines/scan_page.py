"""What VLM3D says of one CT scan, as a single HTML file that opens anywhere, without a network or a server.

The scan, its lesions, the report and where all of it comes from are inside the file, as are its styles and scripts; its
content security policy forbids to load anything else.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from ..data.atomic_files import write_bytes
from ..data.volume_geometry import VolumeGeometry
from .localization_montage import DISEASE_COLOURS
from .scan_page_sections import findings_html, lesions_html, lineage_html, notes_html, report_html
from .scan_page_volume import (
    BAND_LIMIT_HU,
    HU_OF_LEVEL,
    encode_mask,
    encode_volume,
    nearest_slices,
    page_grid,
    shown_mask,
    shown_volume,
)

__all__ = ["ScanPageContent", "scan_page", "write_scan_page"]

_PARTS = files("vlm3d_ext.engines") / "scan_page"
_SCRIPTS = ("volume.js", "viewer.js", "page.js")
_FINDING_VALUES = ("name", "probability", "threshold", "prediction", "trained")
_LESION_VALUES = ("bbox_mm", "centroid_mm", "probability", "volume_ml")
# In base64, a third more: 6.7 MB, which leaves room for masks and text in a page of 8 MB.
_MOST_IMAGE_BYTES = 5_000_000


@dataclass(frozen=True, eq=False)
class ScanPageContent:
    """All that a page shows. Nothing of it is trusted: every text may hold markup, which is shown and not run.

    Args:
        volume_id: of the scan.
        hu: (D, H, W) int16 or float, in HU, canonical LPS.
        geometry: canonical grid of `hu`.
        masks: disease key -> (D, H, W) bool on `geometry`; a disease may be left out.
        diseases: disease key -> name, in the order of the colours.
        findings: each with `name`, `probability` and `threshold` (0 to 1, None where there is none), `prediction` (0 or
            1), `trained` (bool), and, where known, `disease` (its key), `position_mm` (`[x, y, z]`, LPS) and
            `position_of` ("lesion" or "region").
        lesions: disease key -> lesions as in `LocalizationStore`, most probable first.
        report: as in `ReportStore`; empty if none was written.
        lineage: of the checkpoint, `vlm3d_ext.lineage.Lineage.state_dict()`.
        checkpoint_sha256: of the checkpoint's file.
        notes: remarks on the scan, such as "looks like no chest".

    Raises:
        ValueError: if an array does not fit the grid, holds NaN, or is no mask; if the grid is not canonical; or a mask
            or lesion is of a disease without a name, or a finding or lesion lacks a value.
    """

    volume_id: str
    hu: np.ndarray
    geometry: VolumeGeometry
    masks: Mapping[str, np.ndarray]
    diseases: Mapping[str, str]
    findings: Sequence[Mapping[str, Any]]
    lesions: Mapping[str, Sequence[Mapping[str, Any]]]
    report: Mapping[str, Any]
    lineage: Mapping[str, Any]
    checkpoint_sha256: str
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = self.geometry.shape
        if self.geometry.axis_codes != "LPS":
            raise ValueError(
                f"{self.volume_id}: the grid's axes are {self.geometry.axis_codes}, expected LPS; pass what "
                "to_canonical and canonical of its geometry return."
            )
        if self.hu.shape != shape:
            raise ValueError(f"{self.volume_id}: the scan has shape {self.hu.shape}, but its grid has {shape}.")
        if not (np.isfinite(self.hu.min()) and np.isfinite(self.hu.max())):
            raise ValueError(f"{self.volume_id}: the scan holds NaN or infinite values, expected HU.")
        for disease, mask in self.masks.items():
            if mask.shape != shape or mask.dtype != bool:
                raise ValueError(
                    f"{self.volume_id}: the mask of {disease!r} is {mask.dtype} {mask.shape}, expected bool {shape}."
                )
        unnamed = sorted((set(self.masks) | set(self.lesions)) - set(self.diseases))
        if unnamed:
            raise ValueError(f"{self.volume_id}: no name for {unnamed}; add them to diseases: {list(self.diseases)}.")
        self._check_values("finding", self.findings, _FINDING_VALUES)
        for disease, lesions in self.lesions.items():
            self._check_values(f"lesion of {disease!r}", lesions, _LESION_VALUES)

    def _check_values(self, what: str, entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        for number, entry in enumerate(entries, start=1):
            missing = [name for name in names if name not in entry]
            if missing:
                raise ValueError(f"{self.volume_id}: {what}, number {number}, lacks {missing}; it has {sorted(entry)}.")


def scan_page(content: ScanPageContent, max_in_plane: int = 256, max_slices: int = 160) -> str:
    """Return the page. The same content gives the same text, as far as the JPEG encoder is the same.

    Of a scan that is larger than the page shows, new voxels are means of those that they cover. Grey values keep the
    range of `SHOWN_RANGE_HU`; see `vlm3d_ext.engines.scan_page_volume` for how they are stored.

    Args:
        content: what to show.
        max_in_plane: most pixels along the larger side of an axial slice.
        max_slices: most axial slices.

    Raises:
        ValueError: if a finding or a lesion lies outside the scan, or a limit is less than 1.
    """
    geometry = content.geometry
    grid = page_grid(geometry, max_in_plane, max_slices)
    colours = {key: DISEASE_COLOURS[n % len(DISEASE_COLOURS)] for n, key in enumerate(content.diseases)}

    def place(position_mm: Sequence[float], what: str) -> tuple[int, ...]:
        try:
            return nearest_slices(position_mm, geometry, grid)
        except ValueError as error:
            raise ValueError(f"{content.volume_id}: {what}: {error}") from None

    middle = geometry.positions_lps((np.array([geometry.shape]) - 1) / 2)[0]
    volume = encode_volume(shown_volume(content.hu, geometry, grid), _MOST_IMAGE_BYTES)
    z, y, x = geometry.spacing_mm
    d, h, w = geometry.shape
    gd, gh, gw = grid.shape
    data = {
        "shape": list(grid.shape),
        "spacing_mm": list(grid.spacing_mm),
        "affine_lps": grid.affine_lps.tolist(),
        "hu_of_level": [levels.round(3).tolist() for levels in HU_OF_LEVEL],
        "band_limit_hu": BAND_LIMIT_HU,
        "slices_per_sheet": volume.slices_per_sheet,
        "rows_per_slice": volume.rows_per_slice,
        "sheets": [[base64.b64encode(sheet).decode("ascii") for sheet in band] for band in volume.sheets],
        "means": volume.means,
        "start": _start(content, place, grid),
        "diseases": [
            {
                "key": key,
                "name": name,
                "colour": colours[key],
                "num_lesions": len(content.lesions.get(key, ())),
                "runs": _runs(content.masks.get(key), geometry, grid),
            }
            for key, name in content.diseases.items()
        ],
    }
    num_present = sum(bool(finding["prediction"]) for finding in content.findings)
    bundle = " ".join(str(content.lineage[key]) for key in ("bundle", "version") if content.lineage.get(key))
    parts = {
        "volume_id": html.escape(content.volume_id),
        "summary": html.escape(
            f"{num_present} of {len(content.findings)} findings present · "
            f"{sum(len(lesions) for lesions in content.lesions.values())} lesions drawn · VLM3D {bundle}"
        ),
        "picture": html.escape(
            f"Scan {w} × {h} × {d} voxels of {x:.2f} × {y:.2f} × {z:.2f} mm; shown {gw} × {gh} × {gd}, compressed: "
            f"HU are off by {volume.mean_error_hu:.1f} on average and limited to −1024 … 1500."
        ),
        "report": report_html(content.report, content.findings, content.lesions, place, float(middle[0])),
        "findings": findings_html(content.findings, colours, place),
        "lesions": lesions_html(content.lesions, content.diseases, colours, place),
        "lineage": lineage_html(content.lineage, content.checkpoint_sha256),
        "notes": notes_html(content.notes),
        "styles": _part("page.css"),
        "scripts": "\n".join(f"<script>\n{_part(name)}</script>" for name in _SCRIPTS),
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return Template(_part("page.html")).substitute(parts)


def write_scan_page(path: str | os.PathLike, content: ScanPageContent) -> None:
    """Write a scan's page; the file is whole or absent.

    Raises:
        ValueError: as `scan_page`.
        OSError: if the file cannot be written.
    """
    write_bytes(path, scan_page(content).encode("utf-8", errors="replace"))


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _runs(mask: np.ndarray | None, geometry: VolumeGeometry, grid: VolumeGeometry) -> str | None:
    """Return a mask for the page; None if there is nothing to draw, which spares the browser an array of zeros."""
    if mask is None or not mask.any():
        return None
    return encode_mask(shown_mask(mask, geometry, grid))


def _start(content: ScanPageContent, place: Any, grid: VolumeGeometry) -> list[int]:
    """Return the slices that the page opens with: the most probable finding that is present and has a lesion, else the
    middle."""
    shown = [
        finding
        for finding in content.findings
        if finding["prediction"] and finding.get("position_of") == "lesion" and finding.get("position_mm") is not None
    ]
    if not shown:
        return [n // 2 for n in grid.shape]
    finding = max(shown, key=lambda finding: float(finding["probability"] or 0))
    return list(place(finding["position_mm"], f"finding {finding['name']!r}"))
