"""Training a small BERT on sentences by predicting hidden words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_prep.token_batches import endless_batches, pad_rows, token_entropy

__all__ = [
    "MaskedLanguageModelSettings",
    "TrainingResult",
    "mask_tokens",
    "train_masked_language_model",
    "unigram_entropy",
]

_PAD, _SEP, _MASK = 0, 3, 4  # ids of data_prep.wordpiece_vocabulary.SPECIAL_TOKENS
_NUM_SPECIAL_TOKENS = 5
_IGNORED = -100
_SHARE_MASKED, _SHARE_REPLACED = 0.8, 0.1
_WARM_UP_SHARE = 0.05
_NUM_EVALUATED = 512


@dataclass(frozen=True)
class MaskedLanguageModelSettings:
    """Sizes and schedule.

    Args:
        hidden_size: width, a multiple of `num_heads`.
        num_layers: transformer layers.
        num_heads: attention heads.
        max_positions: longest sequence, special tokens included; longer ones are cut.
        num_steps: optimizer steps.
        batch_size: sentences in a step.
        learning_rate: at its highest, after a linear warm-up; then it falls linearly to 0.
        mask_probability: share of the tokens that are to be predicted.
        seed: of weights, order and masks.

    Raises:
        ValueError: if one of them cannot be.
    """

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 128
    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 3e-3
    mask_probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}.")
        if self.max_positions < 8:
            raise ValueError(f"max_positions must be at least 8, got {self.max_positions}.")
        if not 0 < self.mask_probability < 1:
            raise ValueError(f"mask_probability must be between 0 and 1, got {self.mask_probability}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")


@dataclass(frozen=True)
class TrainingResult:
    """A trained model and what training did.

    Attributes:
        model: `transformers.BertModel` without pooling layer, in evaluation mode.
        loss_before: cross-entropy in nats of masked tokens of training sentences, before the first step.
        loss_after: of the same sentences and masks, after the last step.
    """

    model: Any
    loss_before: float
    loss_after: float


def unigram_entropy(sequences: Sequence[Sequence[int]]) -> float:
    """Return what `token_entropy` says of the sentences, special tokens left out."""
    return token_entropy(token for sequence in sequences for token in sequence if token >= _NUM_SPECIAL_TOKENS)


def mask_tokens(
    input_ids: Tensor, probability: float, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict and hide them: 80 % become [MASK], 10 % another token, 10 % stay.

    Source: BERT, Devlin et al., NAACL 2019, section 3.1.

    Args:
        input_ids: (B, T) with ids of `SPECIAL_TOKENS` first, padded with 0.
        probability: share that is chosen; special tokens never are.
        vocab_size: number of ids.
        generator: of the draws.

    Returns:
        The input with tokens hidden, (B, T), and the targets (B, T), -100 where nothing is to be predicted.
    """
    draws = torch.rand(input_ids.shape, generator=generator)
    how = torch.rand(input_ids.shape, generator=generator)
    others = torch.randint(_NUM_SPECIAL_TOKENS, vocab_size, input_ids.shape, generator=generator)
    chosen = (draws < probability) & (input_ids >= _NUM_SPECIAL_TOKENS)
    hidden = torch.where(chosen & (how < _SHARE_MASKED), _MASK, input_ids)
    hidden = torch.where(chosen & (how >= 1 - _SHARE_REPLACED), others, hidden)
    return hidden, torch.where(chosen, input_ids, _IGNORED)


def train_masked_language_model(
    sequences: Sequence[Sequence[int]],
    vocab_size: int,
    settings: MaskedLanguageModelSettings,
    on_step: Callable[[], Any] = lambda: None,
) -> TrainingResult:
    """Train a BERT from random weights on the CPU.

    Dropout is off: so small a model does not fit its sentences by heart in so few steps.

    Args:
        sequences: token ids of each sentence, [CLS] and [SEP] included.
        vocab_size: number of ids.
        settings: sizes and schedule. The same settings and sequences give the same weights on the same machine.
        on_step: called after each step.

    Raises:
        ValueError: if there is no sentence with a word.
    """
    from transformers import BertConfig, BertForMaskedLM

    kept = [list(sequence) for sequence in sequences if max(sequence) >= _NUM_SPECIAL_TOKENS]
    kept = [[*row[: settings.max_positions - 1], _SEP] if len(row) > settings.max_positions else row for row in kept]
    if not kept:
        raise ValueError("there is no sentence with a word to learn from.")
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=settings.max_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=_PAD,
    )
    num_threads = torch.get_num_threads()
    # Matrices this small gain nothing from a second thread and lose tenfold when another process wants the same
    # cores; and the weights then do not depend on how many cores there are.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = BertForMaskedLM(config).train()
        before = _evaluate(network, kept, settings)
        _train(network, kept, settings, on_step)
        after = _evaluate(network, kept, settings)
    finally:
        torch.set_num_threads(num_threads)
    return TrainingResult(network.bert.eval(), before, after)


def _train(
    network: Any, rows: Sequence[Sequence[int]], settings: MaskedLanguageModelSettings, on_step: Callable[[], Any]
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, settings.num_steps)
    )
    batches = endless_batches([len(row) for row in rows], settings.batch_size, generator)
    for _ in range(settings.num_steps):
        ids = pad_rows([rows[index] for index in next(batches)], _PAD)
        hidden, targets = mask_tokens(ids, settings.mask_probability, network.config.vocab_size, generator)
        optimizer.zero_grad()
        _loss(network, hidden, targets).backward()
        optimizer.step()
        schedule.step()
        on_step()


def _loss(network: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    states = network.bert(input_ids=hidden, attention_mask=(hidden != _PAD).long()).last_hidden_state
    chosen = targets != _IGNORED
    # The sum over no token is 0, where the mean would not be a number.
    return cross_entropy(network.cls(states[chosen]), targets[chosen], reduction="sum") / chosen.sum().clamp_min(1)


@torch.no_grad()
def _evaluate(network: Any, rows: Sequence[Sequence[int]], settings: MaskedLanguageModelSettings) -> float:
    """Return the loss on evenly chosen training sentences under masks of their own, the same at every call."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    chosen = rows[:: max(1, len(rows) // _NUM_EVALUATED)]
    total, count = 0.0, 0
    for start in range(0, len(chosen), settings.batch_size):
        ids = pad_rows(chosen[start : start + settings.batch_size], _PAD)
        hidden, targets = mask_tokens(ids, settings.mask_probability, network.config.vocab_size, generator)
        number = int((targets != _IGNORED).sum())
        total += number * float(_loss(network, hidden, targets))
        count += number
    return total / count if count else math.nan


def _learning_rate_factor(step: int, num_steps: int) -> float:
    warm_up = max(1.0, _WARM_UP_SHARE * num_steps)
    return min((step + 1) / warm_up, 1 - step / num_steps)
