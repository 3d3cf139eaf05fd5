"""Memory for batches, into which files are read without a copy between.

Fresh memory costs more than reading: the system hands it out page by page and zeroes each page first. So the memory of
a batch is used again, as soon as nobody holds a tensor of that batch any more.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["BatchMemory", "BatchSlot", "FillsSlots", "SampleSlot"]

_Size = tuple[tuple[int, ...], np.dtype]


class BatchMemory:
    """Gives memory to one batch after another, for arrays as large as those of the samples before.

    Threads may share it.

    Args:
        pinned: take memory from which a GPU copies by itself. Its user must keep the tensors until a copy is done.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._sizes: dict[str, _Size] = {}
        self._free: dict[_Size, deque[np.ndarray]] = {}

    def expect(self, name: str, array: np.ndarray) -> None:
        """Have batches from now on hold arrays of this shape and type under this name."""
        self._sizes[name] = (array.shape, array.dtype)

    def slot(self, num_samples: int) -> BatchSlot:
        """Return memory for a batch; its content is anything."""
        self._let_go()
        return BatchSlot(
            self,
            {name: self._tensor((num_samples, *shape), dtype) for name, (shape, dtype) in [*self._sizes.items()]},
        )

    def _let_go(self) -> None:
        """Keep no memory of sizes that are not expected any more: of scans that all differ, each would leave some."""
        expected = [*self._sizes.values()]
        for shape, dtype in [*self._free]:
            if (shape[1:], dtype) not in expected:
                del self._free[shape, dtype]

    def _tensor(self, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        free = self._free.setdefault((shape, dtype), deque())
        try:
            memory = free.pop()
        except IndexError:
            memory = _pinned_array(shape, dtype) if self.pinned else np.empty(shape, dtype)
        # Tensors keep the view alive that they are made of, and so does whatever is made of them; when the last one is
        # gone, so is the view, and the memory behind it is free.
        view = memory.view()
        weakref.finalize(view, free.append, memory).atexit = False
        return torch.from_numpy(view)


class BatchSlot:
    """The memory of one batch.

    Args:
        memory: where it is from.
        tensors: name -> (B, ...).
    """

    def __init__(self, memory: BatchMemory, tensors: Mapping[str, torch.Tensor]) -> None:
        self.memory = memory
        self.tensors = dict(tensors)

    def sample(self, row: int) -> SampleSlot:
        """Return the memory of one sample."""
        return SampleSlot(self.memory, {name: tensor[row].numpy() for name, tensor in self.tensors.items()})

    def holds(self, name: str, row: int, value: Any) -> bool:
        """Whether a value of a sample lies in its place in the batch already."""
        place = self.tensors[name][row]
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == place.dtype
            and value.shape == place.shape
            and value.is_contiguous()
            and value.data_ptr() == place.data_ptr()
        )


class SampleSlot:
    """The memory of one sample in that of its batch.

    Args:
        memory: where it is from.
        rows: name -> array.
    """

    def __init__(self, memory: BatchMemory, rows: Mapping[str, np.ndarray]) -> None:
        self._memory = memory
        self._rows = dict(rows)

    def row(self, name: str) -> np.ndarray | None:
        """Return the array to fill; None where no sample before had one of this name. It may have another shape than
        this sample's: then it is left as it is."""
        return self._rows.get(name)

    def expect(self, name: str, array: np.ndarray) -> None:
        """Say what this sample had, for the batches to come."""
        self._memory.expect(name, array)


class FillsSlots:
    """A transform that reads into `slot` where it is given one."""

    slot: SampleSlot | None = None


def _pinned_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().view(dtype).reshape(shape)
