import hashlib
import json

import pytest

from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.text.language_model_record import LanguageModelRecord


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_language_model(folder / name, hidden_size=8, num_layers=1, num_heads=2, seed=seed)
        for name, seed in {"one": 0, "copy": 0, "other": 1}.items()
    }


def test_the_fingerprint_is_of_names_and_contents_of_the_weight_files(tmp_path):
    for name, content in {"b.safetensors": b"second", "a.safetensors": b"first", "pytorch_model.bin": b"third"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    contents = [["a.safetensors", b"first"], ["b.safetensors", b"second"], ["pytorch_model.bin", b"third"]]
    digests = [[name, hashlib.sha256(content).hexdigest()] for name, content in contents]
    expected = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    assert LanguageModelRecord("x", tmp_path).state_dict() == {"name": "x", "weights_sha256": expected}


def test_the_same_weights_under_another_name_are_accepted(folders):
    state = LanguageModelRecord("hub/one", folders["one"]).state_dict()
    assert json.loads(json.dumps(state)) == state
    (folders["copy"] / "README.md").write_text("moved here")
    record = LanguageModelRecord("copy", folders["copy"])
    record.load_state_dict(state)
    assert record.state_dict() == {**state, "name": "copy"}


def test_another_model_of_the_same_shape_is_refused(folders):
    ours, theirs = LanguageModelRecord("one", folders["one"]), LanguageModelRecord("hub/other", folders["other"])
    problem = (
        f"language model hub/other .weights {theirs.weights_sha256[:12]}., this run loads one "
        f".weights {ours.weights_sha256[:12]}.; .* --language_model"
    )
    with pytest.raises(ValueError, match=problem):
        ours.load_state_dict(theirs.state_dict())


def test_a_record_without_fingerprint_is_refused(folders):
    with pytest.raises(ValueError, match=r"language model None \(weights None\)"):
        LanguageModelRecord("one", folders["one"]).load_state_dict({})


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    """Two such folders would otherwise pass for the same model."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"language model x: .* holds no weights"):
        LanguageModelRecord("x", tmp_path).state_dict()
