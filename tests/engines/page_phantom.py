"""A small scan without any symmetry, and a page's content about it."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from vlm3d_ext.data.lesion_boxes import boxes_of_mask
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.engines.scan_page import ScanPageContent

GEOMETRY = VolumeGeometry.from_spacing((20, 36, 44), (3.0, 1.5, 1.5), (-30.0, 12.0, -200.0))
DISEASES = {"lung_nodule": "Lung nodule", "consolidation": "Consolidation", "pleural_effusion": "Pleural effusion"}
NODULE = (slice(4, 9), slice(20, 31), slice(26, 39))  # low, at the back, left
CONSOLIDATION = (slice(12, 17), slice(6, 11), slice(5, 14))  # high, in front, right
NODULE_SLICES = (6, 25, 32)
CONSOLIDATION_SLICES = (14, 8, 9)
ATTACK = "</script><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"

_SHA = {name: name[0] * 64 for name in ("encoder", "manifest", "localization")}
LINEAGE: dict[str, Any] = {
    "bundle": "multitask",
    "version": "0.4.0",
    "phase": "joint",
    "manifest": None,
    "package_versions": {"torch": "2.11.0"},
    "upstream": {
        "localization": {
            "path": "/home/someone/private/localization.pt",
            "sha256": _SHA["localization"],
            "lineage": {
                "bundle": "localization",
                "version": "0.3.0",
                "phase": "training",
                "upstream": {
                    "encoder": {
                        "path": "C:\\Users\\someone\\encoder.pt",
                        "sha256": _SHA["encoder"],
                        "lineage": {
                            "bundle": "encoder",
                            "version": "0.2.0",
                            "phase": "pretraining",
                            "manifest": {
                                "path": "/home/someone/prepared/manifest.json",
                                "sha256": _SHA["manifest"],
                                "fingerprint": "abc",
                                "name": "data",
                                "label_set": "vlm3d_18",
                            },
                            "upstream": {"text": None},
                        },
                    }
                },
            },
        }
    },
}


def phantom_hu() -> np.ndarray:
    """Return air with a body, a bone at the right front top, and soft tissue in both lesions."""
    hu = np.full(GEOMETRY.shape, -1000, dtype=np.int16)
    hu[:, 3:33, 2:42] = -800
    hu[14:19, 4:10, 24:34] = 900
    hu[NODULE] = 40
    hu[CONSOLIDATION] = 120
    hu[1:4, 5:20, 30:40] = -100
    return hu


def phantom_masks() -> dict[str, np.ndarray]:
    """Return the masks of both lesions, and an empty one."""
    masks = {disease: np.zeros(GEOMETRY.shape, dtype=bool) for disease in DISEASES}
    masks["lung_nodule"][NODULE] = True
    masks["consolidation"][CONSOLIDATION] = True
    return masks


def page_content(**changes: Any) -> ScanPageContent:
    """Return a page's content; `changes` replace parts of it."""
    masks = phantom_masks()
    lesions = {
        key: boxes_of_mask(mask, GEOMETRY, np.where(mask, 0.75, 0).astype(np.float32)) for key, mask in masks.items()
    }
    findings = [
        finding("Cardiomegaly", 0.1, position_mm=[-30.0 + 10 * 1.5, 12.0 + 7 * 1.5, -200.0 + 3 * 3.0]),
        finding("Lung nodule", 0.91, disease="lung_nodule", position_mm=lesions["lung_nodule"][0]["centroid_mm"]),
        finding("Consolidation", 0.6, disease="consolidation", position_mm=lesions["consolidation"][0]["centroid_mm"]),
        finding("Emphysema", 0.3, trained=False),
    ]
    report = {
        "volume_id": "valid_1_a_1",
        "sections": {
            "findings": "A nodule is  seen\nin the left lung. No pleural effusion. " + ATTACK,
            "impression": "Nodule & consolidation.",
            "recommendations": "",
        },
        "findings_list": [
            {
                "key": "lung_nodule",
                "status": "present",
                "sides": ["left"],
                "sentence": "A nodule is seen in the left lung.",
            },
            {"key": "pleural_effusion", "status": "absent", "sides": [], "sentence": "No pleural effusion."},
            {"key": "consolidation", "status": "present", "sides": [], "sentence": "Nodule & consolidation."},
        ],
        "metadata": {"finished": True, "evidence_of": "valid_1_a_1", "notice": "Written by a research model."},
    }
    content: dict[str, Any] = {
        "volume_id": "valid_1_a_1",
        "hu": phantom_hu(),
        "geometry": GEOMETRY,
        "masks": masks,
        "diseases": DISEASES,
        "findings": findings,
        "lesions": lesions,
        "report": report,
        "lineage": LINEAGE,
        "checkpoint_sha256": "c" * 64,
        "notes": [f"looks like no chest {ATTACK}"],
    }
    return ScanPageContent(**{**content, **changes})


def finding(name: str, probability: float, **more: Any) -> dict[str, Any]:
    """Return a finding with the threshold 0.5; with a position it is a lesion's if it has a disease."""
    entry = {
        "name": name,
        "probability": probability,
        "threshold": 0.5,
        "prediction": int(probability >= 0.5),
        "trained": True,
        "disease": None,
        "position_mm": None,
        "position_of": None,
        **more,
    }
    if entry["position_mm"] is not None:
        entry["position_of"] = "lesion" if entry["disease"] else "region"
    return entry


def embedded_data(page: str) -> dict[str, Any]:
    """Return what the page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="scan-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)
