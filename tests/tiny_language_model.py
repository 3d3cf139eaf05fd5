"""Random tiny causal language models in Hugging Face format, with a tokenizer that spells any text in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|pad|>"
# Llama 3's kind of template: a header with the role, the text, an end.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start|>{{ message['role'] }}<|end|>{{ message['content'] }}" + EOS + "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def make_tiny_language_model(
    folder: Path,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    max_positions: int = 256,
    model_type: str = "llama",
    with_chat_template: bool = True,
    with_pad_token: bool = True,
    tied_embeddings: bool = False,
    seed: int = 0,
    words: Iterable[str] = (),
) -> Path:
    """Write config.json, model.safetensors and tokenizer files; returns the folder, which AutoModelForCausalLM loads.

    Args:
        folder: made if it does not exist.
        hidden_size: width, a multiple of `num_heads`; for 4-bit weights best a multiple of 32.
        num_layers: transformer layers.
        num_heads: attention heads.
        num_key_value_heads: heads of keys and values; `num_heads` is a multiple of it.
        max_positions: the longest sequence, for the config only: positions are rotary.
        model_type: "llama" or "gemma2"; both have the same tokenizer.
        with_chat_template: as Llama-3.1-8B-Instruct has one and Llama-3.1-8B has not.
        with_pad_token: as Gemma has one and Llama 3 has not.
        tied_embeddings: the head is the table of input embeddings; always so with "gemma2".
        seed: of the weights, which are random and large enough for every token to matter.
        words: that get tokens of their own; all other text is spelt in bytes, so that nothing is unknown.
    """
    folder = Path(folder)
    special = [BOS, EOS, "<|start|>", "<|end|>", *([PAD] if with_pad_token else [])]
    ids = _write_tokenizer(folder, special, words, max_positions, with_chat_template)
    settings: dict[str, Any] = {
        "vocab_size": len(ids),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.3,  # the usual 0.02 makes so narrow a model almost blind to its input
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids.get(PAD),
        "tie_word_embeddings": tied_embeddings or model_type == "gemma2",
    }
    _make_model(model_type, settings, seed).save_pretrained(folder)
    return folder


def _write_tokenizer(
    folder: Path, special: list[str], words: Iterable[str], max_positions: int, with_chat_template: bool
) -> dict[str, int]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *letters]
    merges = []
    for word in sorted({"".join(_byte_letters(f" {word}")) for word in words}):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {"pad_token": PAD} if PAD in special else {}
    settings |= {"chat_template": CHAT_TEMPLATE} if with_chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return ids


def _byte_letters(text: str) -> list[str]:
    from tokenizers import pre_tokenizers

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [letter for piece, _ in pieces for letter in piece]


def _make_model(model_type: str, settings: dict[str, Any], seed: int) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings))
        if model_type == "gemma2":
            return Gemma2ForCausalLM(Gemma2Config(**settings, sliding_window=64))
    raise ValueError(f'model_type must be "llama" or "gemma2", got {model_type!r}.')
