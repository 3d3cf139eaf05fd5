"""Preparation killed at random moments and started again gives the bytes of one uninterrupted run."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import case_preparation, preparation_run
from data_prep.prepare import main
from tests.data_prep.tiny_release import GEOMETRY, TinyRelease, folder_bytes, write_volume

ROOT = Path(__file__).parents[2]
SIZE = ["--spatial-size", "32", "64", "64"]


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, 17):
        release.add(f"train_{number}_a_1", positive=("Lung nodule",), seed=number)
        release.add_anatomical_mask(f"train_{number}_a_1")
        nodule = np.zeros(GEOMETRY.shape, dtype=np.uint8)
        nodule[4:8, 6:12, 14:20] = 1
        write_volume(release.root / "lesion_masks" / "lung_nodule" / f"train_{number}_a_1.nii.gz", nodule)
    release.path_of("train_5_a_1").write_bytes(b"no volume")
    release.write_tables()
    return release


def command(source, output):
    arguments = ["--source", str(source), "--output", str(output), *SIZE, "--workers", "2"]
    return [sys.executable, "-m", "data_prep.prepare", *arguments]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_random_moments(release, tmp_path):
    whole = tmp_path / "whole"
    assert main(["--source", str(release.root), "--output", str(whole), *SIZE, "--workers", "0"]) == 3
    rng = random.Random(0)
    killed = tmp_path / "killed"
    killed_at = []
    for _ in range(4):
        process = subprocess.Popen(command(release.root, killed), cwd=ROOT, stderr=subprocess.DEVNULL)
        # Let at least one more case be finished, so that the kill falls into the work and not into the start of Python.
        before = finished(killed)
        while finished(killed) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(finished(killed))
    (killed / "volumes" / ".train_1_a_1.npz.abc.partial").write_bytes(b"half")

    assert killed_at[0] < 15, "every kill came after the last case; the test needs more of them"
    last = subprocess.run(command(release.root, killed), cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 3, last.stderr
    assert folder_bytes(killed) == folder_bytes(whole)


def finished(folder):
    return len(list((folder / "volumes").glob("*.json")))


@pytest.mark.parametrize("function", ["write_mask_nifti", "write_prepared_case"])
@pytest.mark.parametrize("after", [False, True])
def test_broken_off_before_and_after_each_file(release, tmp_path, monkeypatch, function, after):
    """The moments between two files, each hit exactly, which a random kill may miss."""

    class Killed(BaseException):
        pass

    real = getattr(case_preparation, function)
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 4 and not after:
            raise Killed
        real(*arguments)
        if len(calls) == 4:
            raise Killed

    arguments = ["--source", str(release.root), "--output", str(tmp_path / "out"), *SIZE, "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(case_preparation, function, broken)
        with pytest.raises(Killed):
            main(arguments)
    assert len(calls) == 4 and not (tmp_path / "out" / "manifest.json").exists()

    assert main(arguments) == 3
    assert main([*arguments[:3], str(tmp_path / "whole"), *arguments[4:]]) == 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_worker_that_dies_is_reported_for_its_case(release, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation_run, "prepare_case", die_on_case_7)

    arguments = ["--source", str(release.root), "--output", str(tmp_path / "out"), *SIZE, "--workers", "2"]
    assert main(arguments) == 3

    log = (tmp_path / "out" / "preparation_log.json").read_text()
    assert "train_7_a_1.nii.gz: the process that worked on it ended with signal SIGKILL" in log
    assert finished(tmp_path / "out") == 14  # of 16, one dies, one is no volume
    monkeypatch.undo()
    assert main(arguments) == 3
    assert finished(tmp_path / "out") == 15


def die_on_case_7(task):
    if task.case.volume_id == "train_7_a_1":
        os.kill(os.getpid(), signal.SIGKILL)
    return case_preparation.prepare_case(task)


def test_a_worker_that_dies_once_costs_nothing(release, tmp_path, monkeypatch):
    arguments = ["--source", str(release.root), *SIZE, "--workers", "2"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 3
    monkeypatch.setattr(preparation_run, "prepare_case", die_on_case_7_once)

    assert main([*arguments, "--output", str(tmp_path / "out")]) == 3

    (tmp_path / "out" / "died").unlink()
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def die_on_case_7_once(task):
    if task.case.volume_id == "train_7_a_1" and not (task.output / "died").exists():
        (task.output / "died").write_bytes(b"")
        (task.output / "volumes" / ".train_7_a_1.npz.x.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return case_preparation.prepare_case(task)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run_and_what_is_done_stays(release, tmp_path, monkeypatch, capsys, code):
    real = case_preparation.write_prepared_case
    calls = []

    def until_the_disk_is_full(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(code, os.strerror(code))
        real(*arguments)

    arguments = ["--source", str(release.root), "--output", str(tmp_path / "out"), *SIZE, "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(case_preparation, "write_prepared_case", until_the_disk_is_full)
        assert main(arguments) == 2

    assert len(calls) == 6, "the cases to come would not fit either"
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "disk full" in message and "free space" in message and "finished cases are kept" in message
    assert finished(tmp_path / "out") == 5 and not (tmp_path / "out" / "manifest.json").exists()
    assert main(arguments) == 3
    assert main([*arguments[:3], str(tmp_path / "whole"), *arguments[4:]]) == 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
