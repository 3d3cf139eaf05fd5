"""Prepared cases on disk: round trip, the mark of wholeness, and files that are refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.data.chunked_volume import write_chunked_volume
from vlm3d_ext.data.prepared_case import (
    VOLUME_FORMATS,
    PreparedCaseError,
    is_whole_case,
    prepared_case_files,
    prepared_case_paths,
    prepared_image_path,
    read_prepared_case,
    read_prepared_npz,
    read_prepared_patch,
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
        read_prepared_case(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path.with_suffix('')}") and message.endswith(".")
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


@pytest.mark.parametrize("volume_id", ["", "a/b", "..", "train_1_a_1.nii.gz", "train_1_a_1.npz", "a.b2nd"])
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


def write_both(folder, imgs=IMGS, gts=GTS):
    return [write_prepared_case(folder / name, "a", imgs, gts, SPACING, {"k": 1}, name)[0] for name in VOLUME_FORMATS]


@pytest.mark.parametrize("gts", [GTS, None])
@pytest.mark.parametrize("imgs", [IMGS, np.stack([IMGS, 255 - IMGS])])
def test_both_forms_hold_the_same(tmp_path, imgs, gts):
    npz, chunked = (read_prepared_case(path) for path in write_both(tmp_path, imgs, gts))
    for case in (npz, chunked):
        np.testing.assert_array_equal(case.imgs, imgs)
        np.testing.assert_array_equal(case.gts, 0 * GTS if gts is None else gts)
        assert case.spacing.dtype == np.float32 and np.array_equal(case.spacing, np.float32(SPACING))
        assert case.imgs.flags.writeable and case.gts.flags.writeable


def test_both_forms_are_read_into_places(tmp_path):
    for path in write_both(tmp_path):
        places = np.full((1, *IMGS.shape), 9, np.uint8), np.full(GTS.shape, 9, np.uint8)
        case = read_prepared_case(path, places)
        np.testing.assert_array_equal(places[0][0], IMGS)
        np.testing.assert_array_equal(places[1], GTS)
        assert case.imgs.shape == IMGS.shape and np.shares_memory(case.imgs, places[0])
        assert case.gts is places[1] or np.shares_memory(case.gts, places[1])
        other = np.full((2, 5, 7), 9, np.uint8)
        case = read_prepared_case(path, (other, None))
        assert (other == 9).all() and np.array_equal(case.imgs, IMGS) and np.array_equal(case.gts, GTS)


@pytest.mark.parametrize("imgs", [IMGS, np.stack([IMGS, 255 - IMGS])])
def test_a_patch_of_either_form(tmp_path, imgs):
    for path in write_both(tmp_path, imgs):
        np.testing.assert_array_equal(read_prepared_patch(path, (1, 2, 0), (2, 3, 7)), imgs[..., 1:3, 2:5, :])
        with pytest.raises(ValueError, match=r"the patch from .* is not within"):
            read_prepared_patch(path, (1, 2, 1), (2, 3, 7))


def test_chunked_files_of_a_case(tmp_path):
    path, json_path = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {"image": "volumes/a.b2nd"}, "blosc2")
    regions = tmp_path / "volumes" / "a_regions.b2nd"
    assert path == tmp_path / "volumes" / "a.b2nd" and regions.is_file() and is_whole_case(tmp_path, "a")
    assert prepared_image_path(json_path) == path and read_sidecar(path) == read_sidecar(json_path)
    again, _ = write_prepared_case(tmp_path / "again", "a", IMGS, GTS, SPACING, {}, "blosc2")
    for name in ("a.b2nd", "a_regions.b2nd"):
        assert again.with_name(name).read_bytes() == path.with_name(name).read_bytes()
    regions.unlink()
    assert not is_whole_case(tmp_path, "a")
    assert "a_regions.b2nd: no such file" in refusal(path)


def test_the_npz_is_the_volume_of_a_sidecar_that_names_none(tmp_path):
    path, json_path = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {})
    assert prepared_image_path(json_path) == path


@pytest.mark.parametrize(("first", "second"), [("npz", "blosc2"), ("blosc2", "npz")])
def test_writing_one_form_takes_the_other_away(tmp_path, first, second):
    write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {}, first)
    path, json_path = write_prepared_case(tmp_path, "a", 255 - IMGS, GTS, SPACING, {}, second)
    kept = {path, json_path, *([path.with_name("a_regions.b2nd")] if second == "blosc2" else [])}
    assert set(path.parent.iterdir()) == kept
    np.testing.assert_array_equal(read_prepared_case(path).imgs, 255 - IMGS)


def test_damaged_chunked_cases(tmp_path):
    path, _ = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {}, "blosc2")
    for damaged in (path, path.with_name("a_regions.b2nd")):
        content = damaged.read_bytes()
        for position in (0, content.index((IMGS if damaged == path else GTS).tobytes()[:9]), len(content) - 1):
            changed = bytearray(content)
            changed[position] ^= 1
            damaged.write_bytes(changed)
            assert f"{damaged.name}: " in refusal(path)
        damaged.write_bytes(content[:-7])
        assert "no index at its end" in refusal(path)
        damaged.write_bytes(content)
    np.testing.assert_array_equal(read_prepared_case(path).imgs, IMGS)


@pytest.mark.parametrize(
    ("imgs", "gts", "description", "message"),
    [
        (IMGS, np.full_like(GTS, 21), {"spacing_mm": SPACING}, "a_regions.b2nd: gts has label 21, expected 0 to 20"),
        (IMGS, GTS[1:], {"spacing_mm": SPACING}, "gts has shape (2, 5, 7), but imgs (3, 5, 7)"),
        (IMGS, GTS, {"spacing_mm": [1, 0, 1]}, "three positive numbers"),
        (IMGS, GTS, {"spacing_mm": [1, 2]}, "three positive numbers"),
        (IMGS, GTS, {"spacing_mm": "wide"}, "expected a spacing_mm"),
        (IMGS, GTS, {}, "expected a spacing_mm"),
    ],
)
def test_chunked_cases_that_are_refused(tmp_path, imgs, gts, description, message):
    write_chunked_volume(tmp_path / "a.b2nd", imgs, description)
    write_chunked_volume(tmp_path / "a_regions.b2nd", gts, {})
    assert message in refusal(tmp_path / "a.b2nd")


def test_a_case_named_like_the_regions_of_another(tmp_path):
    path, _ = write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {}, "blosc2")
    with pytest.raises(PreparedCaseError, match=r"a_regions\.b2nd: would be taken for the regions of 'a'"):
        write_prepared_case(tmp_path, "a_regions", IMGS, None, SPACING, {}, "blosc2")
    npz, _ = write_prepared_case(tmp_path, "a_regions", 255 - IMGS, None, SPACING, {})
    for file in prepared_case_files(tmp_path, "a_regions"):
        assert file.is_file()
        file.unlink()
    assert not npz.exists() and is_whole_case(tmp_path, "a") and not is_whole_case(tmp_path, "a_regions")
    np.testing.assert_array_equal(read_prepared_case(path).gts, GTS)


def test_formats_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match=r"volume_format must be one of \['npz', 'blosc2'\], got 'zarr'"):
        write_prepared_case(tmp_path, "a", IMGS, GTS, SPACING, {}, "zarr")
    assert not list(tmp_path.iterdir())
