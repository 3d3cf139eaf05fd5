import os

import pytest

from data_prep.pretrained_folder import refuse_existing, whole_folder


def test_a_folder_appears_whole_and_readable_as_the_umask_has_it(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "made" / "model") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "config.json").chmod(0o600)
            assert not (tmp_path / "made" / "model").exists()
    finally:
        os.umask(before)
    output = tmp_path / "made" / "model"
    assert (output / "config.json").stat().st_mode & 0o777 == 0o640
    assert output.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]
    with whole_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "new"]


def test_what_may_be_replaced(tmp_path):
    refuse_existing(tmp_path / "missing", overwrite=False)
    refuse_existing(tmp_path, overwrite=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds a language model; .* replace it with --overwrite"):
        refuse_existing(tmp_path, overwrite=False, kind="language model")
    refuse_existing(tmp_path, overwrite=True)
    (tmp_path / "config.json").rename(tmp_path / "notes.txt")
    with pytest.raises(FileExistsError, match="holds no text model"):
        refuse_existing(tmp_path, overwrite=True)
