"""Scans as users hand them in to the joint network's inference, and what it makes of them."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.bundle import ConfigParser, run

from data_prep.scan_intake import ScanIntake
from tests.bundles.bundle_runs import config_files
from tests.data.identified_series import FRAME_OF_REFERENCE, IDENTIFIERS
from tests.data.test_volume_geometry import rotation
from tests.data_prep.chest_scans import GEOMETRY, PREPARATION, chest, write_dicom
from tests.data_prep.tiny_release import write_volume
from vlm3d_ext.data.prepared_case import read_prepared_npz
from vlm3d_ext.text.disease_set import load_disease_set

INFERENCE = "multitask/inference"
DISEASES = load_disease_set().keys
NEVER_DRAWN = "consolidation"
KINDS = {"page", "findings", "lesions", "report", *(f"mask_{disease}" for disease in DISEASES)}
# Made anew at the end of each run, also where nothing was to do.
_REWRITTEN = ("tables/", "prepared/manifest.json", "prepared/preparation_log.json", "intake_log.json")
_LONG_BASE64 = re.compile(rb"[A-Za-z0-9+/=]{120,}")


def drawing_checkpoint(source: Path, path: Path, options: dict[str, Any]) -> Path:
    """Write a copy of a tiny joint network's checkpoint, as if it had been trained on `tests.data_prep.chest_scans`.

    However it was trained, a tenth of a chest is drawn of each disease but one, of which nothing ever is.

    Args:
        source: the checkpoint.
        path: the copy; what is made on the way lies beside it.
        options: of its inference.
    """
    content = torch.load(source, weights_only=True)
    content["preparation"] = {"settings": PREPARATION}
    parser = ConfigParser(ConfigParser.load_config_file(config_files(INFERENCE)[0]))
    parser.update(options)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(content["model"])
    case = read_prepared_npz(write_prepared(path.parent / "chest", seed=1, name="chest"))
    with torch.no_grad():
        image = torch.from_numpy(case.imgs)[None, None] / 255
        drawn = network(image, spacing_mm=torch.from_numpy(case.spacing)[None], generate=False)["localization"]
    thresholds = [1.0 if key == NEVER_DRAWN else float(drawn[key].quantile(0.9)) for key in DISEASES]
    content["model"]["localization.thresholds"][:] = torch.tensor(thresholds)
    content["model"]["localization.presence_thresholds"].zero_()
    torch.save(content, path)
    return path


def infer(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run the inference in this process; returns the records by volume id."""
    run(config_file=config_files(INFERENCE), workflow_type="infer", **options)
    return records_of(options["output_dir"])


def records_of(output_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Return the records of all scans, by volume id."""
    paths = sorted(Path(output_dir, "scans").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.name != "multitask.json"}


def probabilities_of(output_dir: Path, volume_id: str) -> dict[str, float]:
    """Return the findings' probabilities of a scan."""
    findings = json.loads((output_dir / "classification" / f"{volume_id}.json").read_text())["findings"]
    return {name: finding["probability"] for name, finding in findings.items()}


def mask_image(output_dir: Path, volume_id: str, disease: str) -> Any:
    """Return a drawn mask as NIfTI."""
    return nib.load(output_dir / "localization" / "masks" / disease / f"{volume_id}.nii.gz")


def stored_mask(output_dir: Path, volume_id: str, disease: str) -> np.ndarray:
    """Return a drawn mask (D, H, W), bool, as stored."""
    return np.asarray(mask_image(output_dir, volume_id, disease).dataobj).T > 0


def page_text(output_dir: Path, volume_id: str) -> str:
    """Return a page without the scan's data in it."""
    return (output_dir / "pages" / f"{volume_id}.html").read_text(encoding="utf-8")


def write_turned(path: Path, hu: np.ndarray) -> None:
    """Write a chest on `GEOMETRY` lying obliquely in the scanner, its axes stored as posterior, inferior, right."""
    affine = GEOMETRY.affine_ras.copy()
    affine[:3] = rotation(12, -7) @ affine[:3]
    image = nib.Nifti1Image(np.ascontiguousarray(hu.T), affine)
    wanted = nib.orientations.axcodes2ornt("PIR")
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), wanted))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(turned, path)


def write_identified_dicom(folder: Path, hu: np.ndarray, **changes: Any) -> Path:
    """Write a chest as a DICOM series with an identifier wherever there can be one, its file names among them."""
    elements = {"SpecificCharacterSet": "ISO_IR 100", **IDENTIFIERS, "FrameOfReferenceUID": FRAME_OF_REFERENCE}
    with pydicom.config.disable_value_validation():
        return write_dicom(folder, hu, prefix="jane_", **{**elements, **changes})


def write_prepared(folder: Path, seed: int, name: str) -> Path:
    """Write a chest as a prepared case, NPZ and sidecar, as `data_prep.prepare` makes it."""
    scan = write_volume(folder.parent / f"raw_of_{name}" / f"{name}.nii.gz", chest(seed), GEOMETRY)
    ScanIntake(scan, folder.parent / f"intake_of_{name}", PREPARATION).run()
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent / f"intake_of_{name}" / "prepared" / "volumes").iterdir():
        path.rename(folder / path.name)
    return folder / f"{name}.npz"


def result_files(output_dir: Path) -> dict[str, Path]:
    """Return the files that a second run leaves alone, by their path in the folder."""
    paths = {path.relative_to(output_dir).as_posix(): path for path in output_dir.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if not any(part in name for part in _REWRITTEN)}


def all_contents(output_dir: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder, and under the same name with a suffix what is packed in it."""
    contents = {}
    for path in sorted(output_dir.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(output_dir).as_posix()
        contents[name] = path.read_bytes()
        if path.suffix == ".gz":
            contents[f"{name} unpacked"] = gzip.decompress(contents[name])
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                contents |= {f"{name} {member}": archive.read(member) for member in archive.namelist()}
        elif path.suffix == ".html":
            # Four letters are in a picture's base64 by chance.
            contents[name] = _LONG_BASE64.sub(b"", contents[name])
    return contents
