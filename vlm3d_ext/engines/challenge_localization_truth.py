"""True boxes to score localisation against, from a folder of masks or from a file of boxes.

Boxes are counted from the volume's own corner, as in the challenge's file; see `vlm3d_ext.data.challenge_localization`.
A disease is known of a volume, or it is not: what has no mask is unknown, not free of lesions, unless a list of scans
says so.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.challenge_localization import read_challenge_localization
from ..data.csv_table import volume_name
from ..data.lesion_boxes import boxes_of_mask, volume_box_mm
from ..data.nifti_volume import is_nifti_name
from ..data.scan_reader import read_mask
from ..text.disease_set import DiseaseSet

__all__ = ["TrueBoxes", "read_scan_list", "true_boxes_of_file", "true_boxes_of_masks"]

_VOLUME_COLUMNS = ("VolumeName", "volume_id", "AccessionNo", "input_image_name")
_SAME_GRID_MM = 0.01


@dataclass(frozen=True, eq=False)
class TrueBoxes:
    """What is known of the truth.

    Args:
        boxes: disease key -> volume id -> (M, 6) boxes in mm from the volume's corner; M = 0 where it is known that
            there is none, no entry where nothing is known.
        extents_mm: volume id -> (3,), size of the volume along x, y, z; empty where the source does not tell.
        remarks: what was not used, one line each.
    """

    boxes: Mapping[str, Mapping[str, np.ndarray]]
    extents_mm: Mapping[str, np.ndarray]
    remarks: tuple[str, ...] = ()

    def volume_ids(self) -> list[str]:
        """Return the volumes of which something is known, sorted."""
        return sorted({volume_id for of_disease in self.boxes.values() for volume_id in of_disease})

    def restricted_to(self, volume_ids: Sequence[str]) -> TrueBoxes:
        """Return the truth of a list of scans that were all annotated: where there is no box, there is no lesion."""
        none = np.zeros((0, 6))
        boxes = {
            disease: {volume_id: of_disease.get(volume_id, none) for volume_id in volume_ids}
            for disease, of_disease in self.boxes.items()
        }
        return TrueBoxes(boxes, self.extents_mm, self.remarks)


def true_boxes_of_masks(folder: Path, diseases: DiseaseSet) -> TrueBoxes:
    """Return the boxes of ``<disease>/<volume_id>.nii.gz`` (or ``.nii``), one for each connected component.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no mask of a disease of the set, a mask cannot be used, or two masks of a volume lie on
            different grids.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder, expected <disease>/<volume_id>.nii.gz in it; check the path."
        )
    boxes: dict[str, dict[str, np.ndarray]] = {key: {} for key in diseases.keys}
    volume_boxes: dict[str, tuple[np.ndarray, Path]] = {}
    for key in diseases.keys:
        for path in sorted((folder / key).glob("*")):
            if not is_nifti_name(path):
                continue
            volume_id = volume_name(path.name)
            mask, geometry = read_mask(path)
            whole = np.array(volume_box_mm(geometry))
            first, first_path = volume_boxes.setdefault(volume_id, (whole, path))
            if np.abs(first - whole).max() > _SAME_GRID_MM:
                raise ValueError(
                    f"{path}: fills the box {np.round(whole, 2).tolist()} mm, but {first_path} fills "
                    f"{np.round(first, 2).tolist()}; expected one grid for a volume; correct the mask that is wrong."
                )
            found = np.array([entry["bbox_mm"] for entry in boxes_of_mask(mask, geometry)]).reshape(-1, 6)
            boxes[key][volume_id] = found - [*whole[:3], 0, 0, 0]
    if not volume_boxes:
        raise ValueError(f"{folder}: has no mask, expected <disease>/<volume_id>.nii.gz with {list(diseases.keys)}.")
    unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in diseases.keys)
    remarks = (f"{folder}: folders of no disease of the set, not read: {unknown}",) if unknown else ()
    return TrueBoxes(boxes, {volume_id: whole[3:] for volume_id, (whole, _) in volume_boxes.items()}, remarks)


def true_boxes_of_file(path: Path, diseases: DiseaseSet) -> TrueBoxes:
    """Return the boxes of a file in the challenge's form; an empty list says that there is no lesion.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as `read_challenge_localization`.
    """
    content = read_challenge_localization(path, diseases)
    boxes = {
        key: {volume_id: of_volume[key].bbox_mm for volume_id, of_volume in content.volumes.items()}
        for key in diseases.keys
    }
    # How a file of truth is wrapped and named is no concern of the challenge.
    remarks = tuple(warning for warning in content.warnings if "outside of" in warning)
    return TrueBoxes(boxes, {}, remarks)


def read_scan_list(path: Path) -> tuple[str, ...]:
    """Return the volume ids of a list, one a line, or of a CSV file with a column VolumeName, volume_id, AccessionNo or
    input_image_name; folders and extensions are dropped, repeated ids too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not text, has no volume, or has several columns of which none names volumes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a list of volume ids; check the path.")
    try:
        rows = [[field.strip() for field in row] for row in csv.reader(path.read_text("utf-8-sig").splitlines())]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no text ({error}), expected a list of volume ids; save it as UTF-8.") from None
    rows = [row for row in rows if any(row)]
    column = next((rows[0].index(name) for name in _VOLUME_COLUMNS if name in rows[0]), None) if rows else None
    if column is None and any(len(row) > 1 for row in rows):
        raise ValueError(f"{path}: has the columns {rows[0]}, expected one of {list(_VOLUME_COLUMNS)}; rename it.")
    names = [row[column or 0] for row in rows[column is not None :] if len(row) > (column or 0)]
    volume_ids = tuple(dict.fromkeys(volume_name(name) for name in names if name))
    if not volume_ids:
        raise ValueError(f"{path}: has no volume id, expected one a line; list the scans that were scored.")
    return volume_ids
