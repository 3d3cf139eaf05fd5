"""One entry of a checkpoint, or one line that says why not."""

import pickle

import pytest
import torch

from vlm3d_ext.checkpoint_files import CheckpointError, checkpoint_entry


def test_an_entry_is_returned_as_it_was_saved(tmp_path):
    settings = {"spatial_size": [8, 16, 18], "window": ["wide"], "check_hu": True}
    torch.save({"model": {"w": torch.arange(3.0)}, "preparation": {"settings": settings}}, tmp_path / "model.pt")
    assert checkpoint_entry(tmp_path / "model.pt", "preparation") == {"settings": settings}
    assert torch.equal(checkpoint_entry(str(tmp_path / "model.pt"), "model")["w"], torch.arange(3.0))


def test_a_missing_entry_is_named_with_those_that_there_are(tmp_path):
    torch.save({"model": {}, "best_epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        checkpoint_entry(tmp_path / "model.pt", "preparation", parameter_name="encoder_ckpt")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model.pt'} has no entry 'preparation'; it has ['best_epoch', 'model'].")
    assert message.endswith("--encoder_ckpt PATH.") and "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*nowhere\.pt does not exist\. .*--ckpt_path PATH\."):
        checkpoint_entry(tmp_path / "nowhere.pt", "preparation")


class Touch:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_is_run(tmp_path):
    torch.save({"preparation": Touch(tmp_path / "was here")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="more than tensors and plain types; it was not opened"):
        checkpoint_entry(tmp_path / "model.pt", "preparation")
    assert not (tmp_path / "was here").exists()


def whole(path):
    torch.save({"preparation": {"settings": {}}, "w": torch.zeros(5000)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: whole(path)[:5000],
        lambda path: whole(path)[:-100],
        lambda path: whole(path)[:40],
        lambda path: b"",
        lambda path: b"<html>not found</html>",
        lambda path: pickle.dumps([1, 2]),
    ],
    ids=["half", "without end", "beginning", "empty", "a page of the web", "another pickle"],
)
def test_a_damaged_file_is_one_line(tmp_path, make):
    path = tmp_path / "model.pt"
    path.write_bytes(make(path))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_entry(path, "preparation")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("--ckpt_path PATH.")
