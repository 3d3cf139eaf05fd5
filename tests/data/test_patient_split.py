import hashlib

import pytest

from vlm3d_ext.data.patient_split import choose_held_out_patients, patient_position, split_patients

PATIENTS = [f"train_{number}" for number in range(2000)]


def test_position_is_the_leading_bits_of_the_hash():
    leading = hashlib.sha256(b"7:train_1").hexdigest()[:13]  # 13 hex digits = 52 bits

    assert patient_position("train_1", seed=7) == int(leading, 16) / 16**13


def test_share_is_near_the_fraction():
    # 2000 draws at 0.1: the standard deviation of the count is 13.4, four of them are 54.
    assert abs(len(choose_held_out_patients(PATIENTS, 0.1, seed=0)) - 200) < 54


def test_more_patients_or_a_larger_fraction_move_nobody_out():
    small = choose_held_out_patients(PATIENTS[:500], 0.1, seed=3)

    assert small == choose_held_out_patients(PATIENTS, 0.1, seed=3) & set(PATIENTS[:500])
    assert small <= choose_held_out_patients(PATIENTS[:500], 0.2, seed=3)
    assert small != choose_held_out_patients(PATIENTS[:500], 0.1, seed=4)


@pytest.mark.parametrize("seed", range(20))
def test_two_patients_are_always_parted(seed):
    for fraction in (0.01, 0.5, 0.99):
        assert len(choose_held_out_patients(["a", "b", "b"], fraction, seed)) == 1


def test_limits():
    assert choose_held_out_patients(["a"], 0.9, seed=0) == set()
    assert choose_held_out_patients(PATIENTS, 0.0, seed=0) == set()
    with pytest.raises(ValueError, match="below 1, got 1"):
        choose_held_out_patients(PATIENTS, 1.0, seed=0)


def test_three_way_split_keeps_test_when_the_validation_share_changes():
    first = split_patients(PATIENTS, validation_fraction=0.1, test_fraction=0.2, seed=0)
    second = split_patients(reversed(PATIENTS), validation_fraction=0.3, test_fraction=0.2, seed=0)

    def members(splits, name):
        return {patient for patient, split in splits.items() if split == name}

    assert members(first, "test") == members(second, "test")
    assert members(first, "validation") < members(second, "validation")
    # 1600 patients are left for 0.1: 160, give or take four standard deviations of 12.
    assert abs(len(members(first, "validation")) - 160) < 48
