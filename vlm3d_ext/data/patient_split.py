"""Choosing validation and test patients by a hash, so that the choice survives a growing data set.

Each patient gets a number in [0, 1) from the SHA-256 of the seed and the patient's id alone. A patient belongs to
validation when that number is below the wanted share. Whoever joins or leaves the data set therefore moves nobody
else, whatever the order of the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["choose_held_out_patients", "patient_position", "split_patients"]


def patient_position(patient_id: str, seed: int) -> float:
    """Return the patient's place in [0, 1): the first 52 bits of ``sha256("<seed>:<patient_id>")`` as a fraction.

    52 bits, because every such fraction is a float exactly.
    """
    digest = hashlib.sha256(f"{seed}:{patient_id}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 12) / 2**52


def choose_held_out_patients(patient_ids: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Return the patients to hold out (for validation): those whose `patient_position` is below `fraction`.

    With at least two patients and a fraction above 0, at least one patient is held out and at least one is not: the
    patient of lowest position is taken, or the one of highest position left, when the hash alone would say otherwise.
    Only in that case (a tiny data set) can a new patient change the place of another.

    Args:
        patient_ids: the patients, in any order, repeats allowed.
        fraction: expected share to hold out, in [0, 1).
        seed: another seed gives another choice.

    Raises:
        ValueError: if `fraction` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be at least 0 and below 1, got {fraction}.")
    ordered = sorted(set(patient_ids), key=lambda patient: (patient_position(patient, seed), patient))
    held_out = {patient for patient in ordered if patient_position(patient, seed) < fraction}
    if fraction == 0 or len(ordered) < 2:
        return set()
    if not held_out:
        return {ordered[0]}
    if len(held_out) == len(ordered):
        held_out.remove(ordered[-1])
    return held_out


def split_patients(
    patient_ids: Iterable[str], *, validation_fraction: float, test_fraction: float, seed: int
) -> dict[str, str]:
    """Return patient id -> ``"training"``, ``"validation"`` or ``"test"`` for data that come without an official split.

    Test patients are chosen first, from all; validation patients from the others, by a second hash, so that changing
    the validation share never changes the test patients.

    Raises:
        ValueError: if a fraction is outside [0, 1).
    """
    patients = set(patient_ids)
    test = choose_held_out_patients(patients, test_fraction, seed)
    # The test choice empties one end of the hash's range; a hash of its own keeps the validation share what was asked.
    held_out = choose_held_out_patients(
        {f"validation:{patient}" for patient in patients - test}, validation_fraction, seed
    )
    validation = {patient.removeprefix("validation:") for patient in held_out}
    return {
        patient: "test" if patient in test else "validation" if patient in validation else "training"
        for patient in patients
    }
