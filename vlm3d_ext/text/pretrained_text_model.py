"""Loading a text model and its tokenizer from a folder or the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

import inspect
import logging
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ["DEFAULT_TEXT_MODEL", "load_text_model", "quiet_transformers"]

DEFAULT_TEXT_MODEL = "emilyalsentzer/Bio_ClinicalBERT"

_logger = logging.getLogger(__name__)

_CONFIG = "config.json"
# Any one of these is enough for AutoTokenizer; Bio_ClinicalBERT has a vocab.txt only.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
# In order of preference. Both forms may be in pieces, which an index lists.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_PICKLE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MAKE_ONE = "make a tiny one with `python -m data_prep.make_text_encoder --reports MANIFEST --output FOLDER`"


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
    name = str(pretrained_model_name_or_path)
    folder = _local_folder(name, purpose) or _hub_snapshot(name, purpose)
    lacking = _lacking(folder)
    if lacking:
        raise FileNotFoundError(
            f"{purpose} {_place(name, folder)}: no {lacking} there; complete the folder, give another folder or name "
            f"with --text_model, or {_MAKE_ONE}."
        )
    return _load(folder, name, purpose)


def _local_folder(name: str, purpose: str) -> Path | None:
    """Return the folder of that name, or None if it can only be a name of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # "demo_run/text_encoder" looks like a name of the hub, but where demo_run is a folder here nobody means the hub
    if path.exists() or not _HUB_NAME.fullmatch(name) or (path.parent != Path() and path.parent.is_dir()):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{purpose} {name}: the folder {what}; give a folder in Hugging Face format (config.json, tokenizer files, "
            f"model.safetensors) or a name of the hub with --text_model, or {_MAKE_ONE}."
        )
    return None


def _lacking(folder: Path) -> str:
    """Return what the folder lacks, in words; empty if it has everything."""
    if not (folder / _CONFIG).is_file():
        return _CONFIG
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        return f"tokenizer ({' or '.join(_VOCABULARIES)})"
    weights = (*_SAFETENSORS[:2], *_PICKLE[:2])
    if not any((folder / file).is_file() for file in weights):
        return f"weights ({' or '.join(weights)})"
    return ""


def _hub_snapshot(name: str, purpose: str) -> Path:
    """Return the folder of the local cache that holds the model, downloading what is not there."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if not _lacking(cached):
            return cached
    except FileNotFoundError:
        pass
    except ValueError as error:  # not a valid name
        raise ValueError(f"{purpose} {name}: {_first_line(error)}; give a folder or a name of the hub.") from None
    try:
        info = HfApi().model_info(name, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _files_to_download(list(sizes))
        _logger.warning(
            "%s %s is not in the cache: downloading %d files, %.0f MB, from %s/%s to %s",
            purpose,
            name,
            len(wanted),
            sum(sizes[file] for file in wanted) / 1e6,
            constants.ENDPOINT,
            name,
            constants.HF_HUB_CACHE,
        )
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    # The hub's client raises errors of whichever HTTP library its version uses, which share no base class.
    except Exception as error:
        raise FileNotFoundError(
            f"{purpose} {name}: neither a folder here, nor in the cache {constants.HF_HUB_CACHE}, nor to be had from "
            f"{constants.ENDPOINT} ({type(error).__name__}: {_first_line(error)}); run `hf download {name}` where "
            f"there is a network, or give a local folder with --text_model, or {_MAKE_ONE}."
        ) from None


def _files_to_download(files: Sequence[str]) -> list[str]:
    """Return config, tokenizer and one form of the weights; a repository often holds those of other libraries too."""
    wanted = [file for file in files if file == _CONFIG or file in _TOKENIZER_FILES]
    for form in (_SAFETENSORS, _PICKLE):
        weights = [file for file in files if any(fnmatch(file, pattern) for pattern in form)]
        if weights:
            return wanted + weights
    raise FileNotFoundError("the repository holds no weights for PyTorch")


def _load(folder: Path, name: str, purpose: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    # The folder is given, never the name: with a name, transformers asks the hub even when all files are cached.
    where = _place(name, folder)
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    next_step = f"give another folder or name with --text_model, or {_MAKE_ONE}"
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
            model, loading = AutoModel.from_pretrained(
                folder,
                **settings,
                weights_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except pickle.UnpicklingError:
            raise ValueError(
                f"{purpose} {where}: the weights file holds more than tensors, which could run any code, so it was not "
                f"loaded; get its model.safetensors, {next_step}."
            ) from None
        # Broken files of many formats raise errors of many libraries, some without a base class in common.
        except Exception as error:
            raise ValueError(
                f"{purpose} {where}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); {next_step}."
            ) from None
    # a mismatch is (name, shape in the file, shape in the model)
    unfilled = {
        key if isinstance(key, str) else key[0] for key in (*loading["missing_keys"], *loading["mismatched_keys"])
    }
    unfilled = {key for key in unfilled if "pooler." not in key}
    if unfilled:
        raise ValueError(
            f"{purpose} {where}: the weights do not fill a {type(model).__name__} of this config: "
            f"{len(unfilled)} of {len(model.state_dict())} tensors are missing or of another shape, for instance "
            f"{min(unfilled)}; {next_step}."
        )
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"{purpose} {where}: the tokenizer knows {len(tokenizer)} tokens, the model {num_embeddings}, so they do "
            f"not belong together; {next_step}."
        )
    return tokenizer, _without_pooler(model)


def _place(name: str, folder: Path) -> str:
    return name if Path(name).expanduser() == folder else f"{name} (in {folder})"


def _without_pooler(model: Any) -> Any:
    """Drop the pooling layer, which nothing of ours uses and which many checkpoints leave at random values."""
    if getattr(model, "pooler", None) is not None and "add_pooling_layer" in inspect.signature(type(model)).parameters:
        model.pooler = None
    return model.eval()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and tables of unused weights; what matters of them is checked above."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".;: ") if lines else "no message"
