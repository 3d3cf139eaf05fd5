"""What operations compute, move and leave in memory, counted one by one, on any device including meta."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["OperationMeter", "Work"]

aten = torch.ops.aten
# These touch only the rows they are asked for, not the table they are given.
_LOOK_UPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
_UNWRITTEN = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


@dataclass(frozen=True)
class Work:
    """Operations, as pairs of how much each computes and moves.

    Attributes:
        operations: (floating-point operations, bytes) -> how many such there are.
    """

    operations: Mapping[tuple[float, float], float] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
        return sum(flops * count for (flops, _), count in self.operations.items())

    @property
    def bytes_moved(self) -> float:
        """Bytes read and written, if each operation reads all it is given and writes all it gives, once."""
        return sum(size * count for (_, size), count in self.operations.items())

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the time of one operation after the other, each as long as the longer of computing and moving."""
        return sum(
            max(flops / flops_per_s, size / bytes_per_s) * count for (flops, size), count in self.operations.items()
        )

    def times(self, factor: float) -> Work:
        """Return the same work, so many times over."""
        return Work({size: count * factor for size, count in self.operations.items()})

    def plus(self, other: Work, factor: float = 1.0) -> Work:
        """Return both together, the other `factor` times, which may be negative."""
        total = dict(self.operations)
        for size, count in other.operations.items():
            total[size] = total.get(size, 0.0) + factor * count
        return Work({size: count for size, count in total.items() if count})


class OperationMeter(TorchDispatchMode):
    """Counts every operation inside its context, those of the backward pass too.

    Memory is that of storages, each counted once however many tensors look at it, from the operation that makes it to
    the moment that nothing refers to it. An allocator's rounding and the scratch memory of kernels are not in it.

    Args:
        given: tensors that are there already and do not count: parameters, the batch.

    Attributes:
        live_bytes: of what was made and is alive now.
        peak_bytes: the most that was alive at a time.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._operations: Counter[tuple[float, float]] = Counter()
        self._storages: dict[int, weakref.ref] = {}
        for tensor in given:
            self._remember(tensor.untyped_storage(), counts=False)

    def work(self) -> Work:
        """Return what was done since the last call, or since the meter was made."""
        done, self._operations = Work(dict(self._operations)), Counter()
        return done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if not outputs:
            return result
        inputs = _tensors((args, kwargs))
        given = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in given for t in outputs)
        packet = func._overloadpacket
        if not is_view and packet not in _UNWRITTEN:
            formula = flop_registry.get(packet)
            flops = float(formula(*args, **kwargs, out_val=result)) if formula is not None else 0.0
            moved = sum(_num_bytes(tensor) for tensor in outputs)
            moved += moved if packet in _LOOK_UPS else sum(_num_bytes(tensor) for tensor in inputs)
            self._operations[flops, float(moved)] += 1
        for tensor in outputs:
            self._remember(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _remember(self, storage: torch.UntypedStorage, counts: bool = True) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if counts else 0

        def forget(_: Any) -> None:
            del self._storages[key]
            self.live_bytes -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.live_bytes += size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, those that it repeats once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
