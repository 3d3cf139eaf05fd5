"""Datasets whose random draws depend on the sample and the epoch, not on workers, ranks or what ran before.

This is what makes an interrupted run continue on the very curve it would have had, and two ranks compute what one
computes.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.transforms import Randomizable, Transform
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from .batch_slots import FillsSlots, SampleSlot
from .kept_files import KeptFiles, ReadsFiles
from .threaded_loader import SlotFillingDataset, ThreadedDataLoader

__all__ = ["EpochIndex", "SeededDataLoader", "SeededDataset", "SeededSampler"]


class EpochIndex(NamedTuple):
    """Which sample, in which epoch; the epoch travels along because a worker would not see it change."""

    epoch: int
    index: int  # type: ignore[assignment]  # it hides tuple.index, which nobody needs of a pair


class SeededDataset(SlotFillingDataset):
    """Applies a transform whose random state is set from (seed, epoch, index) before each sample.

    Args:
        data: one item per sample.
        transform: applied to each item; its random parts are MONAI `Randomizable`.
        seed: of the whole run.
        cache_mib: mebibytes of what was read from files to keep in memory, without what is made of it, for the next
            epochs; for data that fit in memory. 0 reads anew each time.
    """

    def __init__(
        self, data: Sequence[Any], transform: Callable[[Any], Any], seed: int = 0, cache_mib: float = 0.0
    ) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        if cache_mib:
            kept_files = KeptFiles(cache_mib)
            for step in self._steps():
                if isinstance(step, ReadsFiles):
                    step.kept_files = kept_files

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: EpochIndex | tuple[int, int] | int) -> Any:
        """Return the transformed sample; a plain index means epoch 0."""
        return self.load(key)

    def for_thread(self) -> SeededDataset:
        """Return a dataset of the same samples, for one thread: its transforms draw from a random state of their own,
        and share the rest, such as sentence banks, stores and kept files."""
        own = copy.copy(self)
        own.transform = _with_own_state(self.transform)
        return own

    def load(self, key: EpochIndex | tuple[int, int] | int, slot: SampleSlot | None = None) -> Any:
        """Return the transformed sample; what its transforms read into `slot` lies there.

        Raises:
            Exception: whatever a transform raises, with a note that says in which sample.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if isinstance(self.transform, Randomizable):
            digest = hashlib.sha256(f"{self.seed} {epoch} {index}".encode()).digest()
            self.transform.set_random_state(seed=int.from_bytes(digest[:4], "little"))
        filling = [step for step in self._steps() if isinstance(step, FillsSlots)]
        item = self.data[index]
        try:
            for step in filling:
                step.slot = slot
            return self.transform(item)
        except Exception as error:
            error.add_note(f"while loading {_name_of(item, index)}")
            raise
        finally:
            for step in filling:
                step.slot = None

    def _steps(self) -> Sequence[Any]:
        return getattr(self.transform, "transforms", (self.transform,))


class SeededSampler(DistributedSampler):
    """Yields `EpochIndex`, shuffled by (seed, epoch), this rank's share of them.

    It works alike with one process and with many (WORLD_SIZE and RANK as torchrun sets them). MONAI's engines tell it
    the epoch. Consecutive samples go to different ranks, so batches of n on k ranks hold together the very samples that
    one batch of n · k holds on one rank.

    While training, ranks get equal numbers, for which a few samples are repeated where the ranks cannot share evenly:
    they step together. In validation no sample is repeated, since it would count twice in a mean; the numbers may then
    differ by one, unless there are fewer samples than ranks, or `even` asks for equal ones.

    Args:
        dataset: what to sample from.
        shuffle: False for validation; it also keeps the epoch at 0, so that validation draws the same every time.
        seed: of the whole run.
        even: in validation, leave out the last samples, fewer than there are ranks, where the ranks cannot share
            evenly. Ranks that share a model's layers need it: one with a batch more would wait for the others forever.
    """

    def __init__(self, dataset: Dataset, shuffle: bool = True, seed: int = 0, even: bool = False) -> None:
        self.even = even
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        super().__init__(dataset, world_size, int(os.environ.get("RANK", "0")), shuffle=shuffle, seed=seed)

    def __iter__(self) -> Iterator[EpochIndex]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(size, generator=generator).tolist() if self.shuffle else list(range(size))
        if self._repeats():
            order = (order * (self.total_size // max(size, 1) + 1))[: self.total_size]
        elif self.even:
            order = order[: size - size % self.num_replicas]
        epoch = self.epoch if self.shuffle else 0
        return iter([EpochIndex(epoch, index) for index in order[self.rank :: self.num_replicas]])

    def __len__(self) -> int:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self._repeats():
            return self.num_samples
        return size // self.num_replicas if self.even else len(range(self.rank, size, self.num_replicas))

    def _repeats(self) -> bool:
        return self.shuffle or len(self.dataset) < self.num_replicas  # type: ignore[arg-type]


class SeededDataLoader(ThreadedDataLoader):
    """A `ThreadedDataLoader` with a `SeededSampler`: for training, or for validation on this rank's share of the cases.

    Args:
        dataset: a `SeededDataset`.
        batch_size: cases of a batch, on this rank.
        num_workers: threads that load.
        shuffle: True for training; it also leaves out a last batch that is not full, so that all steps weigh the same.
        seed: of the order.
        collate_fn: from samples to a batch; None is torch's own.
        even: the same number of cases, and so of batches, on each rank; see `SeededSampler`.
        prefetch: batches that are loaded ahead of the one that is handed out.
        device: see `ThreadedDataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        even: bool = False,
        prefetch: int = 2,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            num_workers,
            sampler=SeededSampler(dataset, shuffle=shuffle, seed=seed, even=even),
            drop_last=shuffle,
            collate_fn=collate_fn,
            prefetch=prefetch,
            device=device,
        )


def _with_own_state(transform: Any) -> Any:
    """Copy a transform and the transforms in it, such as those of a chain, but nothing else that they hold."""
    if not isinstance(transform, (Transform, Randomizable)):
        return transform
    own = copy.copy(transform)
    for name, value in vars(transform).items():
        if isinstance(value, (Transform, Randomizable)):
            setattr(own, name, _with_own_state(value))
        elif isinstance(value, (list, tuple)) and any(isinstance(one, (Transform, Randomizable)) for one in value):
            setattr(own, name, type(value)(_with_own_state(one) for one in value))
    return own


def _name_of(item: Any, index: int) -> str:
    if not isinstance(item, Mapping):
        return f"sample {index}"
    return f"{item.get('volume_id', f'sample {index}')} ({item.get('image', 'no image')})"
