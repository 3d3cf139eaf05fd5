"""Random tiny text models in Hugging Face format, with a tokenizer that knows every word of the shipped prompts."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vlm3d_ext.text.label_set import available_label_sets, load_label_set

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tiny_text_model(
    folder: Path,
    hidden_size: int = 16,
    num_layers: int = 2,
    num_heads: int = 2,
    max_positions: int = 48,
    model_type: str = "bert",
    seed: int = 0,
    texts: Iterable[str] = (),
) -> Path:
    """Write config.json, model.safetensors and tokenizer files; returns the folder, which AutoModel loads.

    Args:
        folder: made if it does not exist.
        hidden_size: width, a multiple of `num_heads`.
        num_layers: transformer layers.
        num_heads: attention heads.
        max_positions: rows of the table of positions; RoBERTa can use all but the first `pad_token_id` + 1 = 1.
        model_type: "bert", "distilbert" or "roberta". All three have the same tokenizer.
        seed: of the weights, which are random and large enough for every token and position to matter.
        texts: whose words the tokenizer is to know beside those of the prompts; others are spelt in letters.
    """
    folder = Path(folder)
    vocabulary = tiny_vocabulary(texts)
    _write_tokenizer(folder, vocabulary, max_positions)
    model = _make_model(model_type, len(vocabulary), hidden_size, num_layers, num_heads, max_positions, seed)
    model.save_pretrained(folder)
    return folder


def tiny_vocabulary(texts: Iterable[str] = ()) -> list[str]:
    """Return special tokens, all letters and digits, and the words of the shipped prompts and of `texts`."""
    findings = [finding for name in available_label_sets() for finding in load_label_set(name).findings]
    prompts = [prompt for finding in findings for prompt in (*finding.positive_prompts, *finding.negative_prompts)]
    words = {word for text in (*prompts, *texts) for word in re.findall(r"\w+", text.lower())}
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = {*letters, *(f"##{letter}" for letter in letters), *string.punctuation, *words}
    return [*SPECIAL_TOKENS, *sorted(pieces)]


def _write_tokenizer(folder: Path, vocabulary: list[str], max_positions: int) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _make_model(
    model_type: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_positions: int,
    seed: int,
) -> Any:
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.3,  # the usual 0.02 makes so narrow a model almost blind to its input
        "pad_token_id": 0,
    }
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": 2 * hidden_size,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type == "bert":
            return BertModel(BertConfig(**shared, **sizes))
        if model_type == "roberta":
            return RobertaModel(RobertaConfig(**shared, **sizes, type_vocab_size=1))
        if model_type == "distilbert":
            config = DistilBertConfig(
                **shared, dim=hidden_size, n_layers=num_layers, n_heads=num_heads, hidden_dim=2 * hidden_size
            )
            return DistilBertModel(config)
    raise ValueError(f'model_type must be "bert", "distilbert" or "roberta", got {model_type!r}.')
