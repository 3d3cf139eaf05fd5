from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.anatomical_masks import MaskCoding, add_pleura, find_anatomical_mask, read_anatomical_mask
from data_prep.raw_case import RawCase
from tests.data_prep.tiny_release import GEOMETRY, chest_hu, lung_regions, write_volume
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.scan_reader import read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry

SHARED = Path(__file__).parents[3] / "shared/data/ct_organs_totalsegmentator"


def case_of(path, **values):
    return RawCase("s1", "s1", "s1", "test", path, path.name, **values)


@pytest.fixture
def scan_file(tmp_path):
    return write_volume(tmp_path / "s1.nii.gz", chest_hu(0))


def regions_of(mask_path, scan_file, **coding):
    return read_anatomical_mask(mask_path, read_scan(scan_file), case_of(scan_file), MaskCoding(**coding))


def with_names(path, labels, names):
    """Write labels with the label table that TotalSegmentator puts into the header."""
    image = nib.Nifti1Image(labels.T, GEOMETRY.affine_ras)
    table = "".join(f'<Label Key="{key}" Red="0"><![CDATA[{name}]]></Label>\n' for key, name in names.items())
    content = f"<CaretExtension><LabelTable>\n{table}</LabelTable></CaretExtension>".encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, content))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def test_class_ids_of_both_versions(tmp_path, scan_file):
    v2 = write_volume(tmp_path / "m" / "v2.nii.gz", lung_regions())
    v1_of_v2 = np.zeros(118, dtype=np.uint8)
    v1_of_v2[[10, 11, 12, 14]] = [13, 14, 15, 17]
    v1 = write_volume(tmp_path / "m" / "v1.nii.gz", v1_of_v2[lung_regions()])

    regions = regions_of(v2, scan_file)

    assert sorted(np.unique(regions)) == [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(regions == 3, lung_regions() == 12)
    np.testing.assert_array_equal(regions_of(v1, scan_file, totalsegmentator_version=1), regions)


def test_names_in_the_header_win_over_the_version(tmp_path, scan_file):
    labels = np.where(lung_regions() == 10, 7, 0).astype(np.uint8)

    named = with_names(tmp_path / "m" / "named.nii.gz", labels, {7: "lung_upper_lobe_left", 8: "face"})

    for version in (1, 2):
        regions = regions_of(named, scan_file, totalsegmentator_version=version)
        np.testing.assert_array_equal(regions == 1, labels == 7)


def test_orientation_of_the_mask_file_does_not_matter(tmp_path, scan_file):
    flipped = lung_regions()[::-1, :, ::-1]
    affine = GEOMETRY.affine_lps.copy()
    for column, size in ((0, GEOMETRY.shape[2]), (2, GEOMETRY.shape[0])):
        affine[:3, 3] += affine[:3, column] * (size - 1)
        affine[:3, column] *= -1
    path = write_volume(tmp_path / "m" / "f.nii.gz", flipped, VolumeGeometry(GEOMETRY.shape, affine))
    straight = write_volume(tmp_path / "m" / "s.nii.gz", lung_regions())

    np.testing.assert_array_equal(regions_of(path, scan_file), regions_of(straight, scan_file))


def test_folder_of_classes_equals_the_multi_label_file(tmp_path, scan_file):
    names = {10: "lung_upper_lobe_left", 11: "lung_lower_lobe_left", 12: "lung_upper_lobe_right"}
    labels = np.where(np.isin(lung_regions(), list(names)), lung_regions(), 0).astype(np.uint8)
    folder = tmp_path / "classes"
    for class_id, name in names.items():
        write_volume(folder / f"{name}.nii.gz", (labels == class_id).astype(np.uint8))
    write_volume(folder / "urinary_bladder.nii.gz", np.ones(GEOMETRY.shape, np.uint8))
    (folder / "statistics.json").write_text("{}")
    multi = write_volume(tmp_path / "m" / "multi.nii.gz", labels)

    np.testing.assert_array_equal(regions_of(folder, scan_file), regions_of(multi, scan_file))


def test_npz_of_medsam2(tmp_path, scan_file):
    path = tmp_path / "m.npz"
    np.savez(path, gts=lung_regions(), imgs=chest_hu(0))

    regions = regions_of(path, scan_file)

    np.testing.assert_array_equal(regions == 2, lung_regions() == 11)
    np.savez(path, gts=regions)
    np.testing.assert_array_equal(regions_of(path, scan_file, labels="regions"), regions)


def test_npz_has_the_axes_of_the_scan_file(tmp_path):
    affine = np.diag([-4.0, -4.0, 5.0, 1.0])
    ras = VolumeGeometry(GEOMETRY.shape, affine)  # i towards the right, j towards the front
    scan_file = write_volume(tmp_path / "s1.nii.gz", chest_hu(0), ras)
    np.savez(tmp_path / "m.npz", gts=lung_regions())

    regions = regions_of(tmp_path / "m.npz", scan_file)

    np.testing.assert_array_equal(regions == 2, (lung_regions() == 11)[:, ::-1, ::-1])


def bad_mask(tmp_path, kind):
    path = tmp_path / "bad.nii.gz"
    labels = lung_regions()
    if kind == "shape":
        return write_volume(path, labels[1:], VolumeGeometry((11, 20, 24), GEOMETRY.affine_lps))
    if kind == "shift":
        affine = GEOMETRY.affine_lps.copy()
        affine[0, 3] += 2.0
        return write_volume(path, labels, VolumeGeometry(GEOMETRY.shape, affine))
    if kind == "unknown id":
        labels[0, 0, 0] = 118
        return write_volume(path, labels)
    if kind == "unnamed label":
        return with_names(path, labels, {10: "lung_upper_lobe_left"})
    if kind == "unknown name":
        return with_names(path, labels, {10: "lung_upper_lobe_lef", 11: "spleen", 12: "spleen", 14: "spleen"})
    if kind == "fractions":
        return write_volume(path, labels + np.float32(0.5))
    if kind == "class file":
        return write_volume(tmp_path / "classes" / "lung_upper_left.nii.gz", (labels == 10).astype(np.uint8)).parent
    if kind == "class values":
        return write_volume(tmp_path / "classes" / "spleen.nii.gz", labels).parent
    path = tmp_path / "bad.npz"
    if kind == "npz shape":
        np.savez(path, gts=labels[1:])
    elif kind == "npz key":
        np.savez(path, masks=labels)
    elif kind == "npz float":
        np.savez(path, gts=labels.astype(np.float32))
    elif kind == "npz pickle":
        np.savez(path, gts=np.array([{"a": 1}], dtype=object))
    elif kind == "npz truncated":
        np.savez(path, gts=labels)
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"shape \[D, H, W\] = \[11, 20, 24\].*\[12, 20, 24\].*affine"),
        ("shift", r"-44\.0.*-46\.0"),
        ("unknown id", "label 118, expected class ids of TotalSegmentator v2 from 0 to 117"),
        ("unnamed label", "label 11, which its own header does not name"),
        ("unknown name", "'lung_upper_lobe_lef' is unknown.*nearest: 'lung_upper_lobe_left'"),
        ("fractions", "not whole"),
        ("class file", "'lung_upper_left' is unknown"),
        ("class values", "labels up to 14, expected 0 and 1"),
        ("npz shape", r"\[11, 20, 24\].*\[12, 20, 24\]"),
        ("npz key", "expected 'gts'"),
        ("npz float", "float32, expected whole labels"),
        ("npz pickle", "without Python objects"),
        ("npz truncated", "cannot be read as an NPZ"),
    ],
)
def test_masks_that_are_refused(tmp_path, scan_file, kind, message):
    path = bad_mask(tmp_path, kind)

    with pytest.raises(UnusableScanError, match=message) as caught:
        regions_of(path, scan_file)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s1.nii.gz", "s1.nii", "s1.npz", "s1/spleen.nii.gz", "s1/segmentations/spleen.nii.gz", "deep/ct.nii.gz"]
)
def test_places_where_masks_are_found(tmp_path, place):
    path = tmp_path / "masks" / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    case = RawCase("s1", "s1", "s1", "test", tmp_path / "deep" / "ct.nii.gz", "deep/ct.nii.gz")

    found = find_anatomical_mask(case, [tmp_path / "masks"], beside_scan=False)

    assert found == (path.parent if path.name.startswith("spleen") else path)


def test_segmentations_beside_the_scan_and_two_masks(tmp_path, scan_file):
    (tmp_path / "segmentations").mkdir()
    (tmp_path / "segmentations" / "spleen.nii.gz").write_bytes(b"")
    case = case_of(scan_file)

    assert find_anatomical_mask(case, [], beside_scan=False) is None
    assert find_anatomical_mask(case, [], beside_scan=True) == tmp_path / "segmentations"
    (tmp_path / "s1.npz").write_bytes(b"")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "s1.npz").write_bytes(b"")
    with pytest.raises(UnusableScanError, match="several anatomical masks of s1"):
        find_anatomical_mask(case, [tmp_path / "masks"], beside_scan=True)


def test_pleura_is_a_shell_of_the_stated_thickness():
    regions = np.zeros((9, 21, 21), dtype=np.uint8)
    regions[4, 10, 10] = 1
    regions[4, 10, 12] = 8

    with_pleura = add_pleura(regions, spacing_mm=(2.0, 1.0, 1.0), thickness_mm=4.0)

    k, j, i = np.indices(regions.shape)
    distance = np.sqrt((2.0 * (k - 4)) ** 2 + (j - 10.0) ** 2 + (i - 10.0) ** 2)
    expected = (distance <= 4.0) & (regions == 0)
    np.testing.assert_array_equal(with_pleura == 19, expected)
    assert with_pleura[4, 10, 12] == 8 and with_pleura[4, 10, 10] == 1
    assert regions.max() == 8, "the input stays as it was"


def test_pleura_survives_coarse_grids_and_needs_a_lung():
    regions = np.zeros((3, 3, 3), dtype=np.uint8)
    regions[1, 1, 1] = 5

    assert (add_pleura(regions, (20.0, 6.0, 6.0), 4.0) == 19).sum() == 4  # the four neighbours in the slice, at 6 mm
    regions[1, 1, 1] = 7
    np.testing.assert_array_equal(add_pleura(regions, (1.0, 1.0, 1.0)), regions)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sample data are not there")
@pytest.mark.parametrize(
    ("scan", "mask"),
    [("example_ct_sm.nii.gz", "example_seg.nii.gz"), ("example_ct_dicom", "example_seg_dicom.nii.gz")],
)
def test_real_masks_of_totalsegmentator(scan, mask):
    scan = read_scan(SHARED / scan)

    regions = read_anatomical_mask(SHARED / mask, scan, case_of(SHARED / mask), MaskCoding())

    liver_and_friends, spine = scan.hu[regions == 20], scan.hu[regions == 14]
    # Abdominal organs are soft tissue, vertebrae denser: a flipped axis would mix them with air and fat.
    assert 20 < np.median(liver_and_friends) < 150 and np.median(spine) > np.median(liver_and_friends)
    assert np.percentile(liver_and_friends, 5) > -150
