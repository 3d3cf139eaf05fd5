import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_language_model import EOS, PAD, make_tiny_language_model
from vlm3d_ext.text import pretrained_language_model
from vlm3d_ext.text.pretrained_language_model import base_weights_sha256, load_language_model

REPORT = "FINDINGS: No pleural effusion.\nIMPRESSION: Normal, 3–4 mm."
LINEAR_LAYERS = 2 * 7  # q, k, v, o, gate, up, down of two layers
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    # widths of at least 64: the 4-bit scales are of 64 weights
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model"), hidden_size=64, words=["pleural"])


@pytest.fixture
def folder(ready, tmp_path):
    return Path(shutil.copytree(ready, tmp_path / "language_model"))


def logits(loaded, text=REPORT):
    with torch.no_grad():
        return loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits.float()


def linear_4bit_layers(model):
    import bitsandbytes

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_loads_frozen_in_the_dtype_asked_for(ready, dtype, expected, capfd):
    loaded = load_language_model(str(ready), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {expected}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    assert (loaded.name, loaded.folder) == (str(ready), ready)
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not linear_4bit_layers(loaded.model)
    assert "Loading weights" not in capfd.readouterr().err


def test_bfloat16_rounds_the_logits_of_float32_only(ready):
    whole, half = (logits(load_language_model(str(ready), dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert whole.shape[-1] == half.shape[-1] and whole.std() > 0.5
    assert torch.corrcoef(torch.stack([whole.flatten(), half.flatten()]))[0, 1] > 0.999


def test_the_tokenizer_spells_anything_and_reads_it_back(ready):
    tokenizer = load_language_model(str(ready)).tokenizer
    assert tokenizer.decode(tokenizer(REPORT)["input_ids"], skip_special_tokens=True) == REPORT
    assert "Ġpleural" in tokenizer.tokenize(REPORT)
    assert tokenizer.pad_token == PAD


def test_nf4_holds_every_linear_layer_but_the_head_in_4_bits(ready):
    model = load_language_model(str(ready), quantization="nf4").model
    layers = linear_4bit_layers(model)
    assert len(layers) == LINEAR_LAYERS
    for layer in layers.values():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nf4_computes_with_the_rounded_weights(ready):
    """The rounding of normal weights to NF4 makes an error of about a tenth of their size; nothing else may differ."""
    from bitsandbytes.functional import dequantize_4bit

    rounded = load_language_model(str(ready), quantization="nf4")
    whole = load_language_model(str(ready))
    before = logits(whole)
    for name, layer in linear_4bit_layers(rounded.model).items():
        weight = whole.model.get_submodule(name).weight
        dequantized = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert 0.07 < (dequantized - weight).norm() / weight.norm() < 0.12, name
        weight.copy_(dequantized)
    got, expected = logits(rounded), logits(whole)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.1)
    assert torch.corrcoef(torch.stack([got.flatten(), before.flatten()]))[0, 1] > 0.8
    assert not torch.allclose(got, before, atol=0.1)


def wrapped(model):
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_adapters_leave_the_fingerprint_of_the_base_and_a_base_weight_does_not(ready, quantization):
    loaded = load_language_model(str(ready), quantization=quantization)
    before = logits(loaded)
    fingerprint = base_weights_sha256(loaded.model)
    assert fingerprint == loaded.weights_sha256 and len(fingerprint) == 64
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0)  # taking it leaves the model as it was
    model = wrapped(loaded.model)
    assert base_weights_sha256(model) == fingerprint
    with_adapters = logits(loaded)
    assert not torch.allclose(with_adapters, before, atol=0.1)
    with model.disable_adapter():
        torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0)
    assert base_weights_sha256(model) == fingerprint
    up = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer").weight
    up.data.view(torch.uint8)[3, 0] ^= 1
    assert base_weights_sha256(model) != fingerprint


def test_fully_trained_copies_of_modules_are_no_base_weights(ready):
    from peft import LoraConfig, get_peft_model

    loaded = load_language_model(str(ready))
    fingerprint = loaded.weights_sha256
    model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data.zero_()
    assert base_weights_sha256(model) == fingerprint


def test_fingerprints_tell_precisions_and_seeds_apart(ready, tmp_path):
    other = make_tiny_language_model(tmp_path / "other", hidden_size=64, words=["pleural"], seed=1)
    loads = [(ready, {}), (ready, {"dtype": "float32"}), (ready, {"quantization": "nf4"}), (other, {})]
    fingerprints = [load_language_model(str(place), **settings).weights_sha256 for place, settings in loads]
    assert len(set(fingerprints)) == 4
    assert load_language_model(str(ready), quantization="nf4").weights_sha256 == fingerprints[2]


def test_a_tokenizer_without_pad_token_pads_with_its_end_and_says_so_once(tmp_path, caplog):
    folder = make_tiny_language_model(tmp_path, with_pad_token=False)
    with caplog.at_level(logging.WARNING, logger=pretrained_language_model.__name__):
        loaded = load_language_model(str(folder))
    assert loaded.tokenizer.pad_token == EOS
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id
    assert loaded.model.get_input_embeddings().num_embeddings == len(loaded.tokenizer)
    assert caplog.text.count("no pad token and pads with <|eot_id|>") == 1
    caplog.clear()
    load_language_model(str(make_tiny_language_model(tmp_path / "with_pad")))
    assert "pad token" not in caplog.text


def test_padding_falls_back_on_the_unknown_token_and_then_gives_up(folder, caplog):
    edit_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None, unk_token="<|start|>")
    assert load_language_model(str(folder)).tokenizer.pad_token == "<|start|>"
    edit_json(folder / "tokenizer_config.json", unk_token=None)
    with pytest.raises(ValueError, match=r"no pad, end or unknown token.*tokenizer_config\.json"):
        load_language_model(str(folder))


def test_a_chat_template_is_kept_and_its_lack_is_logged(ready, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=pretrained_language_model.__name__):
        tokenizer = load_language_model(str(ready)).tokenizer
        assert "chat template" not in caplog.text
        plain = load_language_model(str(make_tiny_language_model(tmp_path, with_chat_template=False))).tokenizer
    assert plain.chat_template is None and "no chat template" in caplog.text
    messages = [{"role": "user", "content": "Report:"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start|>user<|end|>Report:<|eot_id|><|start|>assistant<|end|>"
    )


def test_tied_embeddings_need_no_weights_of_the_head(tmp_path):
    folder = make_tiny_language_model(tmp_path, tied_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_language_model(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_capped_attention_is_eager_and_the_log_says_so(tmp_path, caplog):
    folder = make_tiny_language_model(tmp_path, model_type="gemma2")
    loaded = load_language_model(str(folder), dtype="float32")
    assert loaded.model.config._attn_implementation == "eager"
    assert "attention is eager" in caplog.text
    assert logits(loaded).abs().max() <= 30  # the cap of the final logits


def test_generates_and_a_batch_padded_on_the_left_gives_the_same(ready):
    loaded = load_language_model(str(ready), dtype="float32")
    texts = ["FINDINGS:", "FINDINGS: No pleural"]
    alone = [generate(loaded, [text])[0] for text in texts]
    assert generate(loaded, texts) == alone and all(alone)


def generate(loaded, texts):
    batch = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    tokens = loaded.model.generate(**batch, do_sample=False, max_new_tokens=5)
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_word(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["oneword"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def without_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def half_downloaded(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    pieces = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": pieces}))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (shutil.rmtree, FileNotFoundError, "does not exist"),
        (remove("config.json"), FileNotFoundError, r"no config\.json there"),
        (remove("tokenizer.json"), FileNotFoundError, r"no tokenizer \(tokenizer\.json or vocab\.txt"),
        (remove("model.safetensors"), FileNotFoundError, r"no weights \(model\.safetensors or "),
        (half_downloaded, FileNotFoundError, r"no model-00002-of-00002\.safetensors there; complete the folder"),
        (lambda folder: edit_json(folder / "config.json", model_type="nonsense"), ValueError, "nonsense"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), ValueError, "SafetensorError"),
        (
            lambda folder: edit_json(folder / "config.json", num_hidden_layers=3),
            ValueError,
            r"do not fill a LlamaForCausalLM of this config: 9 of \d+ tensors .*, for instance model\.layers\.2",
        ),
        (without_head, ValueError, r"1 of \d+ tensors are missing or of another shape, for instance lm_head\.weight"),
        (add_word, ValueError, r"tokenizer knows 269 tokens, the model 268, so they do not belong together"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line_with_a_next_step(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        load_language_model(str(folder))
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"language model {folder}: ")
    assert "--language_model" in text and "python -m data_prep.make_language_model" in text


def test_weights_that_do_not_fill_the_model_are_refused_in_4_bits_too(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match="do not fill"):
        load_language_model(str(folder), quantization="nf4")


class TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_pickle_that_could_run_code_is_refused_and_does_not_run(folder, tmp_path, quantization):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"x": TouchesAFile(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"more than tensors.*not loaded.*--language_model"):
        load_language_model(str(folder), quantization=quantization)
    assert not (tmp_path / "touched").exists()


def test_code_in_the_folder_is_never_run(folder, tmp_path):
    (folder / "their_code.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'touched')!r}).touch()\n")
    edit_json(
        folder / "config.json",
        model_type="theirs",
        auto_map={"AutoConfig": "their_code.A", "AutoModel": "their_code.B"},
    )
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_language_model(str(folder))
    assert not (tmp_path / "touched").exists()


def test_a_folder_of_adapters_is_refused(ready, folder):
    wrapped(load_language_model(str(ready)).model).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"holds adapters \(adapter_config\.json\); give .* --language_model"):
        load_language_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int8"}, r"quantization must be one of \(None, 'nf4'\), got 'int8'"),
        ({"dtype": "float16"}, r"dtype must be one of \('bfloat16', 'float32', 'auto'\), got 'float16'"),
    ],
)
def test_unknown_settings_are_refused(ready, settings, message):
    with pytest.raises(ValueError, match=message):
        load_language_model(str(ready), **settings)


def test_without_bitsandbytes_4_bits_name_the_extra(ready, monkeypatch):
    monkeypatch.setattr(pretrained_language_model, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bitsandbytes.*pip install 'vlm3d\[quantization\]'"):
        load_language_model(str(ready), quantization="nf4")
    assert load_language_model(str(ready)).model is not None


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B-Instruct", "google/gemma-2-27b-it"])
def test_a_gated_model_without_network_says_all_that_is_needed(monkeypatch, name):
    def not_cached(*args, **keywords):
        raise FileNotFoundError("not in the cache")

    def no_network(*args, **keywords):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=no_network))
    with pytest.raises(FileNotFoundError, match="Name or service not known") as caught:
        load_language_model(name)
    text = str(caught.value)
    assert text.startswith(f"language model {name}: ") and "\n" not in text
    for step in (
        f"https://huggingface.co/{name}",
        "`hf auth login`",
        f"`hf download {name}`",
        "`python -m data_prep.make_language_model --reports MANIFEST --output FOLDER`",
        "--language_model FOLDER",
    ):
        assert step in text


def test_a_download_takes_template_and_generation_settings_and_leaves_the_rest(ready, monkeypatch):
    files = ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"]
    files += ["original/consolidated.00.pth", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    downloads = []

    def snapshot_download(name, local_files_only=False, revision=None, allow_patterns=None):
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        downloads.extend(allow_patterns)
        return str(ready)

    listed = SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=file, size=1) for file in files])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda name, files_metadata: listed)
    )
    load_language_model("someone/some-model")
    assert sorted(downloads) == sorted(set(files) - {"LICENSE", "original/consolidated.00.pth"})


def test_importing_it_imports_nothing_heavy():
    import subprocess

    code = "import sys, vlm3d_ext.text.pretrained_language_model; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
