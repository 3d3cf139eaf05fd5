"""Inference's face: a page for each scan, DICOM objects where it came as DICOM, and the record of all its files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from ..checkpoint_files import file_sha256
from ..data.case_manifest import CaseManifest
from ..data.dicom_report import write_dicom_report
from ..data.dicom_segmentation import write_dicom_segmentation
from ..data.dicom_series import dicom_series_files
from ..data.localization_store import LocalizationStore
from ..data.prediction_store import PredictionStore
from ..data.prepared_case import read_sidecar
from ..data.region_position import position_of_regions, regions_in_scan
from ..data.report_store import ReportStore
from ..data.scan import UnusableScanError
from ..data.scan_reader import read_mask
from ..data.scan_result_store import ScanResultStore
from ..data.volume_geometry import VolumeGeometry
from ..engines.scan_page import ScanPageContent, write_scan_page
from ..engines.scan_picture import read_picture
from ..lineage import read_lineage
from ..text.disease_set import DiseaseSet
from ..text.label_set import LabelSet

__all__ = ["ScanResultWriter"]

logger = logging.getLogger(__name__)


class ScanResultWriter:
    """Makes of each scan's stored findings, lesions and report what a person looks at and an archive takes.

    Comes after the handlers that write the three stores. For each scan: ``pages/<volume_id>.html``; where the scan was
    a DICOM series, ``dicom_seg/<volume_id>.dcm`` if anything was drawn and, by option, ``dicom_sr/<volume_id>.dcm``;
    last the record in `store`.

    Args:
        store: of the records; the other files go beside its folder.
        predictions: findings.
        localizations: lesions and masks.
        reports: texts.
        manifest: of the scans, which says where they are.
        label_set: the findings, with the regions where they live.
        disease_set: the diseases that are drawn.
        ckpt_path: the checkpoint that all comes from.
        series_number: that was asked for, of a DICOM folder with several series.
        dicom_sr: whether to write reports as DICOM SR, too.
        copy_patient_module: whether DICOM objects name the patient as the source does; see `write_dicom_segmentation`.
    """

    def __init__(
        self,
        store: ScanResultStore,
        predictions: PredictionStore,
        localizations: LocalizationStore,
        reports: ReportStore,
        manifest: CaseManifest,
        label_set: LabelSet,
        disease_set: DiseaseSet,
        ckpt_path: str | os.PathLike,
        series_number: int | None = None,
        dicom_sr: bool = False,
        copy_patient_module: bool = False,
    ) -> None:
        self.store = store
        self.predictions = predictions
        self.localizations = localizations
        self.reports = reports
        self.source_root = Path(manifest.path).parent / manifest.content.get("source_root", ".")
        self.label_set = label_set
        self.disease_set = disease_set
        self.ckpt_path = ckpt_path
        self.series_number = series_number
        self.dicom_sr = dicom_sr
        self.copy_patient_module = copy_patient_module
        self.output_dir = store.folder.parent

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network is a `VLM3DMultiTask`, without decollation; its batches hold "volume_id"
        and "geometry", the paths of the sidecars."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _forget(self, engine: Engine) -> None:
        """Remove what an earlier run left of scans that have changed since, before anything of them is replaced."""
        state: Any = engine.state
        for volume_id in state.batch["volume_id"]:
            self.store.forget(volume_id)
            for name in (_page_name(volume_id), *_dicom_names(volume_id).values()):
                (self.output_dir / name).unlink(missing_ok=True)

    def __call__(self, engine: Engine) -> None:
        """Write what there is to each scan of the batch."""
        state: Any = engine.state
        regions = state.output["pred"]["evidence"]["regions"].cpu().numpy()
        for row, (volume_id, sidecar) in enumerate(zip(state.batch["volume_id"], state.batch["geometry"], strict=True)):
            self.write(volume_id, Path(sidecar), regions[row])

    def write(self, volume_id: str, sidecar_path: Path, regions: np.ndarray) -> None:
        """Write page, DICOM objects and record of one scan whose stores are filled.

        Args:
            volume_id: the scan's.
            sidecar_path: of the prepared case.
            regions: (D, H, W), the anatomical region of each voxel of the prepared grid, which may be filled up at its
                ends.
        """
        sidecar = read_sidecar(sidecar_path)
        source_geometry = VolumeGeometry.from_dict(sidecar["source_geometry"])
        prepared_geometry = VolumeGeometry.from_dict(sidecar["prepared_geometry"])
        # masks as they stand in the files, axes as a reader's canonical order has them
        masks = {
            disease: read_mask(self.localizations.mask_path(disease, volume_id))[0].astype(bool)
            for disease in self.disease_set.keys
        }
        notes = list(sidecar.get("notes", ()))
        files = {
            "page": _page_name(volume_id),
            "findings": f"classification/{volume_id}.json",
            "lesions": f"localization/{volume_id}.json",
            "report": f"report_generation/{volume_id}.txt",
            **{
                f"mask_{disease}": os.path.relpath(self.localizations.mask_path(disease, volume_id), self.output_dir)
                for disease in self.disease_set.keys
            },
        }
        source = self.source_root / sidecar["source"]
        lineage = read_lineage(self.ckpt_path)
        if sidecar["source_format"] == "dicom":
            files |= self._write_dicom(volume_id, source, masks, source_geometry, str(lineage["version"]), notes)
        picture = read_picture(source, sidecar_path, self.series_number)
        write_scan_page(
            self.output_dir / files["page"],
            ScanPageContent(
                volume_id=volume_id,
                hu=picture.hu,
                geometry=picture.geometry,
                masks=masks,
                diseases=dict(zip(self.disease_set.keys, self.disease_set.names, strict=True)),
                findings=self._findings(
                    volume_id, regions_in_scan(regions, prepared_geometry, source_geometry), prepared_geometry
                ),
                lesions={key: of["lesions"] for key, of in self.localizations.read(volume_id).items()},
                report=self.reports.read(volume_id),
                lineage=lineage,
                checkpoint_sha256=file_sha256(self.ckpt_path),
                notes=[*notes, *picture.notes],
            ),
        )
        self.store.write(
            volume_id,
            {
                "source": sidecar["source"],
                "source_format": sidecar["source_format"],
                "input_digest": sidecar["input_digest"],
                "content_sha256": sidecar["content_sha256"],
                "files": files,
                "notes": notes,
            },
        )
        logger.info("%s: %s", volume_id, self.output_dir / files["page"])

    def _write_dicom(
        self,
        volume_id: str,
        source: Path,
        masks: Mapping[str, np.ndarray],
        source_geometry: VolumeGeometry,
        version: str,
        notes: list[str],
    ) -> dict[str, str]:
        """Write the DICOM objects; return their names, and note what there is none of and why: a series whose headers
        were emptied can be read, but not be referred to."""
        names = dict(zip(self.disease_set.keys, self.disease_set.names, strict=True))
        own_axes = {key: np.ascontiguousarray(source_geometry.from_canonical(mask)) for key, mask in masks.items()}
        files = _dicom_names(volume_id)
        written: dict[str, str] = {}
        try:
            series_files = dicom_series_files(source, self.series_number)
            drawn = write_dicom_segmentation(
                self._made_folder(files["dicom_seg"]),
                series_files,
                own_axes,
                names,
                source_geometry,
                algorithm_version=version,
                copy_patient_module=self.copy_patient_module,
            )
            if drawn is None:
                notes.append("no DICOM SEG: nothing was drawn")
            else:
                written["dicom_seg"] = files["dicom_seg"]
            report = self.reports.read(volume_id)
            if self.dicom_sr and not any(report["sections"].values()):
                notes.append("no DICOM SR: the report has no section")
            elif self.dicom_sr:
                write_dicom_report(
                    self._made_folder(files["dicom_sr"]),
                    series_files,
                    report,
                    self.predictions.read(volume_id),
                    algorithm_version=version,
                    copy_patient_module=self.copy_patient_module,
                )
                written["dicom_sr"] = files["dicom_sr"]
        except UnusableScanError as error:
            notes.append(f"no DICOM objects: {error}")
            logger.warning("%s: no DICOM objects: %s", volume_id, error)
        return written

    def _made_folder(self, name: str) -> Path:
        path = self.output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _findings(self, volume_id: str, regions: np.ndarray, geometry: VolumeGeometry) -> list[dict[str, Any]]:
        """Return the findings with the place of their largest lesion, or of their largest region on its grid."""
        disease_of = dict(zip(self.disease_set.names, self.disease_set.keys, strict=True))
        regions_of = {finding.name: finding.regions for finding in self.label_set.findings}
        lesions = self.localizations.read(volume_id)
        findings = []
        for name, values in self.predictions.read(volume_id).items():
            disease = disease_of.get(name)
            place: dict[str, Any] = {"position_mm": None, "position_of": None}
            if disease is not None and lesions[disease]["lesions"]:
                largest = max(lesions[disease]["lesions"], key=lambda lesion: lesion["volume_ml"])
                place = {"position_mm": largest["centroid_mm"], "position_of": "lesion"}
            else:
                position = position_of_regions(regions, regions_of.get(name, ()), geometry)
                if position is not None:
                    place = {"position_mm": position, "position_of": "region"}
            findings.append({"name": name, **values, "disease": disease, **place})
        return findings


def _page_name(volume_id: str) -> str:
    return f"pages/{volume_id}.html"


def _dicom_names(volume_id: str) -> dict[str, str]:
    return {kind: f"{kind}/{volume_id}.dcm" for kind in ("dicom_seg", "dicom_sr")}
