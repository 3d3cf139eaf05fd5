"""Rows of tokens as endless batches of rows that are alike in length, and what their frequencies alone tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["endless_batches", "pad_rows", "token_entropy"]

# Batches are cut from so many batches' worth of rows sorted by length: half the tokens would be padding else.
_BATCHES_SORTED_TOGETHER = 8


def endless_batches(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the indices of the rows of a batch, for ever; every row once before any comes again.

    Args:
        lengths: of each row; at least one row.
        batch_size: rows in a batch; the last ones of a round may have fewer.
        generator: of the order.
    """
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        pool_size = _BATCHES_SORTED_TOGETHER * batch_size
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=lambda index: lengths[index])
            batches += [pool[cut : cut + batch_size] for cut in range(0, len(pool), batch_size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def pad_rows(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """Return the rows as one tensor (B, T), filled up at the end with `padding` to the longest."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])


def token_entropy(tokens: Iterable[int]) -> float:
    """Return the entropy in nats of the tokens' frequencies.

    It is the cross-entropy of the best guess that looks at no neighbour: a model that is not below has learnt nothing
    but frequencies.
    """
    counts = Counter(tokens)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())
