import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import byte_pair_vocabulary
from data_prep.make_language_model import main, make_language_model
from tests.prepared_release import make_prepared_release
from vlm3d_ext.checkpoint_files import state_dict_sha256
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.text.report_prompt import IMAGE_MARKER, ReportPrompt, encode_prompt

SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "batch_size": 4, "num_threads": 1, "progress": False}
TINY = {**SIZES, "num_steps": 3, "num_synthetic_reports": 4}
TINY_OPTIONS = (
    "--hidden-size 32 --layers 1 --heads 2 --batch-size 4 --threads 1 --steps 3 --synthetic-reports 4".split()
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_prepared_release(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def model(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    settings = {**SIZES, "num_steps": 60, "num_synthetic_reports": 12, "learning_rate": 1e-2}
    return folder, make_language_model(manifest, folder, **settings)


def edited(manifest, folder, edit):
    content = json.loads(manifest.read_text())
    edit(content)
    path = folder / "manifest.json"
    path.write_text(json.dumps(content))
    return path


def test_it_is_loaded_as_published_models_are(model):
    folder, summary = model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert state_dict_sha256(network.state_dict()) == summary.weights_sha256
    assert network.num_parameters() == summary.num_parameters and len(tokenizer) == summary.vocab_size
    assert network.config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert network.config.tie_word_embeddings
    generation = network.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_it_learns_more_than_frequencies(model):
    summary = model[1]
    assert summary.loss_after < summary.unigram_entropy < summary.loss_before
    assert summary.num_synthetic_reports == 12 and summary.num_training_reports == 4


def test_it_answers_a_prompt_with_a_report(model):
    tokenizer = AutoTokenizer.from_pretrained(model[0])
    network = AutoModelForCausalLM.from_pretrained(model[0])
    prompt = ReportPrompt().text([("Cardiomegaly", 0.9)], [])
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    assert rendered.count(IMAGE_MARKER) == 1
    encoded = encode_prompt(tokenizer, prompt)
    ids = torch.tensor([[*encoded.before, *encoded.after]])
    answer = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :]).startswith("Findings: ")


def test_only_training_reports_are_read(manifest, tmp_path):
    def plant(content):
        for split, word in (("training", "Trainword"), ("validation", "Secretword"), ("test", "Secretword")):
            content[split][0]["report"] = {"findings": f"{word} is seen. Heart size is normal.", "impression": word}

    make_language_model(edited(manifest, tmp_path, plant), tmp_path / "model", **TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer.tokenize(" Trainword")) == 1 and len(tokenizer.tokenize(" Secretword")) > 1


def test_reports_of_other_splits_change_nothing(manifest, tmp_path):
    def forget(content):
        for case in content["validation"] + content["test"]:
            case["report"] = None

    with_them = make_language_model(manifest, tmp_path / "a", **TINY)
    assert make_language_model(edited(manifest, tmp_path, forget), tmp_path / "b", **TINY) == with_them


def test_the_model_card_says_what_it_is(manifest, model):
    folder, summary = model
    card = (folder / "README.md").read_text()
    for text in ("stand-in", "never on", "| seed | 0 |", CaseManifest(manifest).fingerprint, summary.weights_sha256):
        assert text in card
    assert f"{summary.loss_after:.3f}\n  after" in card and f"gives {summary.unigram_entropy:.3f}" in card


def test_two_processes_write_the_same_bytes(manifest, tmp_path):
    for name in ("a", "b"):
        arguments = ["--reports", str(manifest), "--output", str(tmp_path / name), *TINY_OPTIONS]
        run = subprocess.run(
            [sys.executable, "-m", "data_prep.make_language_model", *arguments], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert "weights sha256" in run.stdout and "by frequency alone" in run.stdout
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_an_existing_model_is_replaced_on_request_only_and_whole(manifest, tmp_path, capsys):
    output = tmp_path / "model"
    options = ["--reports", str(manifest), "--output", str(output), *TINY_OPTIONS]
    assert main(options) == 0
    (output / "stale.txt").write_text("of the old model")
    before = (output / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*options, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {output}: holds a language model; choose another --output, or replace it with --overwrite.\n"
    )
    assert (output / "model.safetensors").read_bytes() == before
    assert main([*options, "--seed", "1", "--overwrite"]) == 0
    assert (output / "model.safetensors").read_bytes() != before and not (output / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwrite_never_removes_what_is_no_model(manifest, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no language model; choose another"):
        make_language_model(manifest, tmp_path, overwrite=True, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_fails_leaves_everything_as_it_was(manifest, tmp_path, monkeypatch, capsys, existing):
    output = tmp_path / "model"
    if existing:
        make_language_model(manifest, output, **TINY)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(byte_pair_vocabulary, "write_json", full_disk)
    assert main(["--reports", str(manifest), "--output", str(output), "--overwrite", *TINY_OPTIONS]) == 2
    assert f"error: --output {output}: [Errno 28] No space left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert output.exists() == existing


def test_without_reports_there_must_be_synthetic_ones(manifest, tmp_path, capsys):
    def forget(content):
        for case in content["training"]:
            case["report"] = None

    path = edited(manifest, tmp_path, forget)
    options = ["--reports", str(path), "--output", str(tmp_path / "model"), *TINY_OPTIONS]
    assert main([*options, "--synthetic-reports", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: no training case has a report and labels") and error.count("\n") == 1
    assert not (tmp_path / "model").exists()
    assert main(options) == 0
    assert "from 0 training reports and 4 reports of undrawn phantoms" in capsys.readouterr().out


def test_a_missing_manifest_and_bad_settings_are_refused_in_one_line(manifest, tmp_path, capsys):
    assert main(["--reports", str(tmp_path / "none.json"), "--output", str(tmp_path / "model")]) == 2
    assert "none.json: no such manifest. Make it with" in capsys.readouterr().err
    options = ["--reports", str(manifest), "--output", str(tmp_path / "model"), "--synthetic-reports", "0"]
    assert main([*options, "--hidden-size", "10"]) == 2
    assert capsys.readouterr().err.startswith("error: hidden_size 10 must be a multiple of twice num_heads")
    assert main([*options, "--vocab-size", "20"]) == 2
    assert "vocab_size 20 has no room" in capsys.readouterr().err
    assert main([*options, "--synthetic-reports", "-1"]) == 2
    assert "num_synthetic_reports must not be negative, got -1" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
