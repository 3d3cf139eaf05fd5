"""One volume from a NIfTI file: voxels as stored, their scaling, and the grid, each checked.

The file is decompressed in one go and read in place: that checks gzip's own checksum to the last byte, and costs no
second copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from vlm3d_ext.data.hounsfield_units import check_rescale
from vlm3d_ext.data.inflate import DamagedStreamError, inflate_gzip
from vlm3d_ext.data.scan import Rescale, UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry

__all__ = ["NiftiVolume", "is_nifti_name", "read_nifti"]

# Headers store the spacing twice, as float32; beyond one percent it is not rounding but a tool that changed only one of
# them.
_SPACING_TOLERANCE = 0.01
# Oblique affines carry rounding of about 1e-6, rotations written with few digits about 1e-4; a gantry tilt of 1 degree
# is 0.017.
_SHEAR_TOLERANCE = 1e-3
# By how much the squared length of a stored quaternion may exceed 1; half turns, which LPS files have, sit right at 1,
# in float32.
_QUATERNION_TOLERANCE = np.float64(1e-5)
_FOREIGN_UNITS = {1: "m", 3: "micrometres"}
_GZIP_MAGIC = b"\x1f\x8b"
_MINIMUM_HEADER_BYTES = 348


@dataclass(frozen=True, eq=False)
class NiftiVolume:
    """Voxels of a NIfTI file, before scaling and reorientation.

    Args:
        values: (D, H, W) in the file's own axis order (k, j, i), stored dtype, read-only.
        rescale: slope and intercept of the header, 1 and 0 where it has none.
        geometry: the file's grid.
        notes: what was noticed, in words.
    """

    values: np.ndarray
    rescale: Rescale
    geometry: VolumeGeometry
    notes: tuple[str, ...] = ()


def is_nifti_name(path: Path) -> bool:
    """Whether the file's name ends in .nii or .nii.gz."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_nifti(path: Path, blank_header_spacing_mm: tuple[float, float, float] | None = None) -> NiftiVolume:
    """Read a 3D NIfTI-1 or NIfTI-2 file.

    Args:
        path: a .nii or .nii.gz file.
        blank_header_spacing_mm: `[z, y, x]` in mm, for a file whose header says nothing of the grid (neither qform nor
            sform, or an identity): its axes are then taken as LPS. A header that does say something must agree with it.

    Raises:
        UnusableScanError: if the file is missing, damaged, not NIfTI, not 3D, or its grid cannot be trusted.
    """
    content = _file_content(path)
    header = _header(path, content)
    shape_ijk, notes = _shape_ijk(path, header)
    values = _voxels(path, content, header, shape_ijk)
    geometry, geometry_notes = _geometry(path, header, shape_ijk[::-1], blank_header_spacing_mm)
    return NiftiVolume(
        values.reshape(shape_ijk[::-1]),
        _rescale(path, header),
        geometry,
        (*notes, *geometry_notes),
    )


def _file_content(path: Path) -> bytes:
    if not path.is_file():
        raise UnusableScanError(f"{path}: no such file; expected a .nii or .nii.gz file; check the path.")
    twin = path.with_name(path.name[:-3] if path.name.lower().endswith(".gz") else path.name + ".gz")
    if twin.exists():
        raise UnusableScanError(
            f"{path}: {twin.name} lies beside it and may hold another volume; expected one of the two; remove the "
            "wrong one."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableScanError(
            f"{path}: cannot be read ({error.strerror}); check the file's permissions and disk."
        ) from None
    compressed = content[:2] == _GZIP_MAGIC
    if path.name.lower().endswith(".gz") and not compressed:
        raise UnusableScanError(
            f"{path}: begins with {content[:4]!r}, expected gzip; copy it again, or name it .nii if it is not "
            "compressed."
        )
    if not compressed:
        return content
    try:
        return inflate_gzip(content)
    except DamagedStreamError:
        raise UnusableScanError(
            f"{path}: the gzip stream of {len(content)} bytes is truncated or damaged; expected a whole file; copy it "
            "again."
        ) from None


def _header(path: Path, content: bytes) -> nib.Nifti1Header:
    size_field = content[:4]
    sizes = {int.from_bytes(size_field, "little"), int.from_bytes(size_field, "big")}
    for header_class, size, magic in (
        (nib.Nifti1Header, 348, content[344:348]),
        (nib.Nifti2Header, 540, content[4:8]),
    ):
        if size in sizes and len(content) >= size:
            if magic[:3] in (b"ni1", b"ni2"):
                raise UnusableScanError(
                    f"{path}: is the header of a .hdr/.img pair ({magic!r}), expected a single file; convert it to "
                    ".nii.gz."
                )
            if magic[:3] in (b"n+1", b"n+2"):
                header = header_class(content[:size], check=False)
                header.quaternion_threshold = _QUATERNION_TOLERANCE
                return header
    what = f"{len(content)} bytes" if len(content) < _MINIMUM_HEADER_BYTES else f"magic {content[344:348]!r}"
    raise UnusableScanError(
        f"{path}: has {what}, expected a NIfTI-1 or NIfTI-2 header; convert the scan to NIfTI again."
    )


def _shape_ijk(path: Path, header: nib.Nifti1Header) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
    except nib.spatialimages.HeaderDataError:
        shape = ()
    stored = shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise UnusableScanError(
            f"{path}: is {len(shape)}D with shape {stored}, expected one 3D volume; "
            "split or stack it into 3D volumes, one file each."
        )
    if min(shape) < 2:
        raise UnusableScanError(
            f"{path}: has fewer than 2 slices along an axis, shape {stored}; expected a volume; leave single slices "
            "out."
        )
    notes = (f"trailing dimensions of size 1 dropped from shape {stored}",) if shape != stored else ()
    return (shape[0], shape[1], shape[2]), notes


def _voxels(path: Path, content: bytes, header: nib.Nifti1Header, shape_ijk: tuple[int, int, int]) -> np.ndarray:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError):
        dtype = np.dtype(object)
    if dtype.kind not in "iuf":
        raise UnusableScanError(
            f"{path}: voxel data type code {int(header['datatype'])} is not supported; "
            "expected integers or real numbers; convert it to int16."
        )
    # 0 stands for the least there can be: the header and four bytes that say whether an extension follows.
    first_possible = header.template_dtype.itemsize + 4
    stored_offset = float(header["vox_offset"])
    if stored_offset and not first_possible <= stored_offset < 2**40:
        raise UnusableScanError(
            f"{path}: its voxels begin at byte {stored_offset:g}, expected {first_possible} or later; rewrite the file "
            "from the source."
        )
    offset = int(stored_offset) or first_possible
    num_voxels = int(np.prod(shape_ijk, dtype=np.int64))
    needed = offset + num_voxels * dtype.itemsize
    if len(content) < needed:
        raise UnusableScanError(
            f"{path}: is truncated, {len(content)} bytes where its header promises {needed}; copy the file again."
        )
    return np.frombuffer(content, dtype=dtype, count=num_voxels, offset=offset)


def _rescale(path: Path, header: nib.Nifti1Header) -> Rescale:
    slope, intercept = (float(header[field]) for field in ("scl_slope", "scl_inter"))
    # The standard writes "no scaling" as slope 0, nibabel writes NaN.
    if slope == 0 or np.isnan(slope):
        return Rescale(1, 0)
    check_rescale(path, "header's slope and intercept", Rescale(slope, intercept))
    return Rescale(slope, intercept)


def _geometry(
    path: Path,
    header: nib.Nifti1Header,
    shape: tuple[int, int, int],
    blank_header_spacing_mm: tuple[float, float, float] | None,
) -> tuple[VolumeGeometry, tuple[str, ...]]:
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if blank_header_spacing_mm is not None and _is_blank(header):
        _check_spacing(path, "spacing_mm", blank_header_spacing_mm)
        note = "header says nothing of the grid: spacing as passed, axes taken as LPS"
        return VolumeGeometry.from_spacing(shape, blank_header_spacing_mm), (note,)

    pixdim = tuple(float(value) for value in header["pixdim"][1:4])
    _check_spacing(path, "header spacing", pixdim[::-1])
    unit = _FOREIGN_UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is not None:
        raise UnusableScanError(f"{path}: its header gives positions in {unit}, expected mm; rewrite the file in mm.")
    if not sform and not qform:
        raise UnusableScanError(
            f"{path}: its header has no orientation (sform_code = qform_code = 0), so left and right are unknown; "
            "expected one; for CT-RATE v1 pass spacing_mm=[z, y, x] from the metadata table."
        )
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError):
        raise UnusableScanError(
            f"{path}: its qform is no rotation, expected a unit quaternion; rewrite the header from the DICOM source."
        ) from None
    geometry = _checked_geometry(path, shape, affine)
    if not np.allclose(geometry.spacing_mm, pixdim[::-1], rtol=_SPACING_TOLERANCE, atol=0):
        raise UnusableScanError(
            f"{path}: its affine has spacing {_mm(geometry.spacing_mm)} mm but its pixdim {_mm(pixdim[::-1])} mm [z, "
            "y, x]; expected them to agree; rewrite the header from the source."
        )
    notes: list[str] = []
    if blank_header_spacing_mm is not None:
        if not np.allclose(geometry.spacing_mm, blank_header_spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
            raise UnusableScanError(
                f"{path}: its header has spacing {_mm(geometry.spacing_mm)} mm, the caller passed "
                f"{_mm(blank_header_spacing_mm)} mm [z, y, x]; pass spacing_mm only for files with a blank header "
                "(CT-RATE v1)."
            )
        notes.append("header has a grid of its own that agrees with the spacing passed: header used")
    if sform and qform and not _qform_agrees(header, geometry):
        notes.append("qform is invalid or more than 1 mm from sform: sform used")
    return geometry, tuple(notes)


def _qform_agrees(header: nib.Nifti1Header, geometry: VolumeGeometry) -> bool:
    try:
        return geometry.is_close(VolumeGeometry.from_ras(geometry.shape, header.get_qform()), tolerance_mm=1.0)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return False


def _is_blank(header: nib.Nifti1Header) -> bool:
    """Whether the header tells nothing of the grid: no form at all, or the identity that `Nifti1Image(array,
    np.eye(4))` leaves."""
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        return True
    if int(header["sform_code"]) <= 0:
        return False
    return bool(np.array_equal(np.abs(header.get_sform()[:3, :3]), np.eye(3)))


def _check_spacing(path: Path, name: str, spacing_mm: tuple[float, ...]) -> None:
    if not np.isfinite(spacing_mm).all() or min(spacing_mm) <= 0:
        raise UnusableScanError(
            f"{path}: {name} is {_mm(spacing_mm)} mm [z, y, x], expected three positive numbers; "
            "correct it from the DICOM source or the metadata table."
        )


def _checked_geometry(path: Path, shape: tuple[int, int, int], affine_ras: np.ndarray) -> VolumeGeometry:
    try:
        geometry = VolumeGeometry.from_ras(shape, affine_ras)
    except ValueError:
        matrix = np.round(affine_ras[:3, :3], 4).tolist()
        raise UnusableScanError(
            f"{path}: its affine {matrix} is singular or not finite, expected three independent axes; "
            "rewrite the header from the source."
        ) from None
    if geometry.largest_axis_cosine > _SHEAR_TOLERANCE:
        degrees = np.degrees(np.arcsin(min(1.0, geometry.largest_axis_cosine)))
        raise UnusableScanError(
            f"{path}: its affine is sheared, axes are {degrees:.2f} degrees from a right angle, expected at most "
            f"{np.degrees(_SHEAR_TOLERANCE):.2f} (gantry tilt?); resample it onto a right-angled grid first."
        )
    return geometry


def _mm(spacing_mm: tuple[float, ...] | list[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in spacing_mm) + "]"
