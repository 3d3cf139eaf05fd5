"""Four cases with reports whose figures can be counted by hand, and four systems' worth of texts."""

from __future__ import annotations

import numpy as np

from vlm3d_ext.text.finding_extractor import FindingExtractor

EXTRACTOR = FindingExtractor("ct_rate_18")
CASE_IDS = ["valid_1_a_1", "valid_2_a_1", "valid_2_b_1", "valid_3_a_1"]
PATIENTS = ["valid_1", "valid_2", "valid_2", "valid_3"]
TRUE_FINDINGS = (("lung_nodule", "pleural_effusion"), ("pleural_effusion", "cardiomegaly"), (), ("emphysema",))
REFERENCES = [
    "Findings: There is a 7 mm nodule in the right upper lobe. Small left pleural effusion. Impression: Lung nodule.",
    "Findings: Bilateral pleural effusion. The heart is enlarged. Impression: Cardiomegaly.",
    "Findings: No pleural effusion. Heart size is normal. Impression: Normal examination.",
    "Findings: Emphysema in both lungs. Impression: Emphysema.",
]
GENERATED = [
    "Findings: There is a nodule in the left lower lobe. Left pleural effusion is seen. Impression: Lung nodule.",
    "Findings: Right pleural effusion. Emphysema in both lungs. Impression: Pleural effusion.",
    "Findings: A nodule is seen in the right lung. Impression: Nodule.",
    "Findings: Emphysema in both lungs. Impression: Emphysema.",
]
# What these say, finding by finding, (true, false positives, missed): nodule (1, 1, 0), effusion (2, 0, 0),
# cardiomegaly (0, 0, 1), emphysema (1, 1, 0). Sides: nodule wrong, effusion right, effusion wrong, emphysema right.


def make_labels() -> np.ndarray:
    """Return the labels (4, 18) of the cases."""
    labels = np.zeros((4, len(EXTRACTOR.keys)))
    for case, keys in enumerate(TRUE_FINDINGS):
        for key in keys:
            labels[case, EXTRACTOR.keys.index(key)] = 1
    return labels
