"""Loading a text model and its tokenizer from a folder or the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from .pretrained_files import (
    PretrainedKind,
    check_model_fits,
    find_pretrained_folder,
    loading_errors,
    place,
    quiet_transformers,
)

__all__ = ["DEFAULT_TEXT_MODEL", "load_text_model", "quiet_transformers"]

DEFAULT_TEXT_MODEL = "emilyalsentzer/Bio_ClinicalBERT"

_TEXT_ENCODER = PretrainedKind(
    purpose="text encoder",
    option="text_model",
    make_one="make a tiny one with `python -m data_prep.make_text_encoder --reports MANIFEST --output FOLDER`",
)


def load_text_model(pretrained_model_name_or_path: str, purpose: str = "text encoder") -> tuple[Any, Any]:
    """Load a tokenizer and a model through `AutoTokenizer` and `AutoModel`.

    A name of the hub is looked for in the local cache first; only what is not there is downloaded, and one line of the
    log says so before. Weights are taken from safetensors where there are any; a ``pytorch_model.bin``, which is all
    that Bio_ClinicalBERT has, is read by transformers with ``torch.load(weights_only=True)``, so that a file that
    holds anything but tensors is refused and no code of its runs. Code in a model's repository is never run either.

    Bio_ClinicalBERT says nothing about upper and lower case, so that AutoTokenizer lower-cases all text although the
    vocabulary is a cased one: the published model is used this way everywhere, and is here.

    Args:
        pretrained_model_name_or_path: a folder in Hugging Face format, or a name such as
            ``"emilyalsentzer/Bio_ClinicalBERT"`` or
            ``"microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext"``.
        purpose: what the model is for, in messages.

    Returns:
        The tokenizer, and the model in evaluation mode, on the CPU, in float32, without the pooling layer where its
        class can go without.

    Raises:
        FileNotFoundError: if a folder does not exist or lacks its config, its tokenizer or its weights, or a name is
            neither cached nor to be had from the hub.
        ValueError: if the files cannot be loaded, do not fill the model, or do not belong together.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    name = str(pretrained_model_name_or_path)
    kind = replace(_TEXT_ENCODER, purpose=purpose)
    # The folder is given, never the name: with a name, transformers asks the hub even when all files are cached.
    folder = find_pretrained_folder(name, kind)
    where = place(name, folder)
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers(), loading_errors(where, kind):
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        model, loading = AutoModel.from_pretrained(
            folder,
            **settings,
            weights_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    check_model_fits(model, tokenizer, loading, where, kind, unneeded="pooler.")
    return tokenizer, _without_pooler(model)


def _without_pooler(model: Any) -> Any:
    """Drop the pooling layer, which nothing of ours uses and which many checkpoints leave at random values."""
    if getattr(model, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None
    return model.eval()
