import gzip
import os
import stat

import numpy as np
import pytest

from vlm3d_ext.data.atomic_files import whole_or_absent, write_bytes, write_gzip, write_json, write_npz


def _failing(path):
    with whole_or_absent(path) as file:
        file.write(b"half of it")
        raise RuntimeError("power cut")


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "a" / "file.bin"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="power cut"):
        _failing(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file.bin"]


def test_a_failure_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        _failing(tmp_path / "file.bin")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_from_the_keyboard_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_or_absent(tmp_path / "file.bin") as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with whole_or_absent(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_disk_that_is_full_when_flushing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    write_bytes(tmp_path / "file.bin", b"old")
    monkeypatch.setattr("vlm3d_ext.data.atomic_files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "file.bin", b"new")
    assert (tmp_path / "file.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_files_have_the_usual_permissions(tmp_path):
    """A temporary file is readable by its owner only; the file it becomes must not be."""
    previous = os.umask(0o022)
    try:
        write_bytes(tmp_path / "file.bin", b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o644


def test_bytes_depend_on_the_content_only(tmp_path, monkeypatch):
    arrays = {
        "imgs": np.arange(60, dtype=np.uint8).reshape(3, 4, 5),
        "spacing": np.array([5.0, 1, 1], dtype=np.float32),
    }
    for name, time in (("one", 1e9), ("two", 1.7e9)):
        monkeypatch.setattr("time.time", lambda time=time: time)
        write_npz(tmp_path / f"{name}.npz", arrays)
        write_npz(tmp_path / f"{name}-plain.npz", arrays, compressed=False)
        write_gzip(tmp_path / f"{name}.gz", b"abc" * 100)
    for suffix in (".npz", "-plain.npz", ".gz"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert gzip.decompress((tmp_path / "one.gz").read_bytes()) == b"abc" * 100
    with np.load(tmp_path / "one.npz", allow_pickle=False) as read:
        np.testing.assert_array_equal(read["imgs"], arrays["imgs"])


def test_object_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match="array 'labels' holds Python objects"):
        write_npz(tmp_path / "x.npz", {"imgs": np.zeros(3), "labels": np.array([1, None])})
    with pytest.raises(TypeError, match="Python objects"):
        write_npz(tmp_path / "x.npz", {"rows": np.zeros(2, dtype=[("name", object), ("value", float)])})
    assert os.listdir(tmp_path) == []


def test_json_without_nan(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"name": "Ödem"})
    assert path.read_text(encoding="utf-8") == '{\n "name": "Ödem"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"name": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n "name": "Ödem"\n}\n'
