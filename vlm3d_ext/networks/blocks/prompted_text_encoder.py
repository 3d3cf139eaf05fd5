"""A frozen Hugging Face text encoder that takes learnable soft prompts among its input embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint_files import state_dict_sha256
from ...text.finding_prompts import FindingPrompts, tokenize_findings
from ...text.label_set import Finding
from ...text.pretrained_text_model import load_text_model

__all__ = ["POOLINGS", "FindingEmbeddings", "PromptedTextEncoder", "state_dict_sha256"]

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class FindingEmbeddings:
    """What the text encoder makes of L findings.

    Attributes:
        positive: (L, H), mean over each finding's positive prompts.
        negative: (L, H), mean over each finding's negative prompts, zero where it has none.
        has_negative: (L,) bool, False where `negative` means nothing.
    """

    positive: Tensor
    negative: Tensor
    has_negative: Tensor


class PromptedTextEncoder(nn.Module):
    """A pretrained text encoder whose weights never change, with soft prompts in front of the words.

    The soft prompts take the places after the first token ([CLS]); positions are counted over the whole sequence, so
    that words move behind them. Gradients reach the soft prompts through the frozen layers.

    Source: prompt tuning, Lester et al., "The power of scale for parameter-efficient prompt tuning", EMNLP 2021;
    learnable context in a text encoder, Zhou et al., "Learning to prompt for vision-language models", IJCV 2022.

    The text model is deliberately not a submodule. It follows this module to a device or dtype, but none of its
    weights are in `state_dict()`, `parameters()` or `modules()`: checkpoints of what contains it stay small and load
    strictly, no optimizer, `requires_grad_` or `train()` reaches it, and data-parallel training need not synchronise
    it. `num_parameters` counts them.

    Args:
        pretrained_model_name_or_path: see `vlm3d_ext.text.pretrained_text_model.load_text_model`. BERT, DistilBERT,
            RoBERTa and their kin: encoders with a [CLS] token and learnt absolute positions.
        pooling: ``"mean"`` over the last layer's tokens, soft prompts included, or ``"cls"``, the first token.
        chunk_size: prompts that go through the text model at a time. With gradients, more than one chunk means that
            each is computed again in the backward pass, so that only one chunk's activations are held at a time.

    Attributes:
        name: the name or path it was made with.
        tokenizer: of transformers.
        hidden_size: H, channels of the embeddings.
        max_positions: the longest sequence, special tokens and soft prompts included.

    Raises:
        FileNotFoundError: if the model cannot be found.
        ValueError: if it cannot be loaded, is no such encoder, `pooling` is not one of `POOLINGS` or `chunk_size` is
            below 1.
    """

    def __init__(self, pretrained_model_name_or_path: str, pooling: str = "mean", chunk_size: int = 32) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        self.name = str(pretrained_model_name_or_path)
        self.pooling = pooling
        self.chunk_size = chunk_size
        self.tokenizer, model = load_text_model(self.name)
        _check_kind(model, self.tokenizer, self.name)
        self.max_positions = _max_positions(model, self.name)
        self.hidden_size: int = model.config.hidden_size
        # A list hides the model from nn.Module, see the class.
        self._held = [model.requires_grad_(False).eval()]
        super().train(False)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the text model's weights as they are now: equal before and after training, or something is wrong.

        It is computed at every call, which takes about a second for 110M weights.
        """
        return state_dict_sha256(self._held[0].state_dict())

    @property
    def embeddings_sha256(self) -> str:
        """SHA-256 of all that makes two text encoders embed alike: the weights as they are now, and the pooling."""
        return hashlib.sha256(f"{self.weights_sha256} {self.pooling}".encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """Number of frozen weights."""
        return sum(parameter.numel() for parameter in self._held[0].parameters())

    @property
    def word_embedding_deviation(self) -> float:
        """Standard deviation of the elements of the word embeddings."""
        return float(self._held[0].get_input_embeddings().weight.float().std())

    @property
    def device(self) -> torch.device:
        """Where the text model is."""
        return self._held[0].get_input_embeddings().weight.device

    def train(self, mode: bool = True) -> PromptedTextEncoder:
        """Stay in evaluation mode, whatever `mode` is: dropout would make the frozen encoder's output a random one."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PromptedTextEncoder:
        # What .to(), .cuda(), .double() ... of this module and of all that contain it come down to.
        self._held[0]._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, soft_prompts: Tensor | None = None) -> Tensor:
        """Embed prompts, `chunk_size` at a time.

        Args:
            input_ids: (P, T) int64, [CLS] first, padded at the end.
            attention_mask: (P, T), 1 or True for tokens, 0 or False for padding.
            soft_prompts: (P, S, H) or None; S may be 0, which is the same as None.

        Returns:
            (P, H).

        Raises:
            ValueError: if the shapes do not fit each other or the encoder, or T + S exceeds `max_positions`.
        """
        self._check(input_ids, attention_mask, soft_prompts)
        if soft_prompts is not None and soft_prompts.shape[1] == 0:
            soft_prompts = None
        num_prompts = input_ids.shape[0]
        if num_prompts <= self.chunk_size:
            return self._embed(input_ids, attention_mask, soft_prompts)
        again = torch.is_grad_enabled() and soft_prompts is not None and soft_prompts.requires_grad
        embeddings = []
        for start in range(0, num_prompts, self.chunk_size):
            rows = slice(start, start + self.chunk_size)
            chunk = (input_ids[rows], attention_mask[rows], None if soft_prompts is None else soft_prompts[rows])
            # Nothing is drawn at random in evaluation mode, so that there is no random state to keep.
            embeddings.append(
                checkpoint(self._embed, *chunk, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._embed(*chunk)
            )
        return torch.cat(embeddings)

    def embed_prompts(self, prompts: FindingPrompts, soft_prompts: Tensor | None = None) -> FindingEmbeddings:
        """Embed tokenised prompts and average them by finding.

        Args:
            prompts: of L findings, on any device.
            soft_prompts: (L, S, H), one for each finding, shared by its positive and negative prompts; or None.

        Raises:
            ValueError: if there are not as many soft prompts as findings; and see `forward`.
        """
        num_findings = prompts.num_findings
        if soft_prompts is not None and soft_prompts.shape[0] != num_findings:
            raise ValueError(f"there are {num_findings} findings but {soft_prompts.shape[0]} soft prompts.")
        prompts = prompts.to(self.device)
        by_prompt = None if soft_prompts is None else soft_prompts[prompts.finding_index]
        embeddings = self(prompts.input_ids, prompts.attention_mask, by_prompt)
        belongs = prompts.finding_index == torch.arange(num_findings, device=self.device)[:, None]
        positive, negative = belongs & prompts.is_positive, belongs & ~prompts.is_positive
        # A product with a matrix of weights: adding by index has no fixed order on GPUs.
        return FindingEmbeddings(
            _row_means(positive, embeddings), _row_means(negative, embeddings), has_negative=negative.any(1)
        )

    def embed_findings(
        self, findings: Sequence[Finding], soft_prompts: Tensor | None = None, use_negative: bool = True
    ) -> FindingEmbeddings:
        """Tokenise and embed the prompts of L findings; see `tokenize_findings` and `embed_prompts`.

        Args:
            findings: L of them, of a label set or made at inference.
            soft_prompts: (L, S, H) or None.
            use_negative: with False, only positive prompts; then `has_negative` is False everywhere.
        """
        num_soft_tokens = 0 if soft_prompts is None else soft_prompts.shape[1]
        prompts = tokenize_findings(self.tokenizer, findings, self.max_positions, num_soft_tokens, use_negative)
        return self.embed_prompts(prompts, soft_prompts)

    def _embed(self, input_ids: Tensor, attention_mask: Tensor, soft_prompts: Tensor | None) -> Tensor:
        model = self._held[0]
        words = model.get_input_embeddings()(input_ids)
        mask = attention_mask.to(torch.int64)
        if soft_prompts is not None:
            words = torch.cat([words[:, :1], soft_prompts.to(words.dtype), words[:, 1:]], dim=1)
            mask = torch.cat([mask[:, :1], mask.new_ones(soft_prompts.shape[:2]), mask[:, 1:]], dim=1)
        # Without input_ids every model counts positions from its first one on, which is right for padding at the end.
        states = model(inputs_embeds=words, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def _check(self, input_ids: Tensor, attention_mask: Tensor, soft_prompts: Tensor | None) -> None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask must both be (P, T), got {shape} and {tuple(attention_mask.shape)}."
            )
        num_soft_tokens = 0
        if soft_prompts is not None:
            given = tuple(soft_prompts.shape)
            if len(given) != 3 or given[0] != shape[0] or given[2] != self.hidden_size:
                raise ValueError(f"soft_prompts must be ({shape[0]}, S, {self.hidden_size}), got {given}.")
            num_soft_tokens = given[1]
        if shape[1] + num_soft_tokens > self.max_positions:
            raise ValueError(
                f"{shape[1]} tokens and {num_soft_tokens} soft tokens exceed the {self.max_positions} positions of "
                f"text encoder {self.name}; shorten the prompts or use fewer soft tokens."
            )


def _row_means(belongs: Tensor, embeddings: Tensor) -> Tensor:
    """Return for each row of the mask (L, P) the mean of its embeddings (P, H), zero where the row is empty."""
    weights = belongs.to(embeddings.dtype)
    return (weights / weights.sum(1, keepdim=True).clamp_min(1)) @ embeddings


def _check_kind(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse what cannot take soft prompts of the hidden size behind a first token."""
    if model.config.is_encoder_decoder:
        problem = "is no encoder alone"
    elif tokenizer.cls_token_id is None or tokenizer("word")["input_ids"][0] != tokenizer.cls_token_id:
        problem = "does not put a [CLS] token first"
    elif model.get_input_embeddings().embedding_dim != model.config.hidden_size:
        problem = "has input embeddings of another width than its layers"
    else:
        return
    kind = f"a {type(model).__name__} with a {type(tokenizer).__name__}"
    raise ValueError(f"text encoder {name}: {kind} {problem}; give a model like BERT, DistilBERT or RoBERTa.")


def _max_positions(model: nn.Module, name: str) -> int:
    """Return how many tokens fit: in RoBERTa and its kin, positions begin behind that of the padding."""
    rows: int | None = getattr(model.config, "max_position_embeddings", None)
    if rows is None:
        raise ValueError(
            f"text encoder {name}: its config.json has no max_position_embeddings, so that the longest prompt is "
            f"unknown; give a model like BERT, DistilBERT or RoBERTa."
        )
    for module_name, module in model.named_modules():
        if module_name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return rows if module.padding_idx is None else rows - module.padding_idx - 1
    return rows
