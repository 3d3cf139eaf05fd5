"""The one door through which a user's scans come to the networks: whatever they are, prepared as in training.

NIfTI files, DICOM series and cases that are prepared already, one of them or a folder of any mix, become a prepared
data set whose manifest every bundle reads. A bad scan is refused with its reason and stops none of the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from data_prep.case_preparation import one_line, read_finished_sidecars
from data_prep.given_scan import ACCEPTED, ScanIntakeError, content_sha256, locate_scan
from data_prep.preparation_run import MaskSources, PreparationResult, run_preparation
from data_prep.preparation_settings import PreparationSettings
from data_prep.raw_case import LayoutError, RawDataset
from data_prep.readable_folders import walk_readable
from data_prep.scan_folder import read_scan_folder
from data_prep.scan_kind import ScanKind, scan_kind
from vlm3d_ext.data.atomic_files import TEMPORARY_SUFFIX, write_json
from vlm3d_ext.data.chest_check import chest_notes
from vlm3d_ext.data.prepared_case import PreparedCaseError
from vlm3d_ext.text.label_set import LabelSet, load_label_set

__all__ = ["ScanIntake", "ScanIntakeError"]

logger = logging.getLogger(__name__)

LOG_NAME = "intake_log.json"

# What the bundles call the index of a folder of results; a scan's result of that name would take its place.
_NAMES_OF_INDEXES = ("classification", "localization", "multitask", "report_generation")
_DEFAULT_LABEL_SET = "ct_rate_18"
_NUM_SHOWN = 10  # of refusals and notes in the log of the run; intake_log.json has all
# Reasons are written for the command that prepares training data; here there are no options of that kind.
_OTHER_WORDS = (
    (
        "it looks as if slope and intercept were not applied; pass rescale=(slope, intercept) from the metadata, or "
        "--no-hu-check if the volume holds no air at all",
        "it is no CT (a mask, an MR), or slope and intercept were not applied; leave it out, or export it in HU",
    ),
    ("so pass no rescale, or export it again; --no-hu-check switches the check off", "so export it again"),
    ("fewer --workers", "a smaller num_workers"),
    ("--output", "output_dir"),
)


class ScanIntake:
    """Prepares a user's scans exactly as the training data of a network were prepared.

    A folder is searched at every depth. Volume ids are made from the user's own names of files and folders, never from
    DICOM headers. Masks beside the scans are not looked for; regions inside an NPZ are kept. A run may be interrupted
    and started again, with the same folder or another: what is finished and made from the same bytes is kept.

    Args:
        scan: NIfTI file, folder of a DICOM series, NPZ of a prepared case (with or without its JSON sidecar), or a
            folder with any mix of them.
        output_dir: folder to write to: `prepared/` and `intake_log.json`; made if need be.
        preparation: settings of the training data, as their manifest has them under "settings".
        series_number: DICOM SeriesNumber to take where a folder holds several series; None takes the only one, or the
            only one that can be a chest scan.
        num_workers: processes; 0 works in this one.

    Attributes:
        refused: after `run`, `{"volume_id", "source", "reason"}` of each scan that cannot be used.
        notes: after `run`, volume id -> remarks on a prepared scan, such as that it does not look like a chest.
        sources: after `run`, volume id -> `{"path": Path, "format": "nifti" | "dicom" | "npz", "series_number": int or
            None}` of every scan found, refused ones included. Path and series number find a DICOM series again with
            `vlm3d_ext.data.dicom_series`, which makes the same choice as here where the number is None.

    Raises:
        ScanIntakeError: if the settings are not usable, or cut a scan into several windows: a result belongs to a
            whole scan.

    Example:
        >>> intake = ScanIntake("scans/", "results/", CaseManifest("prepared/manifest.json").content["settings"])
        >>> manifest = CaseManifest(intake.run())
    """

    def __init__(
        self,
        scan: str | os.PathLike,
        output_dir: str | os.PathLike,
        preparation: Mapping[str, Any],
        series_number: int | None = None,
        num_workers: int = 0,
    ) -> None:
        for name, value in (("scan", scan), ("output_dir", output_dir)):
            if value is None or not os.fspath(value).strip():
                raise ScanIntakeError(f"{name} is empty, expected a path; set {name}.")
        self.scan = Path(scan)
        self.output_dir = Path(output_dir)
        self.series_number = None if series_number is None else int(series_number)
        self.num_workers = num_workers
        try:
            self.settings = PreparationSettings.from_dict(preparation)
        except ValueError as error:
            raise ScanIntakeError(f"preparation: {error}") from None
        if self.settings.depth_policy == "windows":
            raise ScanIntakeError(
                "preparation: depth_policy is 'windows', which cuts a scan into several cases, expected 'resample' or "
                "'crop' for results on whole scans; use a network trained on data of such a policy."
            )
        self.label_set = _label_set(preparation)
        self.refused: list[dict[str, str]] = []
        self.notes: dict[str, list[str]] = {}
        self.sources: dict[str, dict[str, Any]] = {}

    @property
    def prepared_dir(self) -> Path:
        """Folder of the prepared data set."""
        return self.output_dir / "prepared"

    def run(self) -> Path:
        """Find the scans, prepare what is not prepared yet, and write manifest and log.

        Returns:
            The path of manifest.json, all of whose cases are in the split "test" with unknown labels.

        Raises:
            ScanIntakeError: if there is no scan, none can be used, or the output cannot be written.
        """
        self.refused, self.notes, self.sources = [], {}, {}
        source = locate_scan(self.scan, self.output_dir, self.series_number)
        dataset = self._identified(self._found(source))
        # Work in this process sets a single thread for all of SimpleITK, and what follows here is not ours.
        num_threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
        try:
            self._check_same_settings(dataset)
            result = self._prepared(dataset)
            self._write_log(dataset, result)
        except (FileExistsError, NotADirectoryError):
            raise ScanIntakeError(
                f"output_dir {self.output_dir}: is a file or lies below one, expected a folder; choose another."
            ) from None
        except LayoutError as error:
            raise ScanIntakeError(_in_our_words(one_line(error, {}))) from None
        except OSError as error:
            place = "" if error.filename else f"{self.output_dir}: "
            raise ScanIntakeError(f"output_dir {place}{_in_our_words(one_line(error, {}))}") from None
        finally:
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(num_threads)
        self._report(dataset, result)
        return result.manifest

    def _found(self, source: Path) -> RawDataset:
        try:
            return read_scan_folder(
                source,
                split="test",
                num_labels=self.label_set.num_findings,
                skip=[self.output_dir],
                with_prepared=True,
                taken_ids=_NAMES_OF_INDEXES,
            )
        except LayoutError:
            num_files = sum(len(names) for _, _, names in walk_readable(source, ".", []))
            raise ScanIntakeError(
                f"{self.scan}: holds no scan among its {num_files} files, expected {ACCEPTED}; check the path."
            ) from None

    def _identified(self, dataset: RawDataset) -> RawDataset:
        """Give each case the digest of its files, so that no other patient's scan of the same name is taken for it."""
        if self.series_number is not None and not any(case.path.is_dir() for case in dataset.cases):
            raise ScanIntakeError(
                f"{self.scan}: series_number {self.series_number} has no effect without a DICOM series; leave it out."
            )
        cases = []
        for case in dataset.cases:
            kind = "dicom" if case.path.is_dir() else "npz" if scan_kind(case.path) is ScanKind.NPZ else "nifti"
            number = self.series_number if kind == "dicom" else None
            self.sources[case.volume_id] = {"path": case.path, "format": kind, "series_number": number}
            try:
                case = replace(case, series_number=number, content_sha256=content_sha256(case.path))
            except OSError as error:
                case = case.refused(one_line(error, {str(dataset.root): ""}))
            cases.append(case)
        return replace(dataset, cases=tuple(cases))

    def _check_same_settings(self, dataset: RawDataset) -> None:
        for case in dataset.cases:
            try:
                sidecars = read_finished_sidecars(self.prepared_dir, case, self.settings.depth_policy) or []
            except PreparedCaseError:
                continue
            if any(sidecar.get("settings_digest") != self.settings.digest for sidecar in sidecars):
                raise ScanIntakeError(
                    f"{self.prepared_dir}: holds {case.volume_id} prepared with other settings, for another network, "
                    "expected none or the same; choose another output_dir, or remove that folder."
                )

    def _prepared(self, dataset: RawDataset) -> PreparationResult:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return run_preparation(
            dataset,
            self.settings,
            MaskSources(),
            self.prepared_dir.resolve(),
            run_settings={
                **self.settings.to_dict(),
                "layout": dataset.layout,
                "release": dataset.release,
                "anatomical_masks": "none",
                "label_set": self.label_set.name,
                "split": "test",
            },
            label_set=self.label_set,
            num_workers=self.num_workers,
            quiet=len(dataset.cases) < 2,
            inspect_scan=chest_notes,
        )

    def _write_log(self, dataset: RawDataset, result: PreparationResult) -> None:
        source_of = {case.volume_id: case.source for case in dataset.cases}
        entries = []
        for outcome in result.outcomes:
            reason = _in_our_words(outcome.reason)
            source = self.sources[outcome.volume_id]
            entries.append(
                {
                    "volume_id": outcome.volume_id,
                    # Relative, so that the log holds after scans and results have been moved together.
                    "path": Path(os.path.relpath(source["path"], self.output_dir.resolve())).as_posix(),
                    "format": source["format"],
                    "series_number": source["series_number"],
                    "status": outcome.status,
                    "reason": reason,
                    "notes": list(outcome.notes),
                }
            )
            if outcome.status == "prepared":
                self.notes[outcome.volume_id] = list(outcome.notes)
            else:
                self.refused.append(
                    {"volume_id": outcome.volume_id, "source": source_of[outcome.volume_id], "reason": reason}
                )
        statuses = [entry["status"] for entry in entries]
        content = {
            "settings": self.settings.to_dict(),
            "summary": {
                "prepared": statuses.count("prepared"),
                "refused": len(self.refused),
                "ignored_files": dataset.ignored_files,
            },
            "remarks": list(dataset.remarks),
            "scans": entries,
        }
        for leftover in self.output_dir.glob(f".{LOG_NAME}.*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)
        write_json(self.output_dir / LOG_NAME, content)

    def _report(self, dataset: RawDataset, result: PreparationResult) -> None:
        num_prepared = len(dataset.cases) - len(self.refused)
        if not num_prepared:
            first = self.refused[0]["reason"]
            if len(self.refused) == 1:
                raise ScanIntakeError(first)
            raise ScanIntakeError(
                f"{self.scan}: none of its {len(self.refused)} scans can be used; {self.output_dir / LOG_NAME} says "
                f"why; the first: {first}"
            )
        logger.info(
            "%s: %d scans prepared (%d of them finished before), %d refused, %d other files ignored; %s",
            self.scan,
            num_prepared,
            result.num_kept,
            len(self.refused),
            dataset.ignored_files,
            self.output_dir / LOG_NAME,
        )
        remarks = [*dataset.remarks, *(f"{one['volume_id']} refused: {one['reason']}" for one in self.refused)]
        remarks += [f"{volume_id}: {note}" for volume_id, notes in self.notes.items() for note in notes]
        for remark in remarks[:_NUM_SHOWN]:
            logger.warning("%s", remark)
        if len(remarks) > _NUM_SHOWN:
            logger.warning("... and %d more in %s", len(remarks) - _NUM_SHOWN, self.output_dir / LOG_NAME)


def _label_set(preparation: Mapping[str, Any]) -> LabelSet:
    name = preparation.get("label_set", _DEFAULT_LABEL_SET)
    try:
        return load_label_set(name)
    except (ValueError, TypeError, FileNotFoundError):
        # All labels are unknown here, so the set only names the places where they would be.
        logger.warning(
            "the label set %r of the training data does not ship with the package; the manifest of the scans names "
            "the findings of %s, all unknown.",
            name,
            _DEFAULT_LABEL_SET,
        )
        return load_label_set(_DEFAULT_LABEL_SET)


def _in_our_words(text: str) -> str:
    for theirs, ours in _OTHER_WORDS:
        text = text.replace(theirs, ours)
    return text
