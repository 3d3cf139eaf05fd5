"""Lesion masks that TotalSegmentator drew, as CT-RATE ships them: pseudo-masks of three of the five diseases.

CT-RATE keeps them in ``anatomy_segmentation_labels/ts_seg/<folder>/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz``,
one multi-label file per volume and task. Where a file's header names its labels, as TotalSegmentator writes it, the
names decide; otherwise the class ids of the task do.

Source: the class maps in ``totalsegmentator/map_to_binary.py`` of github.com/wasserth/TotalSegmentator; the folders are
those of the CT-RATE data set card. That CT-RATE's files keep TotalSegmentator's class ids is assumed: a file that
held a single class as 1 would read as lung alone, and show up in the log as an empty mask for a positive label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.anatomical_masks import label_names
from data_prep.lesion_masks import MASK_EXTENSIONS, LesionMask, LesionMaskIndex
from data_prep.readable_folders import walk_readable
from vlm3d_ext.data.scan import UnusableScanError

__all__ = ["LESION_TASKS", "TOTALSEGMENTATOR", "LesionTask", "class_voxels", "find_totalsegmentator_lesions"]

TOTALSEGMENTATOR = "totalsegmentator"
"""Name of this source."""


@dataclass(frozen=True)
class LesionTask:
    """A task of TotalSegmentator that draws lesions.

    Args:
        folder: CT-RATE's folder of its files.
        class_names: label -> class.
        diseases: class -> disease key; the other classes are anatomy.
    """

    folder: str
    class_names: Mapping[int, str]
    diseases: Mapping[str, str]


LESION_TASKS = {
    "lung_nodules": LesionTask("ts_lung_nodules", {1: "lung", 2: "lung_nodules"}, {"lung_nodules": "lung_nodule"}),
    "pleural_pericard_effusion": LesionTask(
        "ts_pleural_pericard_effusion",
        {1: "lung_pleural", 2: "pleural_effusion", 3: "pericardial_effusion"},
        {"pleural_effusion": "pleural_effusion", "pericardial_effusion": "pericardial_effusion"},
    ),
}
"""Task -> what its files hold."""


def find_totalsegmentator_lesions(folder: Path) -> LesionMaskIndex:
    """Index the pseudo-masks below CT-RATE's ``ts_seg`` folder by volume id and disease; opens no file."""
    found: dict[str, dict[str, list[LesionMask]]] = defaultdict(lambda: defaultdict(list))
    remarks: list[str] = []
    for task_name, task in LESION_TASKS.items():
        if not (folder / task.folder).is_dir():
            continue
        for directory, _, names in walk_readable(folder, task.folder, remarks):
            for name in names:
                extension = next((end for end in MASK_EXTENSIONS if name.endswith(end)), None)
                if extension is None:
                    continue
                for class_name, disease in task.diseases.items():
                    mask = LesionMask(directory / name, TOTALSEGMENTATOR, task_name, class_name)
                    found[name.removesuffix(extension)][disease].append(mask)
    by_volume = {
        volume: {disease: tuple(masks) for disease, masks in of_volume.items()} for volume, of_volume in found.items()
    }
    return LesionMaskIndex(by_volume, tuple(remarks), TOTALSEGMENTATOR)


def class_voxels(path: Path, labels: np.ndarray, task: str, class_name: str) -> np.ndarray:
    """Return the voxels of one class.

    Args:
        path: the file, for its header's names and for messages.
        labels: its (D, H, W) unsigned labels.
        task: name of the task.
        class_name: one of its classes.

    Returns:
        (D, H, W) uint8, 0 or 1.

    Raises:
        UnusableScanError: if a label is not one of the task's, or the header does not name the class.
    """
    names = label_names(path) or dict(LESION_TASKS[task].class_names)
    if class_name not in names.values():
        raise UnusableScanError(
            f"{path}: its header names the classes {sorted(names.values())}, expected {class_name!r} among them; make "
            f"it again with TotalSegmentator's task {task!r}."
        )
    # Slice by slice: numpy would make 8 bytes of every voxel of the volume at once.
    present = {int(label) for plane in labels for label in np.flatnonzero(np.bincount(plane.ravel()))}
    strangers = sorted(present - {0} - set(names))
    if strangers:
        raise UnusableScanError(
            f"{path}: holds label(s) {strangers[:5]}, expected 0 or {dict(sorted(names.items()))} of "
            f"TotalSegmentator's task {task!r}; make it again with that task, or leave it out."
        )
    wanted = next(label for label, name in names.items() if name == class_name)
    return (labels == wanted).astype(np.uint8)
