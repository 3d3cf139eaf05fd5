"""The prompts of findings as padded token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .label_set import Finding

__all__ = ["FindingPrompts", "tokenize_findings"]

_SHOWN_WORDS = 6


@dataclass(frozen=True)
class FindingPrompts:
    """P prompts of L findings: for each finding in turn, first the positive ones, then the negative ones.

    Attributes:
        input_ids: (P, T) int64, padded at the end to the longest prompt.
        attention_mask: (P, T) int64, 1 for tokens and 0 for padding.
        finding_index: (P,) int64, 0 to L - 1.
        is_positive: (P,) bool, True where the prompt says that the finding is present.
        num_findings: L.
    """

    input_ids: Tensor
    attention_mask: Tensor
    finding_index: Tensor
    is_positive: Tensor
    num_findings: int

    def to(self, device: torch.device | str) -> FindingPrompts:
        """Return the same prompts on a device."""
        return FindingPrompts(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.finding_index.to(device),
            self.is_positive.to(device),
            self.num_findings,
        )


def tokenize_findings(
    tokenizer: Any,
    findings: Sequence[Finding],
    max_positions: int,
    num_soft_tokens: int = 0,
    use_negative: bool = True,
) -> FindingPrompts:
    """Tokenise the prompts of findings. Nothing is ever cut off: a prompt that does not fit is refused.

    Args:
        tokenizer: of Hugging Face transformers. Without a padding token, 0 stands in: padding is masked everywhere.
        findings: each with at least one positive prompt; negative ones may be absent.
        max_positions: tokens that the text encoder takes (`PromptedTextEncoder.max_positions`).
        num_soft_tokens: positions of these that soft prompts will take.
        use_negative: with False, only positive prompts.

    Raises:
        ValueError: if there is no finding, a finding has no positive prompt, or a prompt is empty or too long.
    """
    if not findings:
        raise ValueError("there is no finding to tokenise; give at least one.")
    limit = max_positions - num_soft_tokens
    rows: list[list[int]] = []
    finding_index: list[int] = []
    is_positive: list[bool] = []
    for index, finding in enumerate(findings):
        if not finding.positive_prompts:
            raise ValueError(f"finding {finding.name!r} has no positive prompt; give at least one.")
        kinds = [(True, finding.positive_prompts)] + [(False, finding.negative_prompts)] * use_negative
        for positive, prompts in kinds:
            for prompt in prompts:
                if not prompt.strip():
                    raise ValueError(f"finding {finding.name!r} has an empty prompt; remove it or write it.")
                ids = list(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
                if len(ids) > limit:
                    raise ValueError(_too_long(finding, prompt, len(ids), limit, max_positions, num_soft_tokens))
                rows.append(ids)
                finding_index.append(index)
                is_positive.append(positive)
    longest = max(len(row) for row in rows)
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    return FindingPrompts(
        input_ids=torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        finding_index=torch.tensor(finding_index),
        is_positive=torch.tensor(is_positive),
        num_findings=len(findings),
    )


def _too_long(
    finding: Finding, prompt: str, num_tokens: int, limit: int, max_positions: int, num_soft_tokens: int
) -> str:
    words = prompt.split()
    start = " ".join(words[:_SHOWN_WORDS]) + (" ..." if len(words) > _SHOWN_WORDS else "")
    return (
        f"finding {finding.name!r}: the prompt {start!r} has {num_tokens} tokens, but at most {limit} fit (the text "
        f"encoder's {max_positions} positions less {num_soft_tokens} soft tokens); shorten the prompt, or use fewer "
        f"soft tokens or another text encoder."
    )
