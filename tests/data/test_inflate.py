import gzip
import sys
import threading
import time
import zlib

import numpy as np
import pytest

from vlm3d_ext.data.inflate import DamagedStreamError, checked_pieces, inflate_gzip, inflated_pieces

RANDOM = np.random.default_rng(0)
# grey levels with runs, more than one piece long, and of no round number of bytes
CONTENT = RANDOM.integers(0, 40, 700_001).astype(np.uint8).repeat(RANDOM.integers(1, 4, 700_001)).tobytes()


def raw_deflate(content: bytes, level: int = 6) -> bytes:
    stream = zlib.compressobj(level, wbits=-15)
    return stream.compress(content) + stream.flush()


@pytest.mark.parametrize("content", [b"", b"a", CONTENT], ids=["empty", "one byte", "pieces"])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_what_zlib_deflated_comes_back(content, level):
    assert inflate_gzip(gzip.compress(content, level)) == content
    assert b"".join(inflated_pieces(memoryview(raw_deflate(content, level)))) == content


def test_long_runs_come_in_pieces_of_bounded_size():
    pieces = list(inflated_pieces(memoryview(raw_deflate(bytes(30_000_000)))))
    assert sum(map(len, pieces)) == 30_000_000 and max(map(len, pieces)) < 1_000_000


def test_gzip_members_follow_each_other_and_zeros_may_fill_up():
    assert inflate_gzip(gzip.compress(b"one, ") + gzip.compress(b"two") + bytes(20)) == b"one, two"


@pytest.mark.parametrize("place", ["header", "middle", "checksum", "length"])
def test_a_flipped_bit_in_a_gzip_file(place):
    stored = bytearray(gzip.compress(CONTENT))
    stored[{"header": 0, "middle": len(stored) // 2, "checksum": -6, "length": -2}[place]] ^= 4
    with pytest.raises(DamagedStreamError):
        inflate_gzip(bytes(stored))


@pytest.mark.parametrize("keep", [5, 0.5, -1])
def test_a_truncated_gzip_file(keep):
    stored = gzip.compress(CONTENT)
    with pytest.raises(DamagedStreamError):
        inflate_gzip(stored[: int(len(stored) * keep) if isinstance(keep, float) else keep])


def test_a_truncated_stream_and_one_with_something_behind_it():
    stored = raw_deflate(CONTENT)
    for keep in (0, 1, len(stored) // 2, len(stored) - 1):
        with pytest.raises(DamagedStreamError, match="before its end marker"):
            list(inflated_pieces(memoryview(stored[:keep])))
    for behind in (1, 2**18):
        with pytest.raises(DamagedStreamError, match="before its bytes do"):
            list(inflated_pieces(memoryview(stored + bytes(behind))))


def test_pieces_must_be_what_was_promised():
    checksum = zlib.crc32(b"abcdef")
    assert [bytes(piece) for piece in checked_pieces(iter([b"abc", b"def"]), 6, checksum)] == [b"abc", b"def"]
    for length, crc32, message in (
        (7, checksum, "holds 6 bytes, 7 were promised"),
        (5, checksum, "more than the 5 bytes"),
        (6, checksum ^ 1, f"{checksum:08x}"),
    ):
        with pytest.raises(DamagedStreamError, match=message):
            list(checked_pieces(iter([b"abc", b"def"]), length, crc32))


def test_other_threads_run_while_a_piece_is_inflated(monkeypatch):
    """With an endless switch interval, a thread that holds the interpreter's lock gives it to nobody."""
    stored = memoryview(raw_deflate(CONTENT * 6, 1))
    woken = []
    thread = threading.Thread(target=lambda: woken.append(list(inflated_pieces(stored)) and time.perf_counter()))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        moments = [time.perf_counter()]
        while not woken:
            time.sleep(0.0005)
            moments.append(time.perf_counter())
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(moment < woken[0] for moment in moments) > 5
