import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.text import pretrained_text_model
from vlm3d_ext.text.pretrained_text_model import load_text_model

NAME = "someone/some-model"


@pytest.fixture
def folder(tmp_path):
    return make_tiny_text_model(tmp_path / "text_encoder")


def weights_as_pickle(folder, extra=None):
    """Leave what Bio_ClinicalBERT has: config, vocabulary, weights with a prefix and heads in pytorch_model.bin."""
    weights = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    content = {f"bert.{name}": tensor for name, tensor in weights.items()} | {"cls.predictions.bias": torch.zeros(3)}
    torch.save(content | (extra or {}), folder / "pytorch_model.bin")


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_loads_in_float32_and_evaluation_mode_without_pooler(tmp_path, model_type, capfd):
    tokenizer, model = load_text_model(str(make_tiny_text_model(tmp_path, model_type=model_type)))
    assert model.config.model_type == model_type and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any("pooler" in name for name in model.state_dict())
    ids = tokenizer("No pleural effusion.", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).last_hidden_state.shape == (1, 6, 16)
    assert "Loading weights" not in capfd.readouterr().err


def test_a_published_pickle_gives_the_same_model(folder, tmp_path):
    tokenizer, model = load_text_model(str(folder))
    weights_as_pickle(folder)
    from_pickle_tokenizer, from_pickle = load_text_model(str(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, from_pickle.state_dict()[name]), name
    text = "No Pleural effusion, 5 mm."
    assert tokenizer(text)["input_ids"] == from_pickle_tokenizer(text)["input_ids"]


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_could_run_code_is_refused_and_does_not_run(folder, tmp_path):
    weights_as_pickle(folder, {"x": TouchesAFile(tmp_path / "touched")})
    with pytest.raises(ValueError, match=r"more than tensors.*not loaded.*--text_model"):
        load_text_model(str(folder))
    assert not (tmp_path / "touched").exists()


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_word(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["oneword"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "does not exist"),
        (remove("config.json"), FileNotFoundError, r"no config\.json there"),
        (remove("tokenizer.json", "vocab.txt"), FileNotFoundError, r"no tokenizer \(tokenizer\.json or vocab\.txt"),
        (remove("model.safetensors"), FileNotFoundError, r"no weights \(model\.safetensors or .*pytorch_model\.bin"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "not a valid JSON"),
        (lambda folder: edit_json(folder / "config.json", model_type="nonsense"), ValueError, "nonsense"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), ValueError, "SafetensorError"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ValueError, "cannot be loaded"),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=3),
            ValueError,
            r"16 of \d+ tensors are missing or of another shape, for instance encoder\.layer\.2",
        ),
        (lambda folder: edit_json(folder / "config.json", hidden_size=32), ValueError, "of another shape"),
        (add_word, ValueError, r"tokenizer knows (\d+) tokens, the model \d+, so they do not belong together"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line_with_a_next_step(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        load_text_model(str(folder))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"text encoder {folder}: ")
    assert "--text_model" in text and "python -m data_prep.make_text_encoder" in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_purpose_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"^report decoder /no/such: the folder does not exist"):
        load_text_model("/no/such", purpose="report decoder")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load_text_model(str(folder / "config.json"))


def test_a_missing_folder_in_an_existing_one_is_no_name_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_text_model(f"{folder.parent.name}/missing")


class FakeHub:
    """Stands for the hub: a folder that is "downloaded" from, and a cache that is empty or holds a snapshot."""

    def __init__(self, monkeypatch, files=None, cached=None, error=None):
        self.files, self.cached, self.error, self.downloads = files, cached, error, []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, name, files_metadata):
        if self.error:
            raise self.error
        files = [SimpleNamespace(rfilename=file, size=1_500_000) for file in self.files]
        return SimpleNamespace(sha="abc123", siblings=files)

    def snapshot_download(self, name, local_files_only=False, revision=None, allow_patterns=None):
        if local_files_only:
            if self.cached is None:
                raise FileNotFoundError("not in the cache")
            return str(self.cached)
        self.downloads.append((name, revision, sorted(allow_patterns)))
        return str(self.downloaded_to)


def test_a_cached_model_is_loaded_without_asking_the_hub(folder, monkeypatch, caplog):
    hub = FakeHub(monkeypatch, cached=folder, error=AssertionError("asked the hub"))
    assert load_text_model(NAME)[1].config.hidden_size == 16
    assert not hub.downloads and "downloading" not in caplog.text


def test_a_download_is_announced_before_and_takes_only_what_is_needed(folder, monkeypatch, caplog):
    others = ["flax_model.msgpack", "tf_model.h5", "README.md", "onnx/model.onnx", "graph.pbtxt"]
    hub = FakeHub(monkeypatch, files=["config.json", "vocab.txt", "pytorch_model.bin", *others])
    hub.downloaded_to = folder
    said_before = []
    download = hub.snapshot_download

    def recording_download(*args, **keywords):
        if not keywords.get("local_files_only"):
            said_before.append(caplog.text)
        return download(*args, **keywords)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recording_download)
    with caplog.at_level(logging.WARNING, logger=pretrained_text_model.__name__):
        load_text_model(NAME)
    assert hub.downloads == [(NAME, "abc123", ["config.json", "pytorch_model.bin", "vocab.txt"])]
    assert f"{NAME} is not in the cache: downloading 3 files, 4 MB, from https://" in said_before[0]


def test_safetensors_are_preferred_and_half_a_cache_is_completed(folder, tmp_path, monkeypatch):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "model.safetensors").unlink()
    files = ["config.json", "tokenizer.json", "pytorch_model.bin", "model.safetensors", "onnx/model.safetensors"]
    hub = FakeHub(monkeypatch, files=files, cached=half)
    hub.downloaded_to = folder
    load_text_model(NAME)
    assert hub.downloads[0][2] == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        ({"error": ConnectionError("Name or service not known\nRetrying")}, "Name or service not known"),
        ({"files": ["config.json", "vocab.txt", "tf_model.h5"]}, "no weights for PyTorch"),
    ],
)
def test_an_unreachable_name_says_how_to_get_it(monkeypatch, hub, message):
    FakeHub(monkeypatch, **hub)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_text_model(NAME)
    text = str(caught.value)
    assert "\n" not in text and caught.value.__suppress_context__
    for step in (f"`hf download {NAME}`", "--text_model", "python -m data_prep.make_text_encoder"):
        assert step in text


def test_a_name_that_the_hub_cannot_have_is_refused():
    with pytest.raises(ValueError, match="give a folder or a name of the hub"):
        load_text_model("some--one/model..x")
