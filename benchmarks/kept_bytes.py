"""How much memory a forward pass leaves occupied for the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["kept_bytes"]


class _Storages(TorchDispatchMode):
    """Remembers every storage that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def kept_bytes(network: nn.Module, *inputs: Any) -> int:
    """Return the bytes of all that the network made in its forward pass and that lives on while its result does.

    Counted are storages, each once, whoever holds them: autograd or a scheme of recomputation. Works on the meta
    device, too.

    Args:
        network: in training mode.
        inputs: of its forward pass; what they and the parameters occupy does not count.
    """
    given = {part.untyped_storage()._cdata for part in [*network.parameters(), *network.buffers(), *inputs]}
    with _Storages() as storages:
        result = network(*inputs)
    kept = sum(size for key, (ref, size) in storages.made.items() if key not in given and not ref.expired())
    del result
    return kept
