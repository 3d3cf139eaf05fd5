"""The memory that a case is said to need, against what it takes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.case_preparation import CaseTask
from data_prep.lesion_masks import LesionMask
from data_prep.memory_need import GIB, memory_need_bytes, memory_refusal
from data_prep.preparation_settings import PreparationSettings
from data_prep.raw_case import RawCase
from tests.data_prep.tiny_release import GEOMETRY, chest_hu, write_volume
from vlm3d_ext.data.volume_geometry import VolumeGeometry

ROOT = Path(__file__).parents[2]
MIB = 2**20
# Prepares a case in a process of its own and prints the largest memory it had.
MEASURE = """
import pickle, re, sys
from data_prep.case_preparation import prepare_case
outcome = prepare_case(pickle.load(open(sys.argv[1], "rb")))
assert outcome.status == "prepared", outcome.reason
# Not ru_maxrss, in which the process that started this one lives on.
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def task_of(path, output, **more):
    case = RawCase("case", "case", "case", "test", path, path.name)
    return CaseTask(case, PreparationSettings(), output, **more)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_need_is_an_upper_bound_and_not_far_off(tmp_path):
    import pickle

    geometry = VolumeGeometry.from_spacing((240, 384, 384), (1.0, 0.8, 0.8))
    plane = chest_hu(1, VolumeGeometry.from_spacing((4, 384, 384), (1.0, 0.8, 0.8)))
    scan = write_volume(tmp_path / "scan.nii", np.tile(plane, (60, 1, 1)), geometry)
    mask = np.zeros(geometry.shape, dtype=np.uint8)
    mask[20:60, 100:200, 90:180] = 1
    lesion = LesionMask(write_volume(tmp_path / "mask.nii", mask, geometry))
    plain = task_of(scan, tmp_path / "out")
    masked = replace(plain, lesion_masks={"lung_nodule": lesion, "consolidation": lesion})
    for name, task in (("plain", plain), ("masked", masked)):
        (tmp_path / name).write_bytes(pickle.dumps(task))
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        measured, need = int(run.stdout) * 1024, memory_need_bytes(task)
        assert 0.5 * need < measured < need, f"{name}: {measured / MIB:.0f} of {need / MIB:.0f} MiB"


def test_the_need_grows_with_voxels_types_and_masks(tmp_path):
    shape = (10, 20, 30)
    geometry = VolumeGeometry.from_spacing(shape, (1.0, 1.0, 1.0))
    needs = {}
    for dtype in (np.int16, np.float32, np.int32):
        path = write_volume(tmp_path / f"{np.dtype(dtype).name}.nii", np.zeros(shape, dtype), geometry)
        needs[dtype] = memory_need_bytes(task_of(path, tmp_path))
    size = 6000
    # 2 + 2 bytes a voxel, or the file of 352 bytes more than the voxels' 12,000
    assert needs[np.float32] - needs[np.int16] == (4 + 4) * size - (2 + 2) * size
    assert needs[np.int32] == needs[np.float32]
    mask = LesionMask(write_volume(tmp_path / "mask.nii.gz", np.zeros(shape, np.uint8), geometry))
    masked = task_of(tmp_path / "int16.nii", tmp_path, lesion_masks={"lung_nodule": mask})
    assert memory_need_bytes(masked) - needs[np.int16] == (2 + 1 + 1) * size
    compressed = task_of(write_volume(tmp_path / "z.nii.gz", np.zeros(shape, np.int16), geometry), tmp_path)
    assert memory_need_bytes(compressed) == needs[np.int16] - 352


def test_what_cannot_be_read_is_left_to_the_preparation(tmp_path):
    for name in ("short.nii", "noise.nii.gz", "no.npz"):
        (tmp_path / name).write_bytes(b"no volume")
        assert memory_need_bytes(task_of(tmp_path / name, tmp_path)) is None
    (tmp_path / "empty").mkdir()
    assert memory_need_bytes(task_of(tmp_path / "empty", tmp_path)) is None
    assert memory_refusal(task_of(tmp_path / "absent.nii", tmp_path), 1) is None


def test_the_refusal_says_what_to_do(tmp_path):
    task = task_of(write_volume(tmp_path / "scan.nii.gz", chest_hu(0), GEOMETRY), tmp_path)
    need = memory_need_bytes(task)
    assert memory_refusal(task, need) is None
    reason = memory_refusal(task, GIB // 4)
    assert reason.startswith("scan.nii.gz: would need about 0.26 GiB") and "--max-memory-gib allows 0.25" in reason
    assert "\n" not in reason
