"""Arrays from an NPZ file, inflated straight into place. Pickled objects are never loaded."""

from __future__ import annotations

import io
import re
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from math import prod

import numpy as np

from vlm3d_ext.data.inflate import DamagedStreamError, checked_pieces, inflated_pieces

__all__ = ["NpzArrays", "PickledArrayError"]

_EXTENSION = ".npy"
# Of a member's own header in the archive: signature, 22 bytes that the directory has too, then the lengths of its name
# and of what else stands between header and data (APPNOTE.TXT, section 4.3.7).
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 0x1
# The header that numpy writes for an array of plain numbers. Numpy reads it by Python's own parser, which CPython 3.11
# was seen to crash in ("AST constructor recursion depth mismatch") when two threads parse at once.
_PLAIN_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': '(?P<dtype>[<>|][biuf]\d{1,2})', 'fortran_order': "
    rb"(?P<fortran>True|False), 'shape': \((?P<shape>[\d, ]*)\), \} *\n",
    re.DOTALL,
)


class PickledArrayError(ValueError):
    """An array of Python objects, which cannot be read without running what the file says; `name` is the array's."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} holds pickled Python objects")
        self.name = name


class NpzArrays:
    """The arrays of an NPZ, as `np.savez` and `np.savez_compressed` write it.

    Args:
        content: the file.

    Raises:
        zipfile.BadZipFile: if it is no zip archive, or its directory is damaged.
    """

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self._archive = zipfile.ZipFile(io.BytesIO(content))
        self._members = {info.filename.removesuffix(_EXTENSION): info for info in self._archive.infolist()}

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return list(self._members)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """Read an array.

        Args:
            name: one of `names`.
            out: C-contiguous; filled if it has the dtype of the array and its shape, but for an axis of length 1 in
                front; otherwise not touched.

        Returns:
            The array, which can be written to: a view of `out` if that was filled.

        Raises:
            PickledArrayError: if it holds Python objects.
            DamagedStreamError: if it is no array, not as long as its header says, or not what was written; then `out`
                may hold anything.
        """
        info = self._members[name]
        pieces = checked_pieces(self._pieces(info), info.file_size, info.CRC)
        first = next(pieces, memoryview(b""))
        shape, fortran_order, dtype, begin = _array_header(first)
        if dtype.hasobject:
            raise PickledArrayError(name)
        num_bytes = prod(shape) * dtype.itemsize
        if begin + num_bytes != info.file_size:
            raise DamagedStreamError(f"{name} has {info.file_size - begin} bytes, its shape and type {num_bytes}")
        if out is not None and out.shape in (shape, (1, *shape)) and out.dtype == dtype and not fortran_order:
            array = out.reshape(shape)
        else:
            array = np.empty(shape[::-1] if fortran_order else shape, dtype)
        _fill(array.reshape(-1).view(np.uint8), first[begin:], pieces)
        return array.T if fortran_order else array

    def _pieces(self, info: zipfile.ZipInfo) -> Iterator[bytes] | Iterator[memoryview]:
        if info.flag_bits & _ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # NumPy writes neither; whoever packed the arrays by hand may have.
            return iter([self._archive.read(info)])
        header = self._content[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size:
            raise DamagedStreamError("the archive ends before a member begins")
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if signature != _LOCAL_SIGNATURE:
            raise DamagedStreamError("no member begins where the directory says")
        begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        data = self._content[begin : begin + info.compress_size]
        if len(data) < info.compress_size:
            raise DamagedStreamError("the archive ends before a member does")
        return inflated_pieces(data) if info.compress_type == zipfile.ZIP_DEFLATED else iter([data])


def _array_header(first: memoryview) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, whether the order is Fortran's, dtype, and where the data begin."""
    stream = io.BytesIO(first)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        plain = _PLAIN_HEADER.match(first)
        if plain is not None and plain.end() == 10 + int.from_bytes(plain["length"], "little"):
            shape = tuple(int(n) for n in plain["shape"].split(b",") if n.strip())
            return shape, plain["fortran"] == b"True", np.dtype(plain["dtype"].decode()), plain.end()
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise DamagedStreamError(f"array format {version} is neither 1.0 nor 2.0")
        shape, fortran_order, dtype = readers[version](stream)
    # Whether the header is what was written is known only when all of the array is read; until then it may be anything.
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise DamagedStreamError(f"no array header: {error}") from None
    return shape, fortran_order, dtype, stream.tell()


def _fill(destination: np.ndarray, first: memoryview, pieces: Iterator[memoryview]) -> None:
    """Lay the pieces one after the other; `checked_pieces` has seen to it that they do not exceed the destination."""
    end = len(first)
    destination[:end] = np.frombuffer(first, np.uint8)
    for piece in pieces:
        begin, end = end, end + len(piece)
        destination[begin:end] = np.frombuffer(piece, np.uint8)
