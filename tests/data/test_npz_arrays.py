import io
import pickle
import zipfile

import numpy as np
import pytest

from vlm3d_ext.data.inflate import DamagedStreamError
from vlm3d_ext.data.npz_arrays import NpzArrays, PickledArrayError

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "imgs": RANDOM.integers(0, 9, (37, 61, 83)).astype(np.uint8),
    "fortran": np.asfortranarray(RANDOM.normal(size=(3, 4, 5)).astype(">f4")),
    "number": np.float64(2.5),
    "empty": np.zeros((0, 3), np.int16),
    "names": np.array(["one", "three"]),
}


def npz(save, **arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_is_what_numpy_reads(save):
    content = npz(save, **ARRAYS)
    ours = NpzArrays(content)
    assert ours.names == list(ARRAYS)
    with np.load(io.BytesIO(content)) as theirs:
        for name in ARRAYS:
            found, expected = ours.read(name), theirs[name]
            assert found.dtype == expected.dtype and found.shape == expected.shape
            np.testing.assert_array_equal(found, expected)
            found[...] = found  # may be written to


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_go_into_places_that_fit(save):
    ours = NpzArrays(npz(save, **ARRAYS))
    imgs = ARRAYS["imgs"]
    for place in (np.zeros(imgs.shape, np.uint8), np.zeros((1, *imgs.shape), np.uint8)):
        found = ours.read("imgs", place)
        assert found.shape == imgs.shape and np.shares_memory(found, place)
        np.testing.assert_array_equal(place.reshape(imgs.shape), imgs)
    for place in (
        np.zeros((61, 37, 83), np.uint8),
        np.zeros(imgs.shape, np.int8),
        np.zeros((2, *imgs.shape), np.uint8),
    ):
        np.testing.assert_array_equal(ours.read("imgs", place), imgs)
        assert not place.any()


def test_archives_made_by_hand_are_read_too():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        member = io.BytesIO()
        np.save(member, ARRAYS["imgs"])
        archive.writestr("imgs.npy", member.getvalue())
    np.testing.assert_array_equal(NpzArrays(buffer.getvalue()).read("imgs"), ARRAYS["imgs"])


def test_python_objects_are_never_loaded():
    ours = NpzArrays(npz(np.savez, good=np.arange(3), bad=np.array([{"a": 1}], dtype=object)))
    with pytest.raises(PickledArrayError) as caught:
        ours.read("bad")
    assert caught.value.name == "bad" and ours.read("good").tolist() == [0, 1, 2]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("imgs.npy", pickle.dumps({"a": 1}))
    with pytest.raises(DamagedStreamError, match="no array header"):
        NpzArrays(buffer.getvalue()).read("imgs")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_byte_goes_unnoticed(save):
    """Whichever byte it is: either the read is refused, or the array is what was written, as far as the byte says
    nothing of it (a time, an attribute)."""
    imgs = ARRAYS["imgs"][:3, :5, :7]
    content = npz(save, imgs=imgs)
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        try:
            found = NpzArrays(bytes(damaged)).read("imgs")
        except (ValueError, KeyError, NotImplementedError, RuntimeError, EOFError, zipfile.BadZipFile):
            refused += 1
        else:
            np.testing.assert_array_equal(found, imgs)
    assert refused > 0.6 * len(content)


def test_truncated_and_wrongly_described_archives():
    content = npz(np.savez_compressed, imgs=ARRAYS["imgs"])
    for keep in (0, 10, len(content) // 2, len(content) - 1):
        with pytest.raises(zipfile.BadZipFile):
            NpzArrays(content[:keep])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = io.BytesIO()
        np.save(member, ARRAYS["imgs"])
        archive.writestr("imgs.npy", member.getvalue()[:-1])
    with pytest.raises(DamagedStreamError, match="its shape and type"):
        NpzArrays(buffer.getvalue()).read("imgs")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("dtype", ["|u1", "<f4", ">i2", "<i8", "|b1"])
def test_plain_headers_are_read_without_the_parser_of_python(shape, dtype, tmp_path, monkeypatch):
    """That parser is not safe in threads."""
    arrays = {"first": np.ones(shape, dtype), "second": np.asfortranarray(np.zeros(shape, dtype))}
    np.savez_compressed(tmp_path / "a.npz", **arrays)

    def refuse(*_):
        raise AssertionError("the header was parsed as Python")

    monkeypatch.setattr("ast.literal_eval", refuse)
    content = NpzArrays((tmp_path / "a.npz").read_bytes())
    for name, array in arrays.items():
        read = content.read(name)
        assert read.dtype == array.dtype and read.shape == array.shape and np.array_equal(read, array)
