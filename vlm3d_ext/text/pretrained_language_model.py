"""Loading a causal language model, whole or in 4 bits, from a folder or the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pretrained_files import (
    PretrainedKind,
    check_model_fits,
    find_pretrained_folder,
    loading_errors,
    place,
    quiet_transformers,
)

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "QUANTIZATIONS", "PretrainedLanguageModel", "base_weights_sha256", "load_language_model"]

DTYPES = ("bfloat16", "float32", "auto")
QUANTIZATIONS = (None, "nf4")

_logger = logging.getLogger(__name__)

_LANGUAGE_MODEL = PretrainedKind(
    purpose="language model",
    option="language_model",
    make_one="make a tiny one with `python -m data_prep.make_language_model --reports MANIFEST --output FOLDER` and "
    "give it with --language_model FOLDER",
    may_be_gated=True,
)
# What a folder of LoRA weights has: transformers would load the model that it names in place of the folder's own.
_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(eq=False)
class PretrainedLanguageModel:
    """A frozen causal language model.

    Attributes:
        tokenizer: of transformers; it always has a ``pad_token``, ``chat_template`` may be None.
        model: of transformers, in evaluation mode; no parameter requires a gradient.
        name: the name or path that it was asked for by.
        folder: where its files are.
    """

    tokenizer: Any
    model: Any
    name: str
    folder: Path

    @cached_property
    def weights_sha256(self) -> str:
        """`base_weights_sha256` of the model when first asked for; it reads all weights, a few seconds per 10 GB."""
        return base_weights_sha256(self.model)


def load_language_model(
    pretrained_model_name_or_path: str,
    *,
    quantization: str | None = None,
    dtype: str = "bfloat16",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
) -> PretrainedLanguageModel:
    """Load a tokenizer and a model through `AutoTokenizer` and `AutoModelForCausalLM`.

    Files are found and read as by `vlm3d_ext.text.pretrained_text_model.load_text_model`: the cache first, a download
    announced in the log, safetensors or pickles of nothing but tensors, and never any code of a model's repository.

    A tokenizer without padding token, as that of Llama 3, pads with its end token, or else its unknown token; the log
    says so. The embeddings are never resized. Whoever makes labels must leave padding out by the attention mask, not
    by the token, or the model never learns to end.

    Source: 4-bit weights, NF4 with double quantisation: Dettmers et al., "QLoRA: efficient finetuning of quantized
    LLMs", NeurIPS 2023, section 3.

    Args:
        pretrained_model_name_or_path: a folder in Hugging Face format, or a name such as
            ``"meta-llama/Llama-3.1-8B-Instruct"``.
        quantization: ``"nf4"`` holds the linear layers but the head in 4 bits and computes in bfloat16; None does not.
        dtype: of all weights that are not in 4 bits; ``"auto"`` takes that of the files.
        device_map: where the weights go, as for `transformers`, e.g. ``"auto"`` or ``{"": 0}``; None means the CPU,
            or with `quantization` the current GPU where there is one.
        attn_implementation: as for `transformers`. Models that cap attention logits (Gemma 2), which ``"sdpa"``
            cannot, get ``"eager"`` in its place, and the log says so.

    Raises:
        FileNotFoundError: if a folder does not exist or lacks files, or a name is neither cached nor to be had from
            the hub.
        ValueError: if a setting is unknown, or the files cannot be loaded, do not fill the model, or do not belong
            together.
        ImportError: if 4 bits are asked for and bitsandbytes is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS}, got {quantization!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    if quantization and find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization {quantization!r} needs bitsandbytes, which is not installed: run "
            f"`pip install 'vlm3d[quantization]'`, or load the model whole with quantization None."
        )
    name = str(pretrained_model_name_or_path)
    folder = find_pretrained_folder(name, _LANGUAGE_MODEL)
    where = place(name, folder)
    if (folder / _ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"language model {where}: the folder holds adapters ({_ADAPTER_CONFIG}); give the folder or name of the "
            f"model that they belong to, without adapters, with --language_model."
        )
    tokenizer, model = _load(folder, where, quantization, dtype, device_map, attn_implementation)
    _set_padding(tokenizer, model, where)
    if tokenizer.chat_template is None:
        _logger.info("language model %s: its tokenizer has no chat template, so prompts are plain text", where)
    return PretrainedLanguageModel(tokenizer, model.requires_grad_(False).eval(), name, folder)


def _load(
    folder: Path, where: str, quantization: str | None, dtype: str, device_map: Any, attn_implementation: str
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # The folder is given, never the name: with a name, transformers asks the hub even when all files are cached.
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers(), loading_errors(where, _LANGUAGE_MODEL):
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        config = AutoConfig.from_pretrained(folder, **settings)
        if attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
            _logger.warning(
                "language model %s: its attention logits are capped, which sdpa cannot: attention is eager", where
            )
            attn_implementation = "eager"
        if quantization:
            settings["quantization_config"] = _nf4()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            **settings,
            config=config,
            weights_only=True,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    model, loading = loaded
    check_model_fits(model, tokenizer, loading, where, _LANGUAGE_MODEL)
    for module in model.modules():
        # On CPUs with bfloat16 instructions, bitsandbytes would pack the weights anew at the first forward pass and
        # round their scales once more at each `state_dict()`: a frozen model would drift, and its SHA-256 with it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return tokenizer, model


def _nf4() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _set_padding(tokenizer: Any, model: Any, where: str) -> None:
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ValueError(
                f"language model {where}: its tokenizer has no pad, end or unknown token to fill batches with; set "
                f"pad_token in its tokenizer_config.json to a token of the vocabulary, or {_LANGUAGE_MODEL.next_step}."
            )
        tokenizer.pad_token = substitute
        _logger.warning("language model %s: its tokenizer has no pad token and pads with %s", where, substitute)
    # generate() would say at every call that it chose one itself
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def base_weights_sha256(model: Any) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a model's weights without its adapters.

    It is the same before and after `peft.get_peft_model` and any training of adapters, so that it tells whether
    adapters and a base model belong together. Weights in 4 bits count with their scales; the same model has another
    fingerprint in another dtype or in 4 bits. A model whose layers are spread over ranks has that of the whole, for
    which every rank has to call this.

    Args:
        model: of transformers, or such a model wrapped by peft.
    """
    from ..checkpoint_files import state_dict_sha256

    return state_dict_sha256(_base_weights(model.state_dict()))


def _base_weights(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under the names that they have without peft."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): weights
        for name, weights in state_dict.items()
        if "lora_" not in name and ".modules_to_save." not in name
    }
