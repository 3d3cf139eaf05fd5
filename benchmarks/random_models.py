"""Language and text models of published shapes with random weights: what a step costs does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from data_prep.byte_pair_vocabulary import SPECIAL_TOKENS, learn_byte_pairs, write_chat_tokenizer
from data_prep.wordpiece_vocabulary import learn_wordpieces, write_tokenizer
from vlm3d_ext.engines.language_model_requirements import load_architecture
from vlm3d_ext.networks.nets import image_prefix_language_model
from vlm3d_ext.text.disease_set import load_disease_set
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.pretrained_files import quiet_transformers
from vlm3d_ext.text.pretrained_language_model import PretrainedLanguageModel

from .random_batches import report_of_words

__all__ = ["TINY", "drawn_language_model", "write_text_model"]

TINY = "tiny"
# What data_prep.make_language_model makes by default.
_TINY_ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 4000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
_NUM_BYTES = 256


@contextmanager
def drawn_language_model(architecture: str, device: str | torch.device, folder: Path) -> Iterator[str]:
    """Let `ImagePrefixLanguageModel` find a model of random bfloat16 weights, which is drawn on the device itself:
    writing and reading 16 GB of them would take longer than any row.

    Args:
        architecture: `TINY`, or a configuration of `vlm3d_ext.text.language_models`.
        device: where.
        folder: for the tokenizer, which knows the words of `report_of_words`.

    Yields:
        The name to give as ``language_model``.
    """
    config: Mapping[str, Any] = _TINY_ARCHITECTURE if architecture == TINY else load_architecture(architecture)[1]
    learnt = learn_byte_pairs([report_of_words(100)], len(SPECIAL_TOKENS) + _NUM_BYTES + 100)
    tokenizer = write_chat_tokenizer(folder, learnt, config["max_position_embeddings"])

    def load(name: str, **_: Any) -> PretrainedLanguageModel:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
        return PretrainedLanguageModel(tokenizer, model.requires_grad_(False).eval(), name, folder)

    with mock.patch.object(image_prefix_language_model, "load_language_model", load):
        yield architecture


def write_text_model(folder: Path, hidden_size: int = 768, num_layers: int = 12) -> Path:
    """Write a text encoder of BERT's shape with random weights; returns the folder.

    Args:
        folder: exists.
        hidden_size: a multiple of 64.
        num_layers: of the transformer.
    """
    findings = [*load_label_set("ct_rate_18").findings, *load_disease_set("chest_ct_5").findings()]
    prompts = [text for finding in findings for text in (*finding.positive_prompts, *finding.negative_prompts)]
    vocabulary = learn_wordpieces(prompts, 2000)
    write_tokenizer(folder, vocabulary, 512)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden_size, num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64, intermediate_size=4 * hidden_size,
    )  # fmt: skip
    with quiet_transformers():
        BertModel(config).save_pretrained(folder)
    return folder
