"""Prepared cases on disk: round trip, the mark of wholeness, and files that are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.prepared_case import (
    PreparedCaseError,
    is_whole_case,
    prepared_case_paths,
    read_prepared_npz,
    read_sidecar,
    write_prepared_case,
)

RANDOM = np.random.default_rng(0)
IMGS = RANDOM.integers(0, 256, (3, 5, 7)).astype(np.uint8)
GTS = RANDOM.integers(0, 21, (3, 5, 7)).astype(np.uint8)
SPACING = (4.5, 0.7, 0.8)


def save(path: Path, **changes) -> Path:
    arrays = {"imgs": IMGS, "gts": GTS, "spacing": np.array(SPACING), **changes}
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def refusal(path: Path) -> str:
    with pytest.raises(PreparedCaseError) as caught:
        read_prepared_npz(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and message.endswith(".")
    return message


def test_a_case_comes_back_as_written(tmp_path):
    sidecar = {"window": [40.0, 400.0], "grid": {"shape": [3, 5, 7]}}
    npz_path, json_path = write_prepared_case(tmp_path, "train_1_a_1", IMGS, GTS, SPACING, sidecar)
    assert npz_path == tmp_path / "volumes" / "train_1_a_1.npz"
    case = read_prepared_npz(npz_path)
    assert np.array_equal(case.imgs, IMGS) and np.array_equal(case.gts, GTS)
    assert case.spacing.dtype == np.float32 and np.array_equal(case.spacing, np.float32(SPACING))
    assert read_sidecar(npz_path) == read_sidecar(json_path) == sidecar


def test_several_windows_share_one_mask(tmp_path):
    imgs = np.stack([IMGS, 255 - IMGS])
    npz_path, _ = write_prepared_case(tmp_path, "a", imgs, GTS, SPACING, {})
    assert np.array_equal(read_prepared_npz(npz_path).imgs, imgs)


def test_no_mask_is_stored_as_background(tmp_path):
    npz_path, _ = write_prepared_case(tmp_path, "a", IMGS, None, SPACING, {})
    gts = read_prepared_npz(npz_path).gts
    assert gts.shape == IMGS.shape and not gts.any()


def test_the_same_case_gives_the_same_bytes(tmp_path):
    files = [write_prepared_case(tmp_path / name, "a", IMGS, GTS, SPACING, {"k": 1}) for name in ("x", "y")]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_only_the_json_marks_a_case_as_whole(tmp_path):
    npz_path, json_path = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {})
    assert is_whole_case(tmp_path, "a") and not is_whole_case(tmp_path, "b")
    json_path.unlink()
    assert npz_path.is_file() and not is_whole_case(tmp_path, "a")


def test_an_interrupted_replacement_leaves_no_old_mark(tmp_path):
    _, json_path = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {"version": 1})
    with pytest.raises(ValueError):  # JSON has no NaN: writing stops after the NPZ, as a kill there would
        write_prepared_case(tmp_path, "a", 255 - IMGS, GTS, SPACING, {"version": float("nan")})
    assert not json_path.exists() and not is_whole_case(tmp_path, "a")


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(PreparedCaseError, match="imgs is int16"):
        write_prepared_case(tmp_path, "a", IMGS.astype(np.int16), GTS, SPACING, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("volume_id", ["", "a/b", "..", "train_1_a_1.nii.gz", "train_1_a_1.npz"])
def test_a_volume_id_is_a_plain_name(tmp_path, volume_id):
    with pytest.raises(ValueError, match="plain name"):
        prepared_case_paths(tmp_path, volume_id)


def test_a_file_made_elsewhere_is_read(tmp_path):
    path = save(tmp_path / "a.npz", spacing=np.array([3, 1, 1], dtype=np.int64), further=np.zeros(2))
    assert read_prepared_npz(path).spacing.tolist() == [3.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgs": None}, "lacks imgs, has ['gts', 'spacing']"),
        ({"gts": None, "spacing": None}, "lacks gts, spacing"),
        ({"imgs": IMGS.astype(np.float32)}, "imgs is float32, expected uint8"),
        ({"gts": GTS.astype(np.int64)}, "gts is int64, expected uint8"),
        ({"gts": np.full_like(GTS, 21)}, "gts has label 21, expected 0 to 20"),
        ({"gts": GTS[1:]}, "gts has shape (2, 5, 7), but imgs (3, 5, 7)"),
        ({"imgs": IMGS[0], "gts": GTS[0]}, "imgs has shape (5, 7)"),
        ({"imgs": IMGS[:0], "gts": GTS[:0]}, "imgs has shape (0, 5, 7)"),
        ({"spacing": np.array([4.5, 0.7])}, "spacing is [4.5"),
        ({"spacing": np.array([4.5, 0.0, 0.8])}, "three positive numbers"),
        ({"spacing": np.array([4.5, np.nan, 0.8])}, "three positive numbers"),
        ({"spacing": np.array(["4.5", "1", "1"])}, "spacing is <U3"),
        ({"imgs": np.array([{"code": 1}], dtype=object)}, "imgs holds pickled Python objects"),
    ],
)
def test_arrays_that_are_refused(tmp_path, changes, message):
    assert message in refusal(save(tmp_path / "a.npz", **changes))


def test_files_that_are_no_npz(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.npz")
    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps({"imgs": IMGS}))
    assert "is a pickle" in refusal(path)
    np.save(tmp_path / "b.npy", IMGS)
    (tmp_path / "b.npy").rename(path)
    assert "single array" in refusal(path)
    path.write_bytes(b"")
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_npz(tmp_path, keep):
    path = save(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "damaged" in refusal(path)


def test_a_flipped_bit_in_the_voxels(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, imgs=IMGS, gts=GTS, spacing=np.array(SPACING))
    content = bytearray(path.read_bytes())
    content[content.index(IMGS.tobytes()[:20]) + 5] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_a_pickle_inside_is_never_run(tmp_path):
    marker = tmp_path / "was_run"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    save(tmp_path / "a.npz", imgs=np.array([Payload()], dtype=object))
    assert "imgs holds pickled Python objects" in refusal(tmp_path / "a.npz")
    assert not marker.exists()


def test_sidecars_that_are_refused(tmp_path):
    with pytest.raises(PreparedCaseError, match="no such file"):
        read_sidecar(tmp_path / "a.npz")
    (tmp_path / "a.json").write_text('{"grid": ')
    with pytest.raises(PreparedCaseError, match="is not JSON"):
        read_sidecar(tmp_path / "a.npz")
    (tmp_path / "a.json").write_text(json.dumps([1, 2]))
    with pytest.raises(PreparedCaseError, match="holds a list"):
        read_sidecar(tmp_path / "a.npz")
