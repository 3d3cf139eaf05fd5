"""Inflating gzip files and the members of zip archives with ISA-L, in half the time of zlib and with the same checks.

A stream is whole or refused: it must end where it should, be as long as was promised, and have its CRC-32. The
interpreter's lock is free while a piece is inflated, so that threads inflate side by side.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import cast

from isal import igzip, igzip_lib, isal_zlib

__all__ = ["DamagedStreamError", "checked_pieces", "inflate_gzip", "inflated_pieces"]

# Small enough for what was inflated to be in the processor's cache still when it is checked and copied, large enough
# for the calls not to count.
_PIECE_BYTES = 2**17
# The package's type hints take the exceptions for instances.
_DAMAGED = cast("tuple[type[Exception], ...]", (EOFError, gzip.BadGzipFile, isal_zlib.error, igzip_lib.error))


class DamagedStreamError(ValueError):
    """A stream that is truncated, or not what it was when it was written; says how, and leaves naming the file to the
    reader of it."""


def inflate_gzip(content: bytes) -> bytes:
    """Return what a gzip file holds, all of its members one after the other.

    Raises:
        DamagedStreamError: if it is no gzip, ends early, or a length or CRC-32 is not the stored one.
    """
    try:
        return cast(bytes, igzip.decompress(content))
    except _DAMAGED as error:
        raise DamagedStreamError(str(error)) from None


def inflated_pieces(compressed: memoryview) -> Iterator[bytes]:
    """Yield piece after piece of what a raw deflate stream (RFC 1951) holds.

    Args:
        compressed: the stream, and nothing after it.

    Raises:
        DamagedStreamError: when it turns out to be none, to end early, or to be followed by something.
    """
    stream = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
    position = 0
    while not stream.eof:
        given = compressed[position : position + _PIECE_BYTES] if stream.needs_input else compressed[:0]
        if stream.needs_input and not given:
            raise DamagedStreamError("the compressed stream ends before its end marker")
        position += len(given)
        try:
            piece = stream.decompress(given, _PIECE_BYTES)
        except _DAMAGED as error:
            raise DamagedStreamError(str(error)) from None
        if piece:
            yield piece
    if stream.unused_data or position < len(compressed):
        raise DamagedStreamError("the compressed stream ends before its bytes do")


def checked_pieces(pieces: Iterator[bytes] | Iterator[memoryview], num_bytes: int, crc32: int) -> Iterator[memoryview]:
    """Hand pieces on, and refuse them if all together they are not what was promised.

    What comes before the refusal must not be used: the checksum is known after the last piece only.

    Args:
        pieces: of a stream, inflated.
        num_bytes: length of all pieces.
        crc32: of all pieces.

    Raises:
        DamagedStreamError: after the last piece if the length or the CRC-32 differs, and before one that is too much.
    """
    length, checksum = 0, 0
    for piece in pieces:
        length += len(piece)
        if length > num_bytes:
            raise DamagedStreamError(f"the stream holds more than the {num_bytes} bytes promised")
        checksum = isal_zlib.crc32(piece, checksum)
        yield memoryview(piece)
    if length != num_bytes:
        raise DamagedStreamError(f"the stream holds {length} bytes, {num_bytes} were promised")
    if checksum != crc32:
        raise DamagedStreamError(f"the stream has CRC-32 {checksum:08x}, {crc32:08x} was promised")
