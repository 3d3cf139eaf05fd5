"""Finding the volumes of a CT-RATE download and joining them with its tables.

The layout::

    train_fixed/train_1/train_1_a/train_1_a_1.nii.gz     release v2; v1 has train/ and valid/, whose headers are blank
    multi_abnormality_labels/  radiology_text_reports/  metadata/     see `data_prep.ct_rate_tables`

Source: the CT-RATE data set card (Hamamci et al., arXiv 2403.17834).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.ct_rate_tables import read_label_table, read_metadata_table, read_no_chest_list, read_report_table
from data_prep.raw_case import LayoutError, RawCase, RawDataset
from data_prep.readable_folders import walk_readable
from vlm3d_ext.data.csv_table import RowLookup, volume_name
from vlm3d_ext.text.label_set import LabelSet

__all__ = ["find_ct_rate_root", "read_ct_rate"]

_SPLIT_FOLDERS = {
    "v1": {"train": "train", "valid": "valid"},
    "v2": {"train": "train_fixed", "valid": "valid_fixed"},
}
_SPLITS = {"train": "training", "valid": "test"}  # the official valid part is for the last measurement only
_VOLUME_ID = re.compile(r"(?P<patient>[A-Za-z]+_\d+)_(?P<scan>[A-Za-z]+)_(?P<reconstruction>\d+)")


def find_ct_rate_root(source: Path) -> Path | None:
    """Return the folder that holds CT-RATE's split folders (`source` or ``source/dataset``), or None.

    ``train`` and ``valid`` alone are common names; they count only beside one of CT-RATE's table folders.
    """
    for root in (source, source / "dataset"):
        tables = any(
            (root / name).is_dir() for name in ("multi_abnormality_labels", "metadata", "radiology_text_reports")
        )
        for release, folders in _SPLIT_FOLDERS.items():
            if (release == "v2" or tables) and any((root / folder).is_dir() for folder in folders.values()):
                return root
    return None


def read_ct_rate(root: Path, *, label_set: LabelSet, release: str = "auto", reconstructions: str = "all") -> RawDataset:
    """Read the layout and the tables; opens no volume.

    Args:
        root: folder with the split folders (see `find_ct_rate_root`).
        label_set: the labels to keep (see `data_prep.ct_rate_tables.read_label_table`).
        release: ``"v1"``, ``"v2"``, or ``"auto"``: v2 where its folders exist.
        reconstructions: ``"all"``, or ``"first"`` to keep the lowest usable reconstruction number of each scan.

    Raises:
        LayoutError: if a table's columns do not fit, the release has no folder here, or v1 has no metadata table.
    """
    release = _resolve_release(root, release)
    cases: list[RawCase] = []
    rows_without_file: set[str] = set()
    files_without_row: set[str] = set()
    remarks: list[str] = []
    ignored_files = 0
    for split, folder in _SPLIT_FOLDERS[release].items():
        if not (root / folder).is_dir():
            continue
        files, ignored = _volume_files(root, folder, remarks)
        ignored_files += ignored
        labels = read_label_table(root, split, label_set, _scan_of, remarks)
        reports = read_report_table(root, split, _scan_of, remarks)
        metadata = read_metadata_table(root, split) if release == "v1" else None
        no_chest = read_no_chest_list(root, split)
        for volume_id, paths in sorted(files.items()):
            case = _make_case(root, split, volume_id, paths, num_labels=len(label_set.names))
            if volume_id in no_chest:
                case = case.excluded(f"listed in {no_chest[volume_id]} as not showing a chest")
            if labels is not None:
                row = labels.find(volume_id)
                case = _apply(case, row)
                if row.found:
                    case = replace(case, labels=row.value or case.labels)
                else:
                    files_without_row.add(volume_id)
                    case = case.noted(f"no row in {labels.table.label}: its labels are unknown")
            if reports is not None:
                row = reports.find(volume_id)
                case = replace(_apply(case, row), report=row.value)
            if metadata is not None:
                row = metadata.find(volume_id)
                case = _apply(case, row)
                if not row.found:
                    case = case.refused(
                        f"{case.source}: no row in {metadata.table.label}, but a v1 volume's HU and spacing are "
                        f"known only "
                        "there; add the row."
                    )
                elif row.value:
                    case = replace(
                        case,
                        stored_values=(row.value.slope, row.value.intercept),
                        spacing_mm=row.value.spacing_mm,
                    )
            cases.append(case)
        scans = {_scan_of(volume_id) for volume_id in files}
        for table in (labels, reports, metadata):
            for name in table.names if table else ():
                if name not in files and (_VOLUME_ID.fullmatch(name) or name not in scans):
                    rows_without_file.add(name)
    cases = _refuse_patients_of_both_splits(cases)
    if reconstructions == "first":
        cases = _keep_first_reconstructions(cases)
    return RawDataset(
        root=root,
        layout="ct_rate",
        release=release,
        cases=tuple(sorted(cases, key=lambda case: (case.volume_id, case.source))),
        rows_without_file=tuple(sorted(rows_without_file)),
        files_without_row=tuple(sorted(files_without_row)),
        remarks=tuple(remarks),
        ignored_files=ignored_files,
    )


def _resolve_release(root: Path, release: str) -> str:
    present = [
        name for name, parts in _SPLIT_FOLDERS.items() if any((root / folder).is_dir() for folder in parts.values())
    ]
    wanted = ["v2", "v1"] if release == "auto" else [release]
    for name in wanted:
        if name in present:
            return name
    folders = [folder for name in wanted for folder in _SPLIT_FOLDERS[name].values()]
    raise LayoutError(
        f"{root.name or root}: holds none of the folders {folders}; give --source the folder that does, another "
        f"--release, "
        "or --layout scan_folder."
    )


def _volume_files(root: Path, folder: str, remarks: list[str]) -> tuple[dict[str, list[Path]], int]:
    """Return volume id -> its files (more than one is a mistake of the download), and the number of other files."""
    files: dict[str, list[Path]] = defaultdict(list)
    ignored = 0
    for directory, _, names in walk_readable(root, folder, remarks):
        for name in names:
            if name.lower().endswith((".nii.gz", ".nii")):
                files[volume_name(name)].append(Path(directory, name))
            else:
                ignored += 1
    return dict(files), ignored


def _scan_of(volume_id: str) -> str:
    match = _VOLUME_ID.fullmatch(volume_id)
    return f"{match['patient']}_{match['scan']}" if match else volume_id


def _make_case(root: Path, split: str, volume_id: str, paths: Sequence[Path], num_labels: int) -> RawCase:
    match = _VOLUME_ID.fullmatch(volume_id)
    case = RawCase(
        volume_id=volume_id,
        scan_id=_scan_of(volume_id),
        patient_id=match["patient"] if match else volume_id,
        split=_SPLITS[split],
        path=paths[0],
        source=paths[0].relative_to(root).as_posix(),
        labels=(None,) * num_labels,
    )
    if not match:
        return case.refused(
            f"{case.source}: a CT-RATE volume is called <split>_<patient>_<scan>_<reconstruction>, as in train_1_a_1; "
            "rename it, or prepare its folder with --layout scan_folder."
        )
    if len(paths) > 1:
        names = " and ".join(path.relative_to(root).as_posix() for path in paths)
        return case.refused(f"{names} are both called {volume_id}, expected one file; keep the right one.")
    return case


def _apply(case: RawCase, row: RowLookup) -> RawCase:
    case = case.noted(*row.notes)
    return case.refused(row.refusal) if row.refusal else case


def _refuse_patients_of_both_splits(cases: Sequence[RawCase]) -> list[RawCase]:
    splits_of: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        splits_of[case.patient_id].add(case.split)
    return [
        case
        if len(splits_of[case.patient_id]) == 1
        else case.refused(
            f"{case.source}: patient {case.patient_id} has volumes in the train and in the valid folder, "
            f"expected one of "
            "them; move the files to where they belong."
        )
        for case in cases
    ]


def _keep_first_reconstructions(cases: Sequence[RawCase]) -> list[RawCase]:
    usable: dict[str, list[RawCase]] = defaultdict(list)
    for case in cases:
        if not case.refusal and not case.exclusion:
            usable[case.scan_id].append(case)
    first = {scan: min(group, key=_reconstruction_number).volume_id for scan, group in usable.items()}
    return [
        case
        if case.refusal or case.exclusion or first[case.scan_id] == case.volume_id
        else case.excluded(f"another reconstruction of the scan is kept ({first[case.scan_id]})")
        for case in cases
    ]


def _reconstruction_number(case: RawCase) -> int:
    return int(case.volume_id.rsplit("_", 1)[1])
