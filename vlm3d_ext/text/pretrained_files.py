"""The files of a pretrained Hugging Face model: in a folder, in the cache or from the hub, with errors that say what to
do."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = [
    "PretrainedKind",
    "check_model_fits",
    "find_pretrained_folder",
    "loading_errors",
    "place",
    "quiet_transformers",
]

_logger = logging.getLogger(__name__)

_CONFIG = "config.json"
# Any one of these is enough for AutoTokenizer; Bio_ClinicalBERT has a vocab.txt only.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_SMALL_FILES = (
    _CONFIG,
    "generation_config.json",
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
# In order of preference. Both forms may be in pieces, which an index lists.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_PICKLE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class PretrainedKind:
    """A kind of pretrained model, as messages speak of it.

    Attributes:
        purpose: what the model is for, e.g. ``"text encoder"``.
        option: name of the config key that says which model, without dashes.
        make_one: how to make a tiny stand-in, as the end of a sentence.
        may_be_gated: whether the hub may ask for a licence to be accepted before it hands such a model out.
    """

    purpose: str
    option: str
    make_one: str
    may_be_gated: bool = False

    @property
    def next_step(self) -> str:
        """What to do when the files are there but of no use."""
        return f"give another folder or name with --{self.option}, or {self.make_one}"


def find_pretrained_folder(name: str, kind: PretrainedKind) -> Path:
    """Return the folder with config, tokenizer and weights; a name of the hub is downloaded if it is not cached.

    Args:
        name: a folder in Hugging Face format, or a name of the hub.
        kind: for messages.

    Raises:
        FileNotFoundError: if the folder does not exist or lacks its config, its tokenizer or its weights, or the name
            is neither cached nor to be had from the hub.
        ValueError: if the hub cannot have such a name.
    """
    folder = _local_folder(name, kind) or _hub_snapshot(name, kind)
    lacking = _lacking(folder)
    if lacking:
        raise FileNotFoundError(
            f"{kind.purpose} {place(name, folder)}: no {lacking} there; complete the folder, {kind.next_step}."
        )
    return folder


def _local_folder(name: str, kind: PretrainedKind) -> Path | None:
    """Return the folder of that name, or None if it can only be a name of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    # "demo_run/text_encoder" looks like a name of the hub, but where demo_run is a folder here nobody means the hub
    if path.exists() or not _HUB_NAME.fullmatch(name) or (path.parent != Path() and path.parent.is_dir()):
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{kind.purpose} {name}: the folder {what}; give a folder in Hugging Face format (config.json, tokenizer "
            f"files, model.safetensors) or a name of the hub with --{kind.option}, or {kind.make_one}."
        )
    return None


def _lacking(folder: Path) -> str:
    """Return what the folder lacks, in words; empty if it has everything."""
    if not (folder / _CONFIG).is_file():
        return _CONFIG
    if not any((folder / file).is_file() for file in _VOCABULARIES):
        return f"tokenizer ({' or '.join(_VOCABULARIES)})"
    for whole, index, _ in (_SAFETENSORS, _PICKLE):
        if (folder / whole).is_file():
            return ""
        if (folder / index).is_file():
            return _first_missing_piece(folder / index)
    return f"weights ({' or '.join((*_SAFETENSORS[:2], *_PICKLE[:2]))})"


def _first_missing_piece(index: Path) -> str:
    """Return the first file that the index lists and the folder lacks: long downloads are easily cut short."""
    try:
        pieces = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""  # what is wrong with the index is said on loading
    return min((piece for piece in map(str, pieces) if not (index.parent / piece).is_file()), default="")


def _hub_snapshot(name: str, kind: PretrainedKind) -> Path:
    """Return the folder of the local cache that holds the model, downloading what is not there."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if not _lacking(cached):
            return cached
    except FileNotFoundError:
        pass
    except ValueError as error:  # not a valid name
        raise ValueError(f"{kind.purpose} {name}: {_first_line(error)}; give a folder or a name of the hub.") from None
    try:
        info = HfApi().model_info(name, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _files_to_download(list(sizes))
        _logger.warning(
            "%s %s is not in the cache: downloading %d files, %.0f MB, from %s/%s to %s",
            kind.purpose,
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
            f"{kind.purpose} {name}: neither a folder here, nor in the cache {constants.HF_HUB_CACHE}, nor to be had "
            f"from {constants.ENDPOINT} ({type(error).__name__}: {_first_line(error)}); {_licence_step(name, kind)}run "
            f"`hf download {name}` where there is a network, or give a local folder with --{kind.option}, or "
            f"{kind.make_one}."
        ) from None


def _licence_step(name: str, kind: PretrainedKind) -> str:
    if not kind.may_be_gated:
        return ""
    return (
        f"its licence is at https://huggingface.co/{name} and, if it is gated as meta-llama/* and google/gemma-* are, "
        f"must be accepted there, followed by `hf auth login`; "
    )


def _files_to_download(files: Sequence[str]) -> list[str]:
    """Return config, tokenizer and one form of the weights; a repository often holds those of other libraries too."""
    wanted = [file for file in files if file in _SMALL_FILES]
    for form in (_SAFETENSORS, _PICKLE):
        weights = [file for file in files if any(fnmatch(file, pattern) for pattern in form)]
        if weights:
            return wanted + weights
    raise FileNotFoundError("the repository holds no weights for PyTorch")


@contextmanager
def loading_errors(where: str, kind: PretrainedKind) -> Iterator[None]:
    """Turn whatever loading from `where` raises into a ValueError of one line with a next step."""
    try:
        yield
    except pickle.UnpicklingError:
        raise ValueError(
            f"{kind.purpose} {where}: the weights file holds more than tensors, which could run any code, so it was "
            f"not loaded; get its model.safetensors, {kind.next_step}."
        ) from None
    # Broken files of many formats raise errors of many libraries, some without a base class in common.
    except Exception as error:
        raise ValueError(
            f"{kind.purpose} {where}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            f"{kind.next_step}."
        ) from None


def check_model_fits(
    model: Any, tokenizer: Any, loading: Mapping[str, Any], where: str, kind: PretrainedKind, unneeded: str = ""
) -> None:
    """Refuse a model with weights that no file gave, or fewer embeddings than the tokenizer has tokens.

    Args:
        model: of transformers.
        tokenizer: of transformers.
        loading: what ``from_pretrained(output_loading_info=True)`` says.
        where: name and folder, for messages.
        kind: for messages.
        unneeded: weights with this in their name may be missing.

    Raises:
        ValueError: if the model does not fit.
    """
    # a mismatch is (name, shape in the file, shape in the model)
    unfilled = {
        key if isinstance(key, str) else key[0] for key in (*loading["missing_keys"], *loading["mismatched_keys"])
    }
    unfilled = {key for key in unfilled if not unneeded or unneeded not in key}
    if unfilled:
        raise ValueError(
            f"{kind.purpose} {where}: the weights do not fill a {type(model).__name__} of this config: "
            f"{len(unfilled)} of {len(model.state_dict())} tensors are missing or of another shape, for instance "
            f"{min(unfilled)}; {kind.next_step}."
        )
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"{kind.purpose} {where}: the tokenizer knows {len(tokenizer)} tokens, the model {num_embeddings}, so they "
            f"do not belong together; {kind.next_step}."
        )


def place(name: str, folder: Path) -> str:
    """Return the name, with the folder of the cache where it is one of the hub."""
    return name if Path(name).expanduser() == folder else f"{name} (in {folder})"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and tables of unused weights; what matters of them is checked here."""
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
