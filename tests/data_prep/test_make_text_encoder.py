import json
import subprocess
import sys

import pytest

from data_prep import make_text_encoder as command
from data_prep.make_text_encoder import main, make_text_encoder, training_sentences
from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.text.label_set import available_label_sets, load_label_set

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_steps": 3, "batch_size": 4, "progress": False}
TINY_OPTIONS = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--num-steps", "3"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_prepared_release(tmp_path_factory.mktemp("prepared"))


def edited(manifest, folder, edit):
    content = json.loads(manifest.read_text())
    edit(content)
    path = folder / "manifest.json"
    path.write_text(json.dumps(content))
    return path


def test_only_training_reports_are_read(manifest, tmp_path):
    def plant(content):
        for split, word in (("training", "Trainword"), ("validation", "Secretword"), ("test", "Secretword")):
            content[split][0]["report"] = {"findings": f"{word} is seen. Heart size is normal.", "impression": word}

    path = edited(manifest, tmp_path, plant)
    sentences, num_reports = training_sentences(CaseManifest(path))
    assert any("Trainword" in sentence for sentence in sentences) and "Secret" not in " ".join(sentences)
    assert len(sentences) == len(set(sentences)) and num_reports > 1
    make_text_encoder(path, tmp_path / "model", **TINY)
    vocabulary = (tmp_path / "model" / "vocab.txt").read_text().split()
    assert "trainword" in vocabulary and "secretword" not in vocabulary


def test_reports_of_other_splits_change_nothing(manifest, tmp_path):
    def forget(content):
        for case in content["validation"] + content["test"]:
            case["report"] = None

    with_them = make_text_encoder(manifest, tmp_path / "a", **TINY)
    assert make_text_encoder(edited(manifest, tmp_path, forget), tmp_path / "b", **TINY) == with_them


def test_it_is_loaded_by_the_code_that_loads_published_encoders(manifest, tmp_path):
    summary = make_text_encoder(manifest, tmp_path / "model", **TINY)
    encoder = PromptedTextEncoder(str(tmp_path / "model"))
    assert encoder.weights_sha256 == summary.weights_sha256
    assert (encoder.hidden_size, encoder.max_positions) == (16, 128)
    assert encoder.num_parameters == summary.num_parameters and len(encoder.tokenizer) == summary.vocab_size
    for name in available_label_sets():
        for finding in load_label_set(name).findings:
            for prompt in (*finding.positive_prompts, *finding.negative_prompts):
                tokens = encoder.tokenizer.tokenize(prompt)
                assert "[UNK]" not in tokens and not any(token.startswith("##") for token in tokens), tokens


def test_the_model_card_says_what_it_is(manifest, tmp_path):
    summary = make_text_encoder(manifest, tmp_path / "model", seed=5, **TINY)
    card = (tmp_path / "model" / "README.md").read_text()
    for text in ("stand-in", "never on", "| seed | 5 |", CaseManifest(manifest).fingerprint, summary.weights_sha256):
        assert text in card
    assert f"{summary.loss_after:.3f} after" in card and f"gives {summary.unigram_entropy:.3f}" in card


def test_two_processes_write_the_same_bytes(manifest, tmp_path):
    for name in ("a", "b"):
        arguments = ["--reports", str(manifest), "--output", str(tmp_path / name), *TINY_OPTIONS]
        run = subprocess.run(
            [sys.executable, "-m", "data_prep.make_text_encoder", *arguments], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "weights sha256" in run.stdout and "by frequency alone" in run.stdout
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "README.md"} <= files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_another_seed_is_another_model(manifest, tmp_path):
    first, second = (make_text_encoder(manifest, tmp_path / str(seed), seed=seed, **TINY) for seed in (0, 1))
    assert first.weights_sha256 != second.weights_sha256


def test_an_existing_model_is_replaced_on_request_only_and_whole(manifest, tmp_path, capsys):
    output = tmp_path / "model"
    options = ["--reports", str(manifest), "--output", str(output), *TINY_OPTIONS]
    assert main(options) == 0
    (output / "stale.txt").write_text("of the old model")
    before = (output / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*options, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {output}: holds a text model; choose another --output, or replace it with --overwrite.\n"
    assert (output / "model.safetensors").read_bytes() == before
    assert main([*options, "--seed", "1", "--overwrite"]) == 0
    assert (output / "model.safetensors").read_bytes() != before and not (output / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwrite_never_removes_what_is_no_text_model(manifest, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no text model; choose another"):
        make_text_encoder(manifest, tmp_path, overwrite=True, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_fails_leaves_everything_as_it_was(manifest, tmp_path, monkeypatch, capsys, existing):
    output = tmp_path / "model"
    if existing:
        make_text_encoder(manifest, output, **TINY)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_tokenizer", full_disk)
    assert main(["--reports", str(manifest), "--output", str(output), "--overwrite", *TINY_OPTIONS]) == 2
    assert f"error: --output {output}: [Errno 28] No space left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert output.exists() == existing


def no_reports(content):
    for case in content["training"]:
        case["report"] = None


def empty_reports(content):
    for case in content["training"]:
        case["report"] = {"findings": "", "impression": ""}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (no_reports, "no training case has a report"),
        (empty_reports, "no training case has a report"),
        (lambda content: content["training"].clear(), "no case in training"),
        (lambda content: content.pop("fingerprint"), "needs the key 'fingerprint'"),
    ],
)
def test_a_manifest_without_training_reports_is_refused_in_one_line(manifest, tmp_path, capsys, edit, message):
    path = edited(manifest, tmp_path, edit)
    assert main(["--reports", str(path), "--output", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_missing_manifest_and_a_bad_setting_are_refused_in_one_line(manifest, tmp_path, capsys):
    assert main(["--reports", str(tmp_path / "none.json"), "--output", str(tmp_path / "model")]) == 2
    assert "none.json: no such manifest. Make it with" in capsys.readouterr().err
    options = ["--reports", str(manifest), "--output", str(tmp_path / "model")]
    assert main([*options, "--hidden-size", "10"]) == 2
    assert capsys.readouterr().err.startswith("error: hidden_size 10 must be a multiple of num_heads")
    assert main([*options, "--vocab-size", "20"]) == 2
    assert "vocab_size 20 has no room" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
