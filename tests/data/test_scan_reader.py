"""NIfTI scans and masks: what is read, and every kind of file that is refused."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.data.test_volume_geometry import OBLIQUE
from vlm3d_ext.data.chunked_volume import write_chunked_volume
from vlm3d_ext.data.hounsfield_units import check_hounsfield_units, low_percentile_hu, to_hounsfield_units
from vlm3d_ext.data.scan_reader import Rescale, UnusableScanError, read_mask, read_scan, write_chunked_mask
from vlm3d_ext.data.volume_geometry import LPS_FROM_RAS, VolumeGeometry

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LPS_AFFINE = np.diag([-0.8, -0.7, 2.5, 1.0])
SHAPE_IJK = (12, 10, 8)


def chest(shape_ijk: tuple[int, ...] = SHAPE_IJK) -> np.ndarray:
    """A block of soft tissue with noise, in air, indices (i, j, k)."""
    hu = np.full(shape_ijk, -1000, dtype=np.int16)
    hu[2:-2, 2:-2] = 40
    return (hu + np.random.default_rng(1).integers(-9, 10, shape_ijk)).astype(np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = LPS_AFFINE, **header) -> Path:
    """Write a NIfTI-1 file, then overwrite `header` fields byte by byte: nibabel would correct them."""
    image = nib.Nifti1Image(array, affine)
    content = bytearray(image.to_bytes())
    fields = image.header.template_dtype.fields
    for key, value in header.items():
        kind, offset = fields[key][:2]
        field = np.asarray(value, dtype=kind.base).tobytes()
        content[offset : offset + len(field)] = field
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(UnusableScanError) as caught:
        read_scan(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and message.endswith(".")
    return message


def test_a_canonical_file_is_read_as_it_lies(tmp_path):
    hu = chest()
    scan = read_scan(save(tmp_path / "a.nii.gz", hu))
    assert scan.hu.dtype == np.int16 and np.array_equal(scan.hu, hu.T)
    assert scan.geometry == scan.source_geometry and scan.geometry.axis_codes == "LPS"
    assert scan.geometry.spacing_mm == pytest.approx((2.5, 0.7, 0.8))
    assert scan.source_format == "nifti" and scan.notes == ()


def test_a_ras_file_is_turned_and_its_source_grid_remembered(tmp_path):
    hu = chest()
    scan = read_scan(save(tmp_path / "a.nii", hu, np.diag([0.8, 0.7, 2.5, 1.0])))
    assert np.array_equal(scan.hu, hu[::-1, ::-1].T) and scan.hu.flags.c_contiguous
    assert scan.source_geometry.axis_codes == "RAS" and scan.geometry.axis_codes == "LPS"
    # RAS voxel (0, 0, 0) is at the origin; it is now the last of x and y.
    assert scan.geometry.positions_lps(np.array([[0, 9, 11]])) == pytest.approx(np.zeros((1, 3)), abs=1e-6)


def test_an_oblique_scan_keeps_its_rotation(tmp_path):
    scan = read_scan(save(tmp_path / "a.nii.gz", chest(), LPS_FROM_RAS @ OBLIQUE))
    np.testing.assert_allclose(scan.geometry.affine_lps, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_every_stored_type_gives_the_same_hu(tmp_path, dtype):
    if dtype == np.uint8:
        stored, header = (chest() > -500).astype(np.uint8), {"scl_slope": 1000, "scl_inter": -1000}
        expected = np.where(stored, 0, -1000)
    else:
        stored, header, expected = chest().astype(dtype), {}, chest()
    scan = read_scan(save(tmp_path / "a.nii.gz", stored, **header))
    assert scan.hu.dtype == np.int16 and np.array_equal(scan.hu, expected.T)


def test_fractions_are_kept_as_float32(tmp_path):
    scan = read_scan(save(tmp_path / "a.nii.gz", chest().astype(np.float32) + 0.25))
    assert scan.hu.dtype == np.float32 and np.array_equal(scan.hu, chest().T + np.float32(0.25))


def test_rescaling_leaves_int16_only_where_it_must():
    stored = np.array([0, 65535, 1, 2], dtype=np.uint16).reshape(2, 2, 1)
    assert to_hounsfield_units(stored, Rescale(1, -32768)).dtype == np.int16
    high = to_hounsfield_units(stored, Rescale(1, -1024))
    assert high.dtype == np.float32 and high.ravel().tolist() == [-1024, 64511, -1023, -1022]
    assert to_hounsfield_units(stored, Rescale(0.5, 0))[1, 0, 0] == np.float32(0.5)


def test_nifti_2_is_read_like_nifti_1(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti2Image(chest(), LPS_AFFINE).to_bytes()))
    assert np.array_equal(read_scan(path).hu, chest().T)


def test_padding_outside_the_field_of_view_becomes_air(tmp_path):
    hu = chest()
    hu[0, :4] = -8192
    hu[-1, :2] = -3024
    scan = read_scan(save(tmp_path / "a.nii.gz", hu))
    assert (scan.hu.T[0, :4] == -1024).all() and (scan.hu.T[-1, :2] == -1024).all()
    assert np.array_equal(scan.hu.T[1:-1], hu[1:-1])
    assert scan.notes == (f"{6 * 8} padding voxels outside the field of view set to -1024 HU",)


def test_trailing_dimensions_of_one_are_dropped(tmp_path):
    scan = read_scan(save(tmp_path / "a.nii.gz", chest()[..., None]))
    assert scan.hu.shape == (8, 10, 12) and "trailing" in scan.notes[0]


# CT-RATE v1: stored values and a header that says nothing


@pytest.mark.parametrize("form", ["none", "identity"])
def test_a_blank_header_takes_spacing_and_rescale_from_the_caller(tmp_path, form):
    stored = chest() + 8192
    blank = {"sform_code": 0, "qform_code": 0} if form == "none" else {}
    path = save(tmp_path / "a.nii.gz", stored, np.eye(4), **blank)
    scan = read_scan(path, rescale=Rescale(1, -8192), spacing_mm=[1.5, 0.7, 0.8])
    assert np.array_equal(scan.hu, chest().T)
    assert scan.geometry == scan.source_geometry and scan.geometry.axis_codes == "LPS"
    assert scan.geometry.spacing_mm == (1.5, 0.7, 0.8)
    assert any("taken as LPS" in note for note in scan.notes) and any("-8192" in note for note in scan.notes)


def test_a_header_that_knows_its_grid_is_not_overruled(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest(), np.diag([0.8, 0.7, 2.5, 1.0]))
    assert "pass spacing_mm only" in refusal(path, spacing_mm=[1.0, 0.7, 0.8])
    assert read_scan(path, spacing_mm=[2.5, 0.7, 0.8]).source_geometry.axis_codes == "RAS"


def test_no_orientation_and_no_spacing_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest(), np.eye(4), sform_code=0, qform_code=0)
    assert "left and right are unknown" in refusal(path)
    assert "spacing_mm is [1, 0, 1]" in refusal(path, spacing_mm=[1, 0, 1])
    assert "slope and intercept passed are 0 and -1024" in refusal(path, spacing_mm=[1, 1, 1], rescale=(0, -1024))


def test_rescale_beside_a_header_with_its_own_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest() + 1024, scl_slope=1, scl_inter=-1024)
    assert np.array_equal(read_scan(path).hu, chest().T)
    assert "intercept -1024 of its own" in refusal(path, rescale=Rescale(1, -1024))


def test_arguments_that_do_not_fit_the_input(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest())
    with pytest.raises(ValueError, match="series_number 3"):
        read_scan(path, series_number=3)
    with pytest.raises(ValueError, match="three numbers"):
        read_scan(path, spacing_mm=[1, 1])
    with pytest.raises(ValueError, match="pass neither"):
        read_scan(tmp_path, rescale=Rescale(1, -1024))


# Files that are refused


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_gzip(tmp_path, keep):
    path = save(tmp_path / "a.nii.gz", chest())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "truncated" in refusal(path)


def test_gzip_with_a_flipped_bit(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest())
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the checksum itself
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_truncated_nifti_without_compression(tmp_path):
    path = save(tmp_path / "a.nii", chest())
    path.write_bytes(path.read_bytes()[:-1])
    assert "2271 bytes where its header promises 2272" in refusal(path)


def test_wrong_magic_and_things_that_are_not_nifti(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"DICM" * 200)
    assert "expected a NIfTI-1 or NIfTI-2 header" in refusal(tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b"short"))
    assert "has 5 bytes" in refusal(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii.gz").write_bytes(b"not gzip at all")
    assert "expected gzip" in refusal(tmp_path / "c.nii.gz")
    (tmp_path / "d.mha").write_bytes(b"ObjectType = Image")
    assert "neither a .nii nor a .nii.gz" in refusal(tmp_path / "d.mha")
    content = bytearray(save(tmp_path / "e.nii", chest()).read_bytes())
    content[344:348] = b"ni1\0"
    (tmp_path / "e.nii").write_bytes(content)
    assert ".hdr/.img pair" in refusal(tmp_path / "e.nii")


def test_2d_and_4d_images(tmp_path):
    assert "is 2D" in refusal(save(tmp_path / "a.nii.gz", chest()[..., 0]))
    assert "is 4D" in refusal(save(tmp_path / "b.nii.gz", chest((12, 10, 8, 2))))


def test_fewer_than_two_slices(tmp_path):
    assert "fewer than 2 slices" in refusal(save(tmp_path / "a.nii.gz", chest()[..., :1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, bad):
    hu = chest().astype(np.float32)
    hu[3, 3, 3] = bad
    assert "1 of 960 voxels are NaN or infinite" in refusal(save(tmp_path / "a.nii.gz", hu))


@pytest.mark.parametrize("value", [0, -1000, -8192])
def test_constant_volumes(tmp_path, value):
    message = refusal(save(tmp_path / "a.nii.gz", np.full(SHAPE_IJK, value, np.int16)))
    assert f"every voxel is {value}" in message
    refusal(tmp_path / "a.nii.gz", check_hu=False)


@pytest.mark.parametrize("bad", [0.0, -0.7, np.nan])
def test_impossible_spacing(tmp_path, bad):
    path = save(tmp_path / "a.nii.gz", chest(), pixdim=[1, 0.8, bad, 2.5, 0, 0, 0, 0])
    assert "expected three positive numbers" in refusal(path)


def test_singular_affine(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest(), srow_y=[0, 0, 0, 0])
    assert "singular" in refusal(path)


def test_sheared_affine(tmp_path):
    affine = LPS_AFFINE.copy()
    affine[1, 2] = np.tan(np.radians(12)) * 2.5
    assert "axes are 12.00 degrees from a right angle" in refusal(save(tmp_path / "a.nii.gz", chest(), affine))


def test_pixdim_that_contradicts_the_affine(tmp_path):
    path = save(tmp_path / "a.nii.gz", chest(), pixdim=[1, 0.8, 0.7, 5.0, 0, 0, 0, 0])
    message = refusal(path)
    assert "[2.5, 0.7, 0.8]" in message and "[5, 0.7, 0.8]" in message


def test_units_other_than_mm(tmp_path):
    image = nib.Nifti1Image(chest(), LPS_AFFINE)
    image.header.set_xyzt_units("meter")
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    assert "in m, expected mm" in refusal(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vox_offset", 12, "begin at byte 12, expected 352 or later"),
        ("vox_offset", np.nan, "begin at byte nan"),
        ("scl_slope", np.inf, "slope and intercept are inf"),
        ("scl_inter", 1e30, "slope and intercept are 1 and 1e+30"),
    ],
)
def test_numbers_in_the_header_that_make_no_sense(tmp_path, field, value, message):
    assert message in refusal(save(tmp_path / "a.nii.gz", chest(), **{"scl_slope": 1, field: value}))


@pytest.mark.parametrize(("field", "value"), [("quatern_b", 7.0), ("quatern_c", np.nan), ("qoffset_x", 2000.0)])
def test_a_qform_that_contradicts_the_sform_is_noted(tmp_path, field, value):
    path = save(tmp_path / "a.nii.gz", chest(), qform_code=1, **{field: value})
    scan = read_scan(path)
    assert scan.geometry.spacing_mm == pytest.approx((2.5, 0.7, 0.8)) and "sform used" in scan.notes[0]


def test_a_qform_alone_is_enough(tmp_path):
    image = nib.Nifti1Image(chest(), None)
    image.header.set_qform(LPS_AFFINE, code=1)
    image.header["sform_code"] = 0
    content = bytearray(image.to_bytes())
    (tmp_path / "a.nii").write_bytes(content)
    scan = read_scan(tmp_path / "a.nii")
    assert scan.source_geometry.axis_codes == "LPS"
    assert scan.geometry.spacing_mm == pytest.approx((2.5, 0.7, 0.8))


def test_damaged_headers_never_end_in_another_error(tmp_path):
    """Whatever 352 bytes say, a file is read or refused in one line."""
    random = np.random.default_rng(11)
    content = save(tmp_path / "a.nii", chest(), qform_code=1).read_bytes()
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for offset in random.integers(0, 352, 3):
            damaged[offset] = random.integers(0, 256)
        (tmp_path / "a.nii").write_bytes(damaged)
        try:
            read_scan(tmp_path / "a.nii")
        except UnusableScanError as error:
            assert "\n" not in str(error)
            num_refused += 1
    assert 50 < num_refused < 300


def test_complex_voxels(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nib.Nifti1Image(chest().astype(np.complex64), LPS_AFFINE).to_bytes()))
    assert "data type code 32" in refusal(path)


def test_two_files_of_one_name(tmp_path):
    save(tmp_path / "a.nii", chest())
    save(tmp_path / "a.nii.gz", chest())
    assert "a.nii.gz lies beside it" in refusal(tmp_path / "a.nii")
    assert "a.nii lies beside it" in refusal(tmp_path / "a.nii.gz")


# Hounsfield units


@pytest.mark.parametrize(
    ("offset", "words"), [(1024, "were not applied"), (8192, "were not applied"), (-1024, "applied twice")]
)
def test_stored_values_and_doubled_intercepts_are_told_apart(tmp_path, offset, words):
    path = save(tmp_path / "a.nii.gz", (chest() + offset).astype(np.int16))
    message = refusal(path)
    assert words in message and "check_hu=False" in message
    assert read_scan(path, check_hu=False).hu.shape == (8, 10, 12)


def test_lung_shows_a_doubled_intercept_too():
    hu = np.full((10, 10, 10), -984, dtype=np.int16)
    hu[:4] = -1874
    hu[9] = -2024
    with pytest.raises(UnusableScanError, match=r"-1874 and -984 HU.*applied twice"):
        check_hounsfield_units(Path("a.nii.gz"), hu)


def test_a_volume_far_below_padding_is_no_scan(tmp_path):
    path = save(tmp_path / "a.nii.gz", (chest() - 8192).astype(np.int16))
    assert "every voxel is at or below -2000 HU" in refusal(path)


def test_a_crop_without_air_is_read_when_the_check_is_off(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(2).integers(0, 80, SHAPE_IJK).astype(np.int16))
    assert "check_hu=False if the volume holds no air" in refusal(path)
    assert read_scan(path, check_hu=False).hu.max() < 80


def test_padding_does_not_count_as_air():
    hu = np.full((10, 10, 10), 40, dtype=np.int16)
    hu[:3] = -8192
    assert low_percentile_hu(hu) == 40
    hu[3] = -1000
    assert low_percentile_hu(hu) == -1000


def test_noise_does_not_move_air_out_of_its_range():
    noise = np.random.default_rng(3).normal(0, 50, (40, 60, 60))
    hu = np.where(np.arange(60) < 12, -1000, 40) + noise
    assert -1100 < low_percentile_hu(hu) < -1000


# Masks


def test_a_mask_is_turned_like_its_scan(tmp_path):
    labels = np.zeros(SHAPE_IJK, dtype=np.uint8)
    labels[2, 3, 4] = 117
    array, geometry = read_mask(save(tmp_path / "m.nii.gz", labels, np.diag([0.8, 0.7, 2.5, 1.0])))
    scan = read_scan(save(tmp_path / "a.nii.gz", chest(), np.diag([0.8, 0.7, 2.5, 1.0])))
    assert array.dtype == np.uint8 and np.argwhere(array).tolist() == [[4, 6, 9]]
    assert geometry == scan.geometry


@pytest.mark.parametrize(("dtype", "highest", "expected"), [(np.int16, 255, np.uint8), (np.float64, 256, np.uint16)])
def test_labels_take_the_smallest_type_that_holds_them(tmp_path, dtype, highest, expected):
    labels = np.zeros(SHAPE_IJK, dtype=dtype)
    labels[0, 0, 0] = highest
    array, _ = read_mask(save(tmp_path / "m.nii.gz", labels))
    assert array.dtype == expected and array.max() == highest


def test_an_empty_mask_is_a_mask(tmp_path):
    array, _ = read_mask(save(tmp_path / "m.nii.gz", np.zeros(SHAPE_IJK, np.uint8)))
    assert not array.any()


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.5, "not whole"), (-1.0, "from -1 to 0"), (70000.0, "to 70000"), (np.nan, "NaN or infinite")],
)
def test_values_that_are_no_labels(tmp_path, value, message):
    labels = np.zeros(SHAPE_IJK, dtype=np.float32)
    labels[0, 0, 0] = value
    path = save(tmp_path / "m.nii.gz", labels)
    with pytest.raises(UnusableScanError, match=message):
        read_mask(path)


def test_chunked_masks_keep_values_and_grid(tmp_path):
    geometry = VolumeGeometry.from_spacing((3, 5, 7), (2.5, 0.8, 0.7))
    mask = np.zeros((3, 5, 7), bool)
    mask[1, 2, 3:5] = True
    for values in (mask, mask * np.uint8(17)):
        write_chunked_mask(tmp_path / "m.b2nd", values, geometry)
        labels, found = read_mask(tmp_path / "m.b2nd")
        assert labels.dtype == np.uint8 and found == geometry
        np.testing.assert_array_equal(labels, values)


def test_chunked_masks_that_are_refused(tmp_path):
    geometry = VolumeGeometry.from_spacing((3, 5, 7), (2.5, 0.8, 0.7))
    path = tmp_path / "m.b2nd"
    with pytest.raises(ValueError, match="canonical grid"):
        write_chunked_mask(path, np.zeros((3, 5, 8), np.uint8), geometry)
    turned = VolumeGeometry((3, 5, 7), np.diag([-1.0, 1, 1, 1]))
    with pytest.raises(ValueError, match="canonical grid"):
        write_chunked_mask(path, np.zeros((3, 5, 7), np.uint8), turned)
    with pytest.raises(UnusableScanError, match="no such file"):
        read_mask(path)
    for description in ({}, {"geometry": {"shape": [3, 5, 8], "affine_lps": np.eye(4).tolist()}}):
        write_chunked_volume(path, np.zeros((3, 5, 7), np.uint8), description)
        with pytest.raises(UnusableScanError, match=r"m\.b2nd: its description holds no grid"):
            read_mask(path)


# Real scans


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real sample scans (../shared/data) are not on this machine")
@pytest.mark.parametrize(
    "name",
    [
        "ct_chest/ibsi_pat1/phantom.nii.gz",
        "ct_chest/nsclc_LUNG1-001/ct.nii.gz",
        "ct_organs_totalsegmentator/example_ct.nii.gz",
        "ct_organs_totalsegmentator/example_ct_sm.nii.gz",
    ],
)
def test_real_scans_pass_and_air_is_where_it_should_be(name):
    scan = read_scan(SHARED_DATA / name)
    assert scan.hu.dtype == np.int16 and scan.geometry.axis_codes == "LPS"
    assert -1010 < low_percentile_hu(scan.hu) < -990
    assert np.array_equal(
        scan.source_geometry.from_canonical(scan.hu).T, np.asarray(nib.load(SHARED_DATA / name).dataobj)
    )
