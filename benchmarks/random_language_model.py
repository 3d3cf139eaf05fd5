"""A random Llama of the proportions of a large one, for rows that measure how long a language model takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data_prep.byte_pair_vocabulary import learn_byte_pairs, write_chat_tokenizer
from vlm3d_ext.networks.nets.image_prefix_language_model import ImagePrefixLanguageModel, PrefixedPrompts
from vlm3d_ext.text.pretrained_files import quiet_transformers

__all__ = ["random_language_model", "random_prompts", "random_tokens"]

# Llama 3.1 8B: four query heads share a key head, the MLP is 3.5 times as wide, and adapters have 1/128 of the width.
_QUERY_HEADS_PER_KEY_HEAD, _MLP_RATIO, _WIDTH_PER_LORA_RANK = 4, 3.5, 128


def random_language_model(
    hidden_size: int = 512,
    num_layers: int = 8,
    num_heads: int = 8,
    vocab_size: int = 2048,
    max_report_tokens: int = 128,
    seed: int = 0,
) -> ImagePrefixLanguageModel:
    """Return a model in float32 with adapters that do something, made through files as any other is.

    Args:
        hidden_size: width, a multiple of twice `num_heads`.
        num_layers: transformer layers.
        num_heads: of queries, a multiple of 4.
        vocab_size: rows of the head; its tokenizer knows fewer tokens.
        max_report_tokens: of a report.
        seed: of the weights.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // _QUERY_HEADS_PER_KEY_HEAD,
        intermediate_size=int(_MLP_RATIO * hidden_size),
        max_position_embeddings=4096,
        # as wide as lets every token matter to those after it, so that a prompt read wrongly shows
        initializer_range=2 * hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
        write_chat_tokenizer(Path(folder), learn_byte_pairs(["a report"], 300), config.max_position_embeddings)
        rank = max(1, hidden_size // _WIDTH_PER_LORA_RANK)
        settings: dict[str, Any] = {"lora_rank": rank, "lora_alpha": 4 * rank, "max_report_tokens": max_report_tokens}
        model = ImagePrefixLanguageModel(folder, dtype="float32", **settings)
        for name, weight in model.adapters.items():
            if "lora_B" in name:  # zero at the beginning, which would leave the other half without gradients
                torch.nn.init.normal_(weight, std=0.1 * hidden_size**-0.5)
    return model


def random_prompts(
    model: ImagePrefixLanguageModel, num_queries: int, num_words: int, num_prompts: int = 1, seed: int = 0
) -> PrefixedPrompts:
    """Return prompts of so many image embeddings, then so many tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    prefix = torch.randn(num_prompts, num_queries, model.hidden_size, generator=generator) * model.embedding_scale
    words = random_tokens(model, num_prompts, num_words, seed + 1)
    with torch.no_grad():
        embeddings = torch.cat([prefix, model.model.get_input_embeddings()(words)], dim=1)
    return PrefixedPrompts(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), words[:, -1])


def random_tokens(model: ImagePrefixLanguageModel, num_rows: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Return ids (rows, tokens), none of which pads or ends a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, len(model.tokenizer), (num_rows, num_tokens), generator=generator)
