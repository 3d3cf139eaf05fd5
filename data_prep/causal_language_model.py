"""Training a small Llama to answer prompts with reports by predicting the next word."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_prep.token_batches import endless_batches, pad_rows

__all__ = ["Answer", "CausalLanguageModelSettings", "CausalTrainingResult", "train_causal_language_model"]

_IGNORED = -100
_WARM_UP_SHARE = 0.1
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0
_NUM_EVALUATED = 256
_MIXED_SHARE = 0.9
# Llama's own proportion is 8/3; a multiple of 32 suits the machine.
_INTERMEDIATE_RATIO, _INTERMEDIATE_MULTIPLE = 8 / 3, 32


@dataclass(frozen=True)
class CausalLanguageModelSettings:
    """Sizes and schedule.

    Args:
        hidden_size: width, a multiple of `num_heads`; the width of a head is even.
        num_layers: transformer layers.
        num_heads: attention heads.
        max_positions: longest sequence that the model takes, with an image before the text; rows beyond are refused.
        num_steps: optimizer steps.
        batch_size: prompts with their answers in a step.
        easy_share: share of the steps that are of easy examples, where there are any; the last tenth of all has none.
        learning_rate: at its highest, after a warm-up; then it falls to 0 like a cosine.
        num_threads: of the processor; more or fewer may change the last digits of the weights.
        seed: of weights and order.

    Raises:
        ValueError: if one of them cannot be.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_positions: int = 1024
    num_steps: int = 1400
    batch_size: int = 16
    easy_share: float = 0.4
    learning_rate: float = 2e-3
    num_threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_steps", "batch_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads {self.num_heads}: positions "
                f"turn pairs of a head's numbers."
            )
        if self.max_positions < 64:
            raise ValueError(f"max_positions must be at least 64, got {self.max_positions}.")
        if not 0 <= self.easy_share <= _MIXED_SHARE:
            raise ValueError(f"easy_share must be between 0 and {_MIXED_SHARE}, got {self.easy_share}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")


@dataclass(frozen=True)
class Answer:
    """The tokens of a prompt, and those of the answer with the one that ends it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class CausalTrainingResult:
    """A trained model and what training did.

    Attributes:
        model: `transformers.LlamaForCausalLM` in evaluation mode.
        loss_before: cross-entropy in nats of the answers' tokens of training examples, before the first step.
        loss_after: of the same examples, after the last step.
    """

    model: Any
    loss_before: float
    loss_after: float


def train_causal_language_model(
    examples: Sequence[Answer],
    vocab_size: int,
    padding: int,
    end: int,
    settings: CausalLanguageModelSettings,
    easy_examples: Sequence[Answer] = (),
    on_step: Callable[[], Any] = lambda: None,
) -> CausalTrainingResult:
    """Train a Llama from random weights on the CPU; the loss is of the answers alone.

    Args:
        examples: prompts and answers.
        vocab_size: number of ids.
        padding: id that fills rows up; never predicted.
        end: id that ends a text.
        settings: sizes and schedule. The same settings and examples give the same weights on the same machine.
        easy_examples: shorter answers, most of whose tokens follow from the prompt.
        on_step: called after each step.

    Raises:
        ValueError: if there is no example, or one is longer than `max_positions`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if not examples:
        raise ValueError("there is no example to learn from.")
    longest = max(len(example) for example in (*examples, *easy_examples))
    if longest > settings.max_positions:
        raise ValueError(
            f"the longest prompt with its report has {longest} tokens, max_positions is "
            f"{settings.max_positions}; raise it."
        )
    width = _INTERMEDIATE_RATIO * settings.hidden_size
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        intermediate_size=_INTERMEDIATE_MULTIPLE * math.ceil(width / _INTERMEDIATE_MULTIPLE),
        max_position_embeddings=settings.max_positions,
        # As wide as keeps the size of what passes through: with the usual 0.02, made for widths of thousands, attention
        # looks everywhere alike for the first hundreds of steps.
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=padding,
    )
    with _threads(settings.num_threads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = LlamaForCausalLM(config).train()
        with _float32_attention(network):
            before = _evaluate(network, examples, padding, settings)
            _train(network, examples, easy_examples, padding, settings, on_step)
            after = _evaluate(network, examples, padding, settings)
    return CausalTrainingResult(network.eval(), before, after)


def _train(
    network: Any,
    examples: Sequence[Answer],
    easy_examples: Sequence[Answer],
    padding: int,
    settings: CausalLanguageModelSettings,
    on_step: Callable[[], Any],
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.num_steps + 1,
        pct_start=_WARM_UP_SHARE,
        cycle_momentum=False,
    )
    for batch in islice(_batches(examples, easy_examples, settings, generator), settings.num_steps):
        optimizer.zero_grad()
        loss, _ = _loss(network, batch, padding)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), _LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        on_step()


def _batches(
    examples: Sequence[Answer],
    easy_examples: Sequence[Answer],
    settings: CausalLanguageModelSettings,
    generator: torch.Generator,
) -> Iterator[list[Answer]]:
    """Yield easy batches among the others, evenly until the last tenth.

    One kind after the other does not do: what the first taught is lost before the second is learnt.
    """
    kinds = (examples, easy_examples)
    batches = [endless_batches([len(row) for row in rows], settings.batch_size, generator) for rows in kinds]
    easy_among_mixed = settings.easy_share / _MIXED_SHARE if easy_examples else 0.0
    for step in count():
        share = easy_among_mixed if step < _MIXED_SHARE * settings.num_steps else 0.0
        easy = math.floor((step + 1) * share) > math.floor(step * share)
        yield [kinds[easy][index] for index in next(batches[easy])]


def _loss(network: Any, examples: Sequence[Answer], padding: int) -> tuple[Tensor, int]:
    """Return the mean cross-entropy of the answers' tokens, and how many there are."""
    ids = pad_rows([(*example.prompt, *example.answer) for example in examples], padding)
    targets = pad_rows([(*[_IGNORED] * len(example.prompt), *example.answer) for example in examples], _IGNORED)[:, 1:]
    chosen = targets != _IGNORED
    # Padding stands at the end, where no token before it looks, so that no mask is needed.
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_has_fast_bfloat16()):
        states = network.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = network.lm_head(states[chosen])
    return cross_entropy(logits.float(), targets[chosen]), int(chosen.sum())


@torch.no_grad()
def _evaluate(network: Any, examples: Sequence[Answer], padding: int, settings: CausalLanguageModelSettings) -> float:
    """Return the loss on evenly chosen training examples, the same at every call."""
    chosen = examples[:: max(1, len(examples) // _NUM_EVALUATED)]
    total, count = 0.0, 0
    for start in range(0, len(chosen), settings.batch_size):
        loss, number = _loss(network, chosen[start : start + settings.batch_size], padding)
        total += number * float(loss)
        count += number
    return total / count


def _has_fast_bfloat16() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


@contextmanager
def _float32_attention(network: Any) -> Iterator[None]:
    """Let the attention of a Hugging Face network compute in float32 under autocast, as it does without.

    On the processor the backward pass of attention takes twice as long in bfloat16, while products of matrices take
    half as long. What the network's configuration says is as it was afterwards.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast(query.device.type, enabled=False):
            attended, weights = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), *rest, **options
            )
        return attended.to(value.dtype), weights

    name, before = "sdpa_in_float32", network.config._attn_implementation
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    network.set_attn_implementation(name)
    try:
        yield
    finally:
        network.set_attn_implementation(before)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
