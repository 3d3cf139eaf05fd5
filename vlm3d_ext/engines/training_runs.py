"""The bundles' training runs as their configs describe them, made on the meta device: no weights, no data."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from ..text.disease_set import load_disease_set
from ..text.label_set import load_label_set
from ..text.sentence_bank import SentenceBank
from .weightless_models import language_model_architecture

__all__ = ["BUNDLES", "RUNS", "TrainingRun", "language_model_options", "load_run"]

# Bundles are no part of the installed package; they lie beside it in a checkout.
BUNDLES = Path(__file__).parents[2] / "bundles"
_MODELS = "vlm3d_ext.engines.weightless_models."
_RECOMPUTATION = ("none", "selective", "full")

# name -> bundle, config files, what may be recomputed in place of kept
RUNS: dict[str, tuple[str, tuple[str, ...], tuple[dict[str, Any], ...]]] = {
    "encoder": (
        "encoder", ("train.json",), tuple({"activation_checkpointing": mode} for mode in _RECOMPUTATION),
    ),
    "classification": ("classification", ("train.json",), ({},)),
    "from_features": ("classification", ("train.json", "from_features.json"), ({},)),
    "localization": (
        "localization", ("train.json",), tuple({"activation_checkpointing": mode} for mode in _RECOMPUTATION),
    ),
    "align": (
        "report_generation", ("train.json",), tuple({"gradient_checkpointing": on} for on in (False, True)),
    ),
    "rl": (
        "report_generation", ("train.json", "train_rl.json"),
        tuple({"gradient_checkpointing": on} for on in (False, True)),
    ),
    "joint": (
        "multitask", ("train.json",),
        tuple({"activation_checkpointing": mode, "gradient_checkpointing": mode != "none"} for mode in _RECOMPUTATION),
    ),
}  # fmt: skip


def language_model_options(bundles: Path = BUNDLES) -> dict[str, dict[str, Any]]:
    """Return the options that choose each language model whose architecture is known, by its file's name in the
    report_generation bundle."""
    options = {}
    for path in sorted((bundles / "report_generation" / "configs" / "llm").glob("*.json")):
        content = {key: value for key, value in json.loads(path.read_text()).items() if key != "_desc_"}
        name = str(content.get("language_model", ""))
        if name and not name.startswith("$"):
            options[path.stem] = content
    return options


@dataclass
class TrainingRun:
    """A run that could train, but for weights and data.

    Attributes:
        name: one of `RUNS`.
        config: of the bundle, with the options in it.
        trainable: the module that the optimizer sees.
        loss: of what it returns.
        batch: its arguments.
        num_layers: transformer layers of the whole language model; None where there is none.
        layer_types: of each, where the model has several kinds.
    """

    name: str
    config: ConfigParser
    trainable: nn.Module
    loss: nn.Module
    batch: dict[str, Any]
    num_layers: int | None
    layer_types: tuple[str, ...]

    def knob(self, name: str) -> Any:
        """Return the value of a knob of the config."""
        return self.config.get_parsed_content(name)


def load_run(
    name: str,
    options: Mapping[str, Any] | None = None,
    volume_size: Sequence[int] = (64, 512, 512),
    num_layers: int | None = None,
    bundles: Path = BUNDLES,
) -> TrainingRun:
    """Make a run as its config describes it.

    Args:
        name: one of `RUNS`.
        options: knobs to replace, as on the bundle's command line.
        volume_size: (D, H, W) voxels of a prepared scan.
        num_layers: of the language model, to count with few; None takes all.
        bundles: the folder of the bundles.

    Raises:
        FileNotFoundError: if there are no bundles.
        ValueError: if the run, or an option, is unknown.
    """
    config = _config(name, options or {}, bundles)
    is_joint = name == "joint"
    loss_key = "trainable::classification_loss" if is_joint else "classification_loss"
    if name in ("classification", "from_features", "joint"):
        num_findings = load_label_set(config.get_parsed_content("label_set")).num_findings
        config[loss_key] = {
            "_target_": "vlm3d_ext.losses.WeightedBinaryCrossEntropy", "positive_weights": [1.0] * num_findings
        }  # fmt: skip
        config["text_encoder"] = {
            "_target_": _MODELS + "WeightlessTextEncoder", "pretrained_model_name_or_path": "@text_model",
            "pooling": "@text_pooling", "hidden_size": "@text_hidden_size",
        }  # fmt: skip
    all_layers, layer_types = None, ()
    if name in ("align", "rl", "joint"):
        architecture = language_model_architecture(config.get_parsed_content("language_model"))
        all_layers = architecture["num_hidden_layers"]
        layer_types = tuple(architecture.get("layer_types") or ())
        part = "network_def::report_generation" if is_joint else "network_def::language_model"
        target = "weightless_report_generator" if is_joint else "WeightlessLanguageModel"
        config[f"{part}::_target_"] = _MODELS + target
        config[f"{part}::num_layers"] = num_layers
    config.parse(True)
    loss = config.get_parsed_content("loss")
    if name in ("classification", "from_features", "joint"):
        # it looks at the values of its weights, which have none on the meta device
        config.get_parsed_content(loss_key)
    with torch.device("meta"):
        trainable = config.get_parsed_content("trainable").to("meta").train()
        batch = _batch(name, config, volume_size)
    if "crop_start" in batch:
        batch["crop_start"] = torch.zeros(batch["crop_start"].shape, dtype=torch.int64, device="cpu")
    return TrainingRun(name, config, trainable, loss, batch, all_layers, layer_types)


def _config(name: str, options: Mapping[str, Any], bundles: Path) -> ConfigParser:
    if name not in RUNS:
        raise ValueError(f"run must be one of {', '.join(RUNS)}, got {name!r}.")
    bundle, files, _ = RUNS[name]
    paths = [bundles / bundle / "configs" / file for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such config; run this in a checkout, or give --bundles.")
    config = ConfigParser()
    config.read_config([str(path) for path in paths])
    for key, value in options.items():
        if key not in config:
            near = difflib.get_close_matches(key, config.get(), n=3)
            advice = f"did you mean {' or '.join('--' + other for other in near)}?" if near else "see the file."
            raise ValueError(f"--{key} would have no effect: {paths[0]} has no such key; {advice}")
        config[key] = value
    return config


def _batch(name: str, config: ConfigParser, volume_size: Sequence[int]) -> dict[str, Any]:
    """Return arguments of the run's `forward`, full of nothing: every case has everything."""
    knob = config.get_parsed_content
    size, volume = knob("batch_size"), tuple(volume_size)
    grid = [-(-n // p) for n, p in zip(volume, knob("patch_size"), strict=True)]
    width = knob("hidden_size")

    def yes(*shape: int) -> Tensor:
        return torch.ones(size, *shape, dtype=torch.bool)

    vectors = {"global_features": torch.zeros(size, width), "region_features": torch.zeros(size, 20, width)}
    words = {"prompt": ["prompt"] * size, "report": ["report"] * size}
    if name in ("align", "rl"):
        pooled = math.prod([grid[0], *(-(-n // knob("pooling")) for n in grid[1:])])
        return {"local_features": torch.zeros(size, pooled, width), **vectors, **words}
    image = {"image": torch.zeros(size, knob("in_channels"), *volume), "spacing_mm": torch.ones(size, 3)}
    mask = {
        "anatomical_mask": torch.zeros(size, *volume, dtype=torch.uint8),
        "has_anatomical_mask": yes(),
        "use_anatomical_mask": yes(),
    }
    if name == "encoder":
        sentences = knob("num_true_sentences") + knob("num_untrue_sentences")
        return {
            **image,
            **mask,
            "patch_mask": yes(math.prod(grid)),
            "sentence_ngrams": torch.zeros(size, sentences, SentenceBank.max_ngrams, dtype=torch.int64),
            "sentence_regions": yes(sentences, 20),
            "sentence_is_true": yes(sentences),
            "sentence_mask": yes(sentences),
        }
    labels = {}
    if name in ("classification", "from_features", "joint"):
        labels["labels"] = torch.zeros(size, load_label_set(knob("label_set")).num_findings)
    if name == "from_features":
        return {"features": torch.zeros(size, 1 + 20, width), **labels}
    if name == "classification":
        del mask["has_anatomical_mask"]
        return {**image, **mask, **labels}
    diseases, crops = load_disease_set(knob("disease_set")).num_diseases, knob("num_crops")
    drawn = {
        "target": torch.zeros(size, crops, diseases, *knob("crop_size"), dtype=torch.uint8),
        "crop_start": torch.zeros(size, crops, 3),
    }
    return {**image, **drawn} if name == "localization" else {**image, **drawn, **mask, **labels, **words}
