"""Stand-ins for pretrained models: architecture and interface, on the meta device; nothing is downloaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.blocks.prompted_text_encoder import PromptedTextEncoder
from ..networks.blocks.vision_to_llm_projector import VisionToLLMProjector
from ..networks.nets.image_prefix_language_model import (
    LORA_TARGETS,
    ImagePrefixLanguageModel,
    PrefixedPrompts,
    _add_adapters,
)
from ..networks.nets.report_generator import ReportGenerator
from .language_model_requirements import available_language_models, load_architecture

__all__ = [
    "WeightlessLanguageModel",
    "WeightlessTextEncoder",
    "language_model_architecture",
    "weightless_report_generator",
]

_CASED_BERT_VOCABULARY = 28996
_LETTERS_OF_TOKEN = 5


def language_model_architecture(name: str) -> dict[str, Any]:
    """Return the ``config.json`` of a language model: that of a folder, or the shipped one of a name on the hub.

    Raises:
        FileNotFoundError: if a folder has no config.json.
        ValueError: if the name is none of those whose architecture is shipped.
    """
    if Path(name).is_dir():
        path = Path(name, "config.json")
        if not path.is_file():
            raise FileNotFoundError(f"language model {name}: there is no config.json in this folder.")
        return json.loads(path.read_text())
    known = dict(load_architecture(configuration) for configuration in available_language_models())
    if name not in known:
        raise ValueError(
            f"language model {name!r} is no folder, and its architecture does not ship with this package, which has "
            f"those of {', '.join(known)}; give the folder that holds its config.json."
        )
    return known[name]


class WeightlessLanguageModel(ImagePrefixLanguageModel):
    """`ImagePrefixLanguageModel` without weights and tokenizer: every prompt and every report is as long as can be.

    Args:
        language_model: see `language_model_architecture`.
        num_layers: transformer layers, to count with few and reckon the rest; None takes the architecture's.
        quantization: accepted; what 4 bits change is reckoned from `quantized_parameters`.
        dtype, lora_rank, lora_alpha, lora_dropout, lora_targets, gradient_checkpointing, max_prompt_tokens,
            max_report_tokens: as there.

    Attributes:
        num_layers: transformer layers that there are.
        quantized_parameters: weights of linear layers except the head, those that 4 bits can hold.
        layer_bytes: of the base model's transformer layers.
    """

    def __init__(
        self,
        language_model: str,
        quantization: str | None = None,
        dtype: str = "bfloat16",
        lora_rank: int = 32,
        lora_alpha: float = 128,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] = LORA_TARGETS,
        gradient_checkpointing: bool = False,
        max_prompt_tokens: int = 512,
        max_report_tokens: int = 512,
        num_layers: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        from transformers import AutoConfig, AutoModelForCausalLM

        config = dict(language_model_architecture(language_model))
        if num_layers is not None:
            config["num_hidden_layers"] = num_layers
            if config.get("layer_types"):
                config["layer_types"] = config["layer_types"][:num_layers]
        settings = AutoConfig.for_model(**config)
        is_capped = getattr(settings, "attn_logit_softcapping", None) is not None
        weights = torch.float32 if dtype == "float32" else torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=weights, attn_implementation="eager" if is_capped else "sdpa"
            ).requires_grad_(False)
            head = model.get_output_embeddings()
            linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
            layers = model.get_decoder().layers
            self.num_layers = len(layers)
            self.quantized_parameters = sum(module.weight.numel() for module in linear)
            self.layer_bytes = sum(weight.numel() * weight.element_size() for weight in layers.parameters())
            if gradient_checkpointing:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            if lora_rank:
                _add_adapters(model, lora_rank, lora_alpha, lora_dropout, lora_targets, language_model)
        self.name = language_model
        self.tokenizer = None
        self.hidden_size = settings.hidden_size
        self.max_positions = settings.max_position_embeddings
        self.embedding_scale = 0.02
        self.lora_rank = lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.max_prompt_tokens = max_prompt_tokens
        self.max_report_tokens = max_report_tokens
        self.num_cut_reports = 0
        self.is_sharded = False
        self._held = [model.eval()]
        self.adapters = nn.ParameterDict(
            {name.replace(".", "/"): weight for name, weight in model.named_parameters() if "lora_" in name}
        )
        self._cache_name = (
            "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        )
        self._reference = None

    def encode_reports(self, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, (B, T) of `max_report_tokens`."""
        size = (len(reports), self.max_report_tokens)
        return torch.zeros(size, dtype=torch.int64, device="meta"), torch.ones(size, dtype=torch.bool, device="meta")

    def embed_prompts(self, prefix: Tensor | None, prompts: Sequence[str]) -> PrefixedPrompts:
        """Return prompts of `max_prompt_tokens` with their images."""
        ids = torch.zeros(len(prompts), self.max_prompt_tokens, dtype=torch.int64, device="meta")
        embeddings = self.model.get_input_embeddings()(ids)
        if prefix is not None:
            embeddings = torch.cat([prefix.to(embeddings.dtype), embeddings], dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device="meta")
        return PrefixedPrompts(embeddings, mask, ids[:, -1])


class WeightlessTextEncoder(PromptedTextEncoder):
    """`PromptedTextEncoder` without weights: the architecture of a folder's config.json, or of BERT with the given
    width, 12 layers and a cased vocabulary, which is that of Bio_ClinicalBERT. Words are a token for every five
    letters, begun ones too, in place of a vocabulary's pieces.

    Args:
        pretrained_model_name_or_path, pooling, chunk_size: as there.
        hidden_size: H, of a model that is no folder; a multiple of 64.
    """

    def __init__(
        self,
        pretrained_model_name_or_path: str,
        pooling: str = "mean",
        chunk_size: int = 32,
        hidden_size: int = 768,
    ) -> None:
        nn.Module.__init__(self)
        from transformers import AutoConfig, AutoModel, BertConfig

        path = Path(pretrained_model_name_or_path, "config.json")
        config = (
            AutoConfig.for_model(**json.loads(path.read_text()))
            if path.is_file()
            else BertConfig(
                vocab_size=_CASED_BERT_VOCABULARY,
                hidden_size=hidden_size,
                num_attention_heads=max(1, hidden_size // 64),
                intermediate_size=4 * hidden_size,
            )
        )
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.name = str(pretrained_model_name_or_path)
        self.pooling = pooling
        self.chunk_size = chunk_size
        self.tokenizer = _tokens_of_letters
        self.max_positions = config.max_position_embeddings
        self.hidden_size = config.hidden_size
        self._held = [model.requires_grad_(False).eval()]
        nn.Module.train(self, False)


def _tokens_of_letters(text: str, **_: Any) -> dict[str, list[int]]:
    words = text.split()
    return {"input_ids": [0] * (2 + sum(-(-len(word) // _LETTERS_OF_TOKEN) for word in words))}


def weightless_report_generator(
    vision_channels: int,
    num_queries: int,
    projector_layers: int,
    projector_heads: int,
    generation: dict[str, Any] | None = None,
    **language_model: Any,
) -> ReportGenerator:
    """Return what `vlm3d_ext.networks.nets.report_generator_network` does, without weights."""
    model = WeightlessLanguageModel(**language_model)
    projector = VisionToLLMProjector(vision_channels, model.hidden_size, num_queries, projector_layers, projector_heads)
    return ReportGenerator(projector, model, generation)
