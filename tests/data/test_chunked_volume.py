import itertools
import json
import struct
import sys
import threading
import time
import zlib

import blosc2
import numpy as np
import pytest

from vlm3d_ext.data.chunked_volume import ChunkedVolume, DamagedVolumeError, write_chunked_volume

RANDOM = np.random.default_rng(0)
SHAPE = (45, 70, 150)


def chest(shape=SHAPE, seed=0) -> np.ndarray:
    """Grey levels with air around them, so that some chunks hold zeros only."""
    volume = np.random.default_rng(seed).integers(1, 200, shape).astype(np.uint8)
    volume[..., : shape[-1] // 2] = 0
    volume[..., 33:40, 3:9, 5:60] = 7
    return volume


def write(path, volume, description=None):
    write_chunked_volume(path, volume, description or {})
    return path


@pytest.mark.parametrize("shape", [SHAPE, (64, 128, 192), (1, 1, 1), (3, 5, 7), (33, 64, 65), (2, 33, 65, 66)])
def test_a_volume_comes_back_as_written(tmp_path, shape):
    volume = chest(shape)
    opened = ChunkedVolume(write(tmp_path / "a.b2nd", volume, {"spacing_mm": [2.5, 0.7, 1]}))
    assert opened.shape == shape and opened.max_value == volume.max()
    assert opened.description == {"spacing_mm": [2.5, 0.7, 1]}
    out = np.full(shape, 9, np.uint8)
    assert opened.read(out) is out
    np.testing.assert_array_equal(out, volume)
    np.testing.assert_array_equal(opened.read(), volume)


def test_other_programs_read_it(tmp_path):
    volume = chest()
    array = blosc2.open(str(write(tmp_path / "a.b2nd", volume, {"spacing_mm": [1, 2, 3]})), mode="r")
    np.testing.assert_array_equal(array[:], volume)
    assert json.loads(array.schunk.vlmeta["vlm3d"]) == {"spacing_mm": [1, 2, 3]}


def test_patches_equal_slices_at_every_border(tmp_path):
    volume = chest()
    opened = ChunkedVolume(write(tmp_path / "a.b2nd", volume))
    # before, at and behind the borders of chunks and of the volume
    sides = [[(0, n), (0, 1), (n - 1, 1), (c - 1, 2), (c, 1)] for n, c in zip(SHAPE, (32, 64, 64), strict=True)]
    for box in itertools.product(*sides):
        start, size = zip(*box, strict=True)
        expected = volume[tuple(slice(s, s + n) for s, n in box)]
        np.testing.assert_array_equal(opened.read_patch(start, size), expected)
    out = np.zeros((9, 20, 80), np.uint8)
    opened.read_patch((30, 50, 60), (9, 20, 80), out)
    np.testing.assert_array_equal(out, volume[30:39, 50:70, 60:140])


@pytest.mark.parametrize(
    ("start", "size"), [((0, 0, 0), (46, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((0, 70, 0), (1, 1, 1)), ((0, 0), (1, 1))]
)
def test_patches_beyond_the_volume(tmp_path, start, size):
    opened = ChunkedVolume(write(tmp_path / "a.b2nd", chest()))
    with pytest.raises(ValueError, match=r"a\.b2nd: (the|a) patch"):
        opened.read_patch(start, size)


def test_places_that_do_not_fit(tmp_path):
    opened = ChunkedVolume(write(tmp_path / "a.b2nd", chest()))
    for out in (np.zeros((1, *SHAPE), np.uint8), np.zeros(SHAPE, np.int8), np.zeros((45, 70, 300), np.uint8)[..., ::2]):
        with pytest.raises(ValueError, match="out must be C-contiguous uint8"):
            opened.read(out)


def test_the_same_volume_gives_the_same_bytes(tmp_path):
    threads = blosc2.nthreads
    try:
        for number in (1, 4):
            blosc2.set_nthreads(number)
            write(tmp_path / f"{number}.b2nd", chest((64, 128, 256)), {"a": 1})
    finally:
        blosc2.set_nthreads(threads)
    assert (tmp_path / "1.b2nd").read_bytes() == (tmp_path / "4.b2nd").read_bytes()


def test_background_takes_no_room_and_noise_hardly_more_than_itself(tmp_path):
    nothing = write(tmp_path / "a.b2nd", np.zeros((64, 512, 512), np.uint8)).stat().st_size
    assert nothing < 5000
    noise = RANDOM.integers(0, 256, (64, 128, 128)).astype(np.uint8)
    assert write(tmp_path / "b.b2nd", noise).stat().st_size < 1.01 * noise.nbytes


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    path = write(tmp_path / "a.b2nd", chest((3, 5, 34)), {"spacing_mm": [1, 2, 3]})
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedVolumeError, match=r"a\.b2nd: .*; prepare the scan again"):
            ChunkedVolume(path).read()


def test_truncated_files_and_files_of_another_kind(tmp_path):
    path = write(tmp_path / "a.b2nd", chest())
    content = path.read_bytes()
    for keep in (0, 1, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(DamagedVolumeError, match="no index at its end"):
            ChunkedVolume(path)
    path.write_bytes(content + content[-200:])
    with pytest.raises(DamagedVolumeError, match="damaged index"):
        ChunkedVolume(path)
    path.write_bytes(blosc2.asarray(chest()).to_cframe())
    with pytest.raises(DamagedVolumeError, match="no index at its end"):
        ChunkedVolume(path)
    with pytest.raises(DamagedVolumeError, match=r"missing\.b2nd: no such file"):
        ChunkedVolume(tmp_path / "missing.b2nd")
    with pytest.raises(DamagedVolumeError, match="cannot be read"):
        ChunkedVolume(tmp_path)


def test_a_patch_looks_at_its_own_chunks_only(tmp_path):
    volume = chest((64, 128, 128))
    path = write(tmp_path / "a.b2nd", volume)
    content = bytearray(path.read_bytes())
    content[content.index(volume[63, 127, 64:128].tobytes())] ^= 1  # noise is stored as it is; this is the last chunk
    path.write_bytes(content)
    opened = ChunkedVolume(path)
    np.testing.assert_array_equal(opened.read_patch((0, 0, 0), (32, 128, 128)), volume[:32])
    np.testing.assert_array_equal(opened.read_patch((0, 0, 0), (64, 64, 128)), volume[:, :64])
    for start, size in (((32, 64, 64), (1, 1, 1)), ((0, 0, 0), volume.shape)):
        with pytest.raises(DamagedVolumeError, match="damaged chunk 7"):
            opened.read_patch(start, size)
    with pytest.raises(DamagedVolumeError, match="damaged chunk 7"):
        opened.read()


def test_a_chunk_that_claims_more_than_there_is_room_for(tmp_path):
    """With checksums that agree, as no accident makes it; blosc2 itself would write beyond the memory."""
    path = write(tmp_path / "a.b2nd", chest((3, 5, 34)))
    array = blosc2.open(str(path), mode="r")
    chunk = array.schunk.get_chunk(0)
    content = path.read_bytes()
    claims = chunk[:4] + struct.pack("<i", 10**6) + chunk[8:]
    content = content.replace(chunk, claims).replace(
        struct.pack("<II", len(chunk), zlib.crc32(chunk)), struct.pack("<II", len(chunk), zlib.crc32(claims))
    )
    index = content[content.index(struct.pack("<QII", content.index(claims), len(chunk), zlib.crc32(claims))) : -4]
    path.write_bytes(content[:-4] + struct.pack("<I", zlib.crc32(index)))
    with pytest.raises(DamagedVolumeError, match="a chunk 0 of 1000000 voxels for 510"):
        ChunkedVolume(path).read()


@pytest.mark.parametrize(
    ("name", "volume", "message"),
    [
        ("a.npz", np.zeros((2, 3, 4), np.uint8), "must end in .b2nd"),
        ("a.b2nd", np.zeros((2, 3, 4), np.int16), "got int16"),
        ("a.b2nd", np.zeros((3, 4), np.uint8), r"shape \(3, 4\)"),
        ("a.b2nd", np.zeros((2, 0, 4), np.uint8), r"shape \(2, 0, 4\)"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, name, volume, message):
    with pytest.raises(ValueError, match=message):
        write_chunked_volume(tmp_path / name, volume, {})
    assert not list(tmp_path.iterdir())


def test_other_threads_run_while_a_volume_is_read(tmp_path):
    """With an endless switch interval, a thread that holds the interpreter's lock gives it to nobody."""
    opened = ChunkedVolume(write(tmp_path / "a.b2nd", chest((64, 512, 512))))
    out = np.zeros(opened.shape, np.uint8)
    ended = []
    thread = threading.Thread(
        target=lambda: [opened.read(out) for _ in range(10)] and ended.append(time.perf_counter())
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        moments = [time.perf_counter()]
        while not ended:
            time.sleep(0.0005)
            moments.append(time.perf_counter())
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(moment < ended[0] for moment in moments) > 5
