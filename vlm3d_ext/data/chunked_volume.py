"""A volume of uint8 in compressed chunks, of which a patch reads only those that it touches.

The file is a blosc2 array (``.b2nd``), which `blosc2.open` reads anywhere, followed by an index of ours: what the
volume is, and place and CRC-32 of each chunk. Blosc2 checks no content and holds the interpreter's lock while it reads
an array. With the index, chunks are checked, and those of a whole volume decompressed one by one with the lock free.

Chunks are of 32 x 64 x 64 voxels in four blocks of 8 slices, without a filter. Measured on chest CT: shuffling bits
makes reading more than twice as slow and files no smaller, differences between blocks seven times as slow; smaller
chunks make whole volumes slower, larger ones patches. LZ4 at its fastest level is the codec where it halves the volume,
as in windows in which air is black; otherwise LZ4HC, up to a quarter smaller and a third slower to read.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from isal import isal_zlib

from vlm3d_ext.data.atomic_files import write_bytes

__all__ = ["CHUNKED_EXTENSION", "ChunkedVolume", "DamagedVolumeError", "write_chunked_volume"]

CHUNKED_EXTENSION = ".b2nd"

# its digit goes up with another layout of the index
_MAGIC = b"VLM3Dck1"
_CHUNK_SHAPE = (32, 64, 64)
# Of a patch, only the blocks are decompressed that it touches. Whole slices of a chunk lie one after the other as if it
# had no blocks.
_BLOCK_SLICES = 8
# name of the codec and its level, fastest to read first
_CODECS = (("LZ4", 1), ("LZ4HC", 9))
_GOOD_RATIO = 0.5
# per chunk: where it begins in the file, its bytes, 0 for a chunk of zeros, which is not stored, and their CRC-32
_ENTRY = struct.Struct("<QII")
# Of the index: magic; number of axes; largest value; shape and shape of chunks, filled up with ones; bytes of the
# blosc2 array; where its first chunk begins and its last one ends; bytes of the description; CRC-32 of the array's
# bytes outside the chunks; then of the index up to here.
_TAIL = struct.Struct("<8sBBxx4I4IQQQIII")
_CRC32 = struct.Struct("<I")
# in a blosc2 chunk: bytes of the chunk decompressed, of a block, and compressed (blosc2's README_CHUNK_FORMAT.rst)
_CHUNK_SIZES = struct.Struct("<4xiii")
# there, too: the byte that says in these bits whether the chunk is of one value only, and how it says of zeros
_FLAGS_BYTE, _SPECIAL, _SPECIAL_ZEROS = 31, 0x70, 0x10


class DamagedVolumeError(ValueError):
    """A chunked volume that is missing, truncated, damaged or of another kind; one line: file, value found, what was
    expected, what to do."""


def write_chunked_volume(path: str | os.PathLike, volume: np.ndarray, description: Mapping[str, Any]) -> None:
    """Write a volume; the same volume and description give the same bytes, and the file is whole or absent.

    Args:
        path: name ending in .b2nd.
        volume: (D, H, W) or (C, D, H, W) uint8, without an empty axis.
        description: further plain JSON content, which comes back as `ChunkedVolume.description`; for other programs it
            is in the array's vlmeta, too, as ``vlm3d``.

    Raises:
        ValueError: if name, dtype or shape do not fit.
        OSError: if the file cannot be written.
    """
    if not os.fspath(path).endswith(CHUNKED_EXTENSION):
        raise ValueError(f"{path}: a chunked volume's file name must end in {CHUNKED_EXTENSION}; rename it.")
    if volume.dtype != np.uint8 or volume.ndim not in (3, 4) or 0 in volume.shape:
        raise ValueError(
            f"{path}: a chunked volume must be uint8 and (D, H, W) or (C, D, H, W), got {volume.dtype} of shape "
            f"{volume.shape}; convert it first."
        )
    chunk_shape = tuple(min(*lengths) for lengths in zip((1, *_CHUNK_SHAPE)[-volume.ndim :], volume.shape, strict=True))
    text = json.dumps(description, separators=(",", ":"), allow_nan=False).encode()
    for codec, level in _CODECS:
        array, table = _compress(np.ascontiguousarray(volume), chunk_shape, codec, level, text)
        if len(array) <= _GOOD_RATIO * volume.nbytes:
            break
    begins = [begin for begin, length, _ in table if length]
    begin, end = (begins[0], max(begin + length for begin, length, _ in table)) if begins else (len(array), len(array))
    ones = (1,) * (4 - volume.ndim)
    lengths = (*volume.shape, *ones, *chunk_shape, *ones)
    outside = _crc32_outside(memoryview(array), begin, end)
    tail = _TAIL.pack(_MAGIC, volume.ndim, int(volume.max()), *lengths, len(array), begin, end, len(text), outside, 0)
    index = b"".join(_ENTRY.pack(*entry) for entry in table) + text + tail[: -_CRC32.size]
    write_bytes(path, array + index + _CRC32.pack(isal_zlib.crc32(index)))


class ChunkedVolume:
    """A chunked volume that is open for reading: `shape`, `max_value`, `description`, and its voxels on demand.

    The file is mapped into memory; no chunk is looked at before it is wanted. One object serves one thread.

    Args:
        path: the file.

    Raises:
        DamagedVolumeError: if there is no such file, or its index is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = os.fspath(path)
        content = self._content = _mapped(self._path)
        tail = content[-_TAIL.size :]
        if len(tail) < _TAIL.size or tail[: len(_MAGIC)] != _MAGIC:
            raise self._damaged("has no index at its end")
        _, num_axes, self.max_value, *lengths, array_bytes, begin, end, text_bytes, outside, crc32 = _TAIL.unpack(tail)
        self._index = content[array_bytes : -_CRC32.size]
        if isal_zlib.crc32(self._index) != crc32:
            raise self._damaged("has a damaged index")
        self._array = content[:array_bytes]
        if _crc32_outside(self._array, begin, end) != outside:
            raise self._damaged("is damaged outside its chunks")
        self.shape = tuple(lengths[:num_axes])
        self._chunk_shape = tuple(lengths[4 : 4 + num_axes])
        self._text_bytes = text_bytes

    @property
    def description(self) -> dict[str, Any]:
        """What the writer said of the volume."""
        end = len(self._index) - _TAIL.size + _CRC32.size
        return json.loads(bytes(self._index[end - self._text_bytes : end]))

    @property
    def _grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self._chunk_shape, strict=True))

    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """Read the whole volume, a chunk at a time, with the interpreter's lock free meanwhile.

        Args:
            out: uint8 of the volume's shape, C-contiguous, is filled and returned.

        Raises:
            DamagedVolumeError: if a chunk is not what was written; then `out` may hold anything.
            ValueError: if `out` does not fit.
        """
        out = self._place(out, self.shape)
        if self.max_value == 0:
            out.fill(0)
            return out
        decompress = _blosc2().decompress2
        chunk = np.empty(self._chunk_shape, np.uint8)
        # NumPy copies a row of a chunk as one element in half the time that it takes for its voxels.
        row = self._chunk_shape[-1]
        unit = row if self.shape[-1] % row == 0 else 1
        source, target = (array.view(f"V{unit}") if unit > 1 else array for array in (chunk, out))
        steps = (*self._chunk_shape[:-1], row // unit)
        zero = np.zeros((), source.dtype)
        for number, place in enumerate(np.ndindex(self._grid)):
            compressed = self._chunk(number)
            there = tuple(slice(index * step, (index + 1) * step) for index, step in zip(place, steps, strict=True))
            if compressed is None:
                target[there] = zero
                continue
            # Blosc2 writes as many bytes as the chunk says, however few there is room for.
            num_bytes, _, compressed_bytes = _CHUNK_SIZES.unpack_from(compressed)
            if num_bytes != chunk.nbytes or compressed_bytes != len(compressed):
                raise self._damaged(f"has a chunk {number} of {num_bytes} voxels for {chunk.nbytes}")
            try:
                decompress(compressed, dst=chunk, nthreads=1)
            except (RuntimeError, ValueError):
                raise self._damaged(f"has a chunk {number} that cannot be decompressed") from None
            part = target[there]
            part[...] = source[tuple(slice(length) for length in part.shape)]
        return out

    def read_patch(self, start: Sequence[int], size: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read a part of the volume; only the chunks that it touches are looked at.

        Args:
            start: index of the first voxel, one number for each axis.
            size: number of voxels along each axis.
            out: uint8 of that size, C-contiguous, is filled and returned.

        Raises:
            DamagedVolumeError: if a chunk is not what was written.
            ValueError: if the patch reaches beyond the volume, or `out` does not fit it.
        """
        start, size = tuple(start), tuple(size)
        if len(start) != len(self.shape) or len(size) != len(self.shape):
            raise ValueError(
                f"{self._path}: a patch of a volume {self.shape} has as many axes, got {start} and {size}."
            )
        stop = tuple(s + n for s, n in zip(start, size, strict=True))
        if min(start) < 0 or min(size) < 1 or any(e > length for e, length in zip(stop, self.shape, strict=True)):
            raise ValueError(f"{self._path}: the patch from {start} of size {size} is not within {self.shape}.")
        out = self._place(out, size)
        # Not for exactness only: blosc2 was seen to crash on a damaged chunk.
        for number in self._touched(start, stop):
            self._chunk(number)
        try:
            array = _blosc2().ndarray_from_cframe(self._array, copy=False)
            return array.get_slice_numpy(out, (start, stop))
        except RuntimeError:
            raise self._damaged(f"has chunks that cannot be decompressed around {start}") from None

    def _touched(self, start: Sequence[int], stop: Sequence[int]) -> list[int]:
        """Return the numbers of the chunks that a patch touches."""
        numbers = [0]
        for first, end, chunk, count in zip(start, stop, self._chunk_shape, self._grid, strict=True):
            indices = range(first // chunk, (end - 1) // chunk + 1)
            numbers = [number * count + index for number in numbers for index in indices]
        return numbers

    def _chunk(self, number: int) -> memoryview | None:
        """Return a chunk as it is stored, after checking it; None for one of zeros."""
        begin, length, crc32 = _ENTRY.unpack_from(self._index, number * _ENTRY.size)
        if length == 0:
            return None
        compressed = self._array[begin : begin + length]
        if isal_zlib.crc32(compressed) != crc32:
            raise self._damaged(f"has a damaged chunk {number}")
        return compressed

    def _place(self, out: np.ndarray | None, size: tuple[int, ...]) -> np.ndarray:
        if out is None:
            return np.empty(size, np.uint8)
        if out.shape != size or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"{self._path}: out must be C-contiguous uint8 of shape {size}, got {out.dtype} of shape {out.shape}."
            )
        return out

    def _damaged(self, what: str) -> DamagedVolumeError:
        return DamagedVolumeError(f"{self._path}: {what}, expected a whole chunked volume; prepare the scan again.")


def _mapped(path: str) -> memoryview:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            # Unmapped with the last view of it, not before: an error's traceback may still hold one.
            return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)
    except ValueError:  # an empty file
        return memoryview(b"")
    except FileNotFoundError:
        raise DamagedVolumeError(
            f"{path}: no such file; expected a chunked volume ({CHUNKED_EXTENSION}); prepare the scan first."
        ) from None
    except OSError as error:
        raise DamagedVolumeError(
            f"{path}: cannot be read ({error.strerror}); expected a chunked volume; check the file's permissions and "
            "disk."
        ) from None


def _compress(
    volume: np.ndarray, chunk_shape: tuple[int, ...], codec: str, level: int, text: bytes
) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Return a blosc2 array's bytes and the entries of its chunks."""
    blosc2 = _blosc2()
    parameters = blosc2.CParams(
        codec=blosc2.Codec[codec],
        clevel=level,
        typesize=1,
        nthreads=1,
        filters=[blosc2.Filter.NOFILTER],
        filters_meta=[0],
    )
    depth, height, width = chunk_shape[-3:]
    slices = _BLOCK_SLICES if depth % _BLOCK_SLICES == 0 else depth
    blocks = (*chunk_shape[:-3], slices, height, width)
    array = blosc2.asarray(volume, chunks=chunk_shape, blocks=blocks, cparams=parameters)
    array.schunk.vlmeta["vlm3d"] = text.decode()
    content = array.to_cframe()
    table = []
    end = 0
    for number in range(array.schunk.nchunks):
        chunk = array.schunk.get_chunk(number)
        if _is_zero(chunk):
            table.append((0, 0, 0))
            continue
        begin = content.index(chunk, end)
        assert end in (0, begin), "blosc2 lays chunks one after the other, in their order"
        end = begin + len(chunk)
        table.append((begin, len(chunk), isal_zlib.crc32(chunk)))
    return content, table


def _crc32_outside(array: memoryview, begin: int, end: int) -> int:
    """Return the CRC-32 of a blosc2 array without its chunks, which lie one after the other."""
    return isal_zlib.crc32(array[end:], isal_zlib.crc32(array[:begin]))


def _is_zero(chunk: bytes) -> bool:
    return (chunk[_FLAGS_BYTE] & _SPECIAL) == _SPECIAL_ZEROS


@cache
def _blosc2() -> ModuleType:
    """Import blosc2 where it is needed, and let it free the interpreter's lock while it decompresses.

    One thread for each call: whoever loads data has a thread or process for each core already.
    """
    import blosc2

    blosc2.set_releasegil(True)
    blosc2.set_nthreads(1)
    return blosc2
