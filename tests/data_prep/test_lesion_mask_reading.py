"""Lesion masks of every form as arrays on the scan's grid, and what is refused."""

import nibabel as nib
import numpy as np
import pytest

from data_prep.lesion_mask_reading import read_lesion_masks
from data_prep.lesion_masks import LesionMask
from data_prep.raw_case import RawCase
from tests.data_prep.tiny_release import GEOMETRY, chest_hu, write_volume
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.scan_reader import read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry


@pytest.fixture
def scan_file(tmp_path):
    return write_volume(tmp_path / "s1.nii.gz", chest_hu(0))


def read(mask, scan_file, disease="lung_nodule", spacing_mm=None, **options):
    case = RawCase("s1", "s1", "s1", "test", scan_file, scan_file.name, spacing_mm=spacing_mm)
    return read_lesion_masks({disease: mask}, read_scan(scan_file, spacing_mm=spacing_mm), case, **options)


def block(dtype=np.uint8, value=1):
    labels = np.zeros(GEOMETRY.shape, dtype=dtype)
    labels[2:5, 3:9, 4:11] = value
    return labels


def test_instances_become_one_mask(tmp_path, scan_file):
    labels = block(np.int16)
    labels[6:8, 10] = 300

    lesions = read(LesionMask(write_volume(tmp_path / "m.nii.gz", labels)), scan_file)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], labels > 0)
    assert lesions.masks["lung_nodule"].dtype == np.uint8 and lesions.partial == lesions.notes == ()


def test_a_mask_stored_in_other_axis_order_is_turned_to_the_scan(tmp_path, scan_file):
    ras = VolumeGeometry.from_ras(
        GEOMETRY.shape, nib.as_closest_canonical(nib.Nifti1Image(block().T, GEOMETRY.affine_ras)).affine
    )
    assert ras.axis_codes == "RAS"
    stored = ras.from_canonical(block())

    lesions = read(LesionMask(write_volume(tmp_path / "m.nii.gz", stored, ras)), scan_file)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], block())


def test_another_grid_is_refused_with_both_shapes_and_affines(tmp_path, scan_file):
    other = VolumeGeometry.from_spacing((11, 20, 24), (5.0, 4.0, 4.1))
    mask = LesionMask(write_volume(tmp_path / "m.nii.gz", block()[1:], other))

    with pytest.raises(
        UnusableScanError,
        match=r"m\.nii\.gz.*\[11, 20, 24\].*4\.1.*its scan.*\[12, 20, 24\].*4\.0.*--resample-lesion-masks",
    ):
        read(mask, scan_file)


def test_another_grid_is_resampled_when_asked_for(tmp_path, scan_file):
    # Each voxel of the finer mask is half as thick: the block is the same block.
    finer = np.repeat(block(value=7), 2, axis=0)
    affine = GEOMETRY.affine_lps.copy()
    affine[:3, 2] /= 2
    affine[2, 3] -= 1.25
    mask = LesionMask(write_volume(tmp_path / "m.nii.gz", finer, VolumeGeometry((24, 20, 24), affine)))

    lesions = read(mask, scan_file, resample=True)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], block())
    (note,) = lesions.notes
    assert note.startswith("lung_nodule: mask resampled onto the scan from shape [D, H, W] = [24, 20, 24]")


def test_a_mask_beside_the_scan_is_refused_even_when_resampled(tmp_path, scan_file):
    far = VolumeGeometry.from_spacing(GEOMETRY.shape, (5.0, 4.0, 4.0), (1000.0, 0.0, 0.0))
    mask = LesionMask(write_volume(tmp_path / "m.nii.gz", block(), far))

    with pytest.raises(UnusableScanError, match=f"its {3 * 6 * 7} voxels all lie outside the scan"):
        read(mask, scan_file, resample=True)


def test_a_mask_on_the_scans_grid_is_not_touched_by_the_option(tmp_path, scan_file):
    mask = LesionMask(write_volume(tmp_path / "m.nii.gz", block()))

    lesions = read(mask, scan_file, resample=True)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], block())
    assert lesions.notes == ()


def test_a_v1_scan_has_no_place_to_resample_to(tmp_path):
    blank = write_volume(tmp_path / "v1.nii.gz", chest_hu(0), None)
    fitting = LesionMask(write_volume(tmp_path / "fits.nii.gz", block(np.float32)))
    coarser = LesionMask(
        write_volume(tmp_path / "m.nii.gz", block()[1:], VolumeGeometry((11, 20, 24), GEOMETRY.affine_lps))
    )
    spacing = GEOMETRY.spacing_mm

    np.testing.assert_array_equal(read(fitting, blank, spacing_mm=spacing).masks["lung_nodule"], block())
    with pytest.raises(UnusableScanError, match="place is not known"):
        read(coarser, blank, spacing_mm=spacing, resample=True)


@pytest.mark.parametrize("release", ["v1", "v2"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (block(np.int16, -1), "from -1 to 0"),
        (block(np.float32, 0.5), "not whole.*from 0 to 0.5"),
        (block(np.float32, np.nan), "NaN|nan"),
    ],
)
def test_other_values_than_whole_numbers_are_refused(tmp_path, release, labels, words):
    scan_file = write_volume(tmp_path / "s1.nii.gz", chest_hu(0), GEOMETRY if release == "v2" else None)
    mask = LesionMask(write_volume(tmp_path / "m.nii.gz", labels))

    with pytest.raises(UnusableScanError, match=rf"m\.nii\.gz.*({words})"):
        read(mask, scan_file, spacing_mm=GEOMETRY.spacing_mm if release == "v1" else None)


def test_classes_of_totalsegmentator_are_told_apart(tmp_path, scan_file):
    labels = block(value=2)
    labels[9:11] = 3
    labels[0] = 1
    path = write_volume(tmp_path / "m.nii.gz", labels)
    task = "pleural_pericard_effusion"

    for disease, value in (("pleural_effusion", 2), ("pericardial_effusion", 3)):
        mask = LesionMask(path, "totalsegmentator", task, disease)
        np.testing.assert_array_equal(read(mask, scan_file, disease).masks[disease], labels == value)


def test_names_in_the_header_go_before_the_table(tmp_path, scan_file):
    path = write_volume(tmp_path / "m.nii.gz", block(value=5))
    text = '<Label Key="5" Red="0"><![CDATA[lung_nodules]]></Label>'
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text.encode()))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), path)

    lesions = read(LesionMask(path, "totalsegmentator", "lung_nodules", "lung_nodules"), scan_file)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], block())
    with pytest.raises(UnusableScanError, match=r"names the classes \['lung_nodules'\], expected 'pleural_effusion'"):
        read(LesionMask(path, "totalsegmentator", "pleural_pericard_effusion", "pleural_effusion"), scan_file)


def test_labels_that_the_task_does_not_have_are_refused(tmp_path, scan_file):
    path = write_volume(tmp_path / "m.nii.gz", block(value=4))

    with pytest.raises(UnusableScanError, match=r"label\(s\) \[4\], expected 0 or \{1: 'lung', 2: 'lung_nodules'\}"):
        read(LesionMask(path, "totalsegmentator", "lung_nodules", "lung_nodules"), scan_file)


def write_findings(path, channels, dtype=np.uint8):
    """Channels of (D, H, W) as ReXGroundingCT stores them: the finding is NIfTI's first axis, the affine is void."""
    nib.save(nib.Nifti1Image(np.stack([channel.T for channel in channels]).astype(dtype), np.eye(4)), path)
    return path


@pytest.mark.parametrize("stored", ["LPS", "RAS"])
def test_channels_of_findings_are_united_in_the_scans_own_axes(tmp_path, stored):
    geometry = GEOMETRY
    if stored == "RAS":
        geometry = VolumeGeometry.from_ras(
            GEOMETRY.shape, nib.as_closest_canonical(nib.Nifti1Image(block().T, GEOMETRY.affine_ras)).affine
        )
    scan_file = write_volume(tmp_path / "s1.nii.gz", geometry.from_canonical(chest_hu(0)), geometry)
    first, second, third = block(value=2), np.zeros_like(block()), np.zeros_like(block())
    second[9, 1, 2] = third[0, 0, 0] = 1
    path = write_findings(tmp_path / "m.nii.gz", [geometry.from_canonical(array) for array in (first, second, third)])
    mask = LesionMask(path, "rexgroundingct", findings=(0, 1), num_findings=3, partial=True)

    lesions = read(mask, scan_file)

    np.testing.assert_array_equal(lesions.masks["lung_nodule"], (first > 0) | (second > 0))
    assert lesions.partial == ("lung_nodule",)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("channels", r"shape \[1, 24, 20, 12\], but 2 findings.*expected \[2, 24, 20, 12\]"),
        ("grid", r"shape \[2, 24, 20, 11\].*\[2, 24, 20, 12\]"),
        ("3D", r"shape \[24, 20, 12\].*\[2, 24, 20, 12\]"),
        ("damaged", "cannot be read as NIfTI"),
        ("fractions", "not whole.*from 0 to 0.5"),
    ],
)
def test_files_of_findings_that_do_not_fit_are_refused(tmp_path, scan_file, kind, words):
    path = tmp_path / "m.nii.gz"
    channels = [block(), block()]
    if kind == "channels":
        write_findings(path, channels[:1])
    elif kind == "grid":
        write_findings(path, [channel[1:] for channel in channels])
    elif kind == "3D":
        write_volume(path, block())
    elif kind == "damaged":
        path.write_bytes(write_findings(path, channels).read_bytes()[:-100])
    else:
        write_findings(path, [channel * 0.5 for channel in channels], np.float32)

    with pytest.raises(UnusableScanError, match=words):
        read(LesionMask(path, "rexgroundingct", findings=(0,), num_findings=2), scan_file, resample=True)
