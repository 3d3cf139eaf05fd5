"""Loading batches by threads, straight into the memory of a batch and on to the GPU.

Reading, inflating and copying leave the interpreter to others, so that threads do what worker processes do, without
sending each volume from one process to another.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch_slots import BatchMemory, BatchSlot, SampleSlot

__all__ = ["DEVICE_KEYS", "SlotFillingDataset", "ThreadedDataLoader"]

DEVICE_KEYS = ("image", "anatomical_mask", "target", "local_features")


class SlotFillingDataset(Dataset, ABC):
    """A dataset whose samples can be loaded by threads, into memory that is there already."""

    @abstractmethod
    def for_thread(self) -> SlotFillingDataset:
        """Return one that has its own random state and place to load to, and shares the rest."""

    @abstractmethod
    def load(self, key: Any, slot: SampleSlot | None = None) -> Any:
        """Return the sample of a key; what fits lies in `slot`."""


class ThreadedDataLoader(DataLoader):
    """A `DataLoader` whose workers are threads.

    What a batch holds does not depend on their number, nor does the order of batches. With 0 workers each batch is
    loaded when it is asked for. Otherwise threads are there from the first batch of an epoch to the last, or until the
    loop over the batches is left. An error in a thread is raised where its batch is asked for.

    Arrays that a transform reads into slots (`vlm3d_ext.data.batch_slots`) are not copied on their way to the batch,
    where all samples of the batch have the shape of those before; otherwise `collate_fn` puts them together. It may
    stack them or fill them up, but not change their values.

    With a CUDA `device`, what `device_keys` name is on that device when the batch is handed out, copied by a stream of
    its own from pinned memory while the batches before are computed on. The rest of the batch stays on the CPU.

    Args:
        dataset: such as `vlm3d_ext.data.seeded_dataset.SeededDataset`.
        batch_size: samples of a batch.
        num_workers: threads that load.
        sampler: the order of samples; None takes them one after the other.
        drop_last: leave out a last batch that is not full.
        collate_fn: from samples to a batch; None is torch's own.
        generator: of the number that torch's loader draws for each epoch; see `__iter__`.
        prefetch: batches that are loaded ahead of the one that is handed out.
        device: where to copy to; None or a CPU leaves all as it is.
        device_keys: names of the tensors to copy.

    Raises:
        TypeError: if the dataset cannot be shared by threads.
        ValueError: if `num_workers` is below 0 or `prefetch` below 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        num_workers: int = 0,
        sampler: Sampler | None = None,
        drop_last: bool = False,
        collate_fn: Callable[[Any], Any] | None = None,
        generator: torch.Generator | None = None,
        prefetch: int = 2,
        device: torch.device | str | None = None,
        device_keys: Sequence[str] = DEVICE_KEYS,
    ) -> None:
        if not isinstance(dataset, SlotFillingDataset):
            raise TypeError(f"dataset must be a SeededDataset, got {type(dataset).__name__}.")
        if num_workers < 0 or prefetch < 1:
            raise ValueError(
                f"num_workers must be at least 0 and prefetch at least 1, got {num_workers} and {prefetch}."
            )
        super().__init__(
            dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=collate_fn, generator=generator
        )
        self.num_workers = num_workers
        self.prefetch = prefetch
        self.device = None if device is None else torch.device(device)
        self.device_keys = tuple(device_keys)
        self.memory: BatchMemory | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names the class of its own iterator
        """Return an iterator over the batches of an epoch."""
        # Torch's loader draws the seed of its workers here. A run's later draws must not depend on who loads.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return self._loaded_here() if self.num_workers == 0 else self._loaded_by_threads()

    def _loaded_here(self) -> Iterator[Any]:
        epoch = _Epoch(self)
        for keys in cast(Sampler, self.batch_sampler):
            yield epoch.handed_out(epoch.load(keys))

    def _loaded_by_threads(self) -> Iterator[Any]:
        epoch, coming = _Epoch(self), iter(cast(Sampler, self.batch_sampler))
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="loader")
        ahead: deque[Future] = deque()
        is_all = False
        try:
            while True:
                while not is_all and len(ahead) <= self.prefetch:
                    keys = next(coming, None)
                    if keys is None:
                        is_all = True
                    else:
                        ahead.append(epoch.start(keys, pool))
                if not ahead:
                    return
                wait([ahead[0]])
                if is_all and len(ahead) == 1:
                    pool.shutdown()
                # no name for the batch here: its memory is free when its user drops it
                yield epoch.handed_out(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


class _Epoch:
    """The loading of one epoch's batches."""

    def __init__(self, loader: ThreadedDataLoader) -> None:
        is_cuda = loader.device is not None and loader.device.type == "cuda"
        self.dataset = cast(SlotFillingDataset, loader.dataset)
        self.collate_fn = cast(Callable[[Any], Any], loader.collate_fn)
        self.device = loader.device
        self.device_keys = loader.device_keys
        self.stream = torch.cuda.Stream(loader.device) if is_cuda else None
        # kept from epoch to epoch: touching or pinning new memory costs more than filling it
        self.memory = loader.memory = loader.memory or BatchMemory(pinned=is_cuda)
        self._of_thread = threading.local()

    def load(self, keys: Sequence[Any]) -> Future:
        """Load a batch in this thread."""
        batch = _BatchInProgress(keys, self.memory.slot(len(keys)))
        for row in range(len(keys)):
            self._load_sample(batch, row)
        return batch.future

    def start(self, keys: Sequence[Any], pool: ThreadPoolExecutor) -> Future:
        """Have a batch loaded."""
        batch = _BatchInProgress(keys, self.memory.slot(len(keys)))
        for row in range(len(keys)):
            pool.submit(self._load_sample, batch, row)
        return batch.future

    def handed_out(self, future: Future) -> Any:
        """Return the batch, for use on the current stream."""
        batch = future.result()
        if self.stream is not None and isinstance(batch, Mapping):
            for name in self.device_keys:
                if isinstance(batch.get(name), torch.Tensor):
                    # it was allocated for the copying stream, which would take it back while it is in use on this one
                    batch[name].record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _load_sample(self, batch: _BatchInProgress, row: int) -> None:
        if not hasattr(self._of_thread, "dataset"):
            self._of_thread.dataset = self.dataset.for_thread()
        try:
            batch.samples[row] = self._of_thread.dataset.load(batch.keys[row], batch.slot.sample(row))
        except Exception as error:
            batch.errors[row] = error
        if batch.count_down():
            batch.finish(self._assemble)

    def _assemble(self, samples: list[Any], slot: BatchSlot) -> Any:
        batch = self._collate(samples, slot)
        if self.stream is None or not isinstance(batch, Mapping):
            return batch
        named = {name: batch[name] for name in self.device_keys if isinstance(batch.get(name), torch.Tensor)}
        with torch.cuda.stream(self.stream):
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in named.items()}
            copied = torch.cuda.Event()
            copied.record(self.stream)
        copied.synchronize()  # before the pinned memory is used again
        return {**batch, **moved}

    def _collate(self, samples: list[Any], slot: BatchSlot) -> Any:
        in_place = [
            name
            for name in slot.tensors
            if all(isinstance(s, Mapping) and slot.holds(name, row, s.get(name)) for row, s in enumerate(samples))
        ]
        if not in_place:
            return self.collate_fn(samples)
        # What is in place is shown by its shape alone, so that nothing is copied. Where more is made of it than a
        # stack of that shape, the samples themselves are needed.
        shown = [{**s, **{name: torch.empty_like(s[name], device="meta") for name in in_place}} for s in samples]
        batch = self.collate_fn(shown)
        stacked = isinstance(batch, dict) and all(
            isinstance(batch.get(name), torch.Tensor) and batch[name].shape == slot.tensors[name].shape
            for name in in_place
        )
        return {**batch, **{name: slot.tensors[name] for name in in_place}} if stacked else self.collate_fn(samples)


class _BatchInProgress:
    """A batch whose samples arrive one by one, in any order."""

    def __init__(self, keys: Sequence[Any], slot: BatchSlot) -> None:
        self.keys = keys
        self.slot = slot
        self.samples: list[Any] = [None] * len(keys)
        self.errors: dict[int, Exception] = {}
        self.future: Future = Future()
        self._left = len(keys)
        self._lock = threading.Lock()

    def count_down(self) -> bool:
        """Whether the sample that has just come was the last one missing."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def finish(self, assemble: Callable[[list[Any], BatchSlot], Any]) -> None:
        """Make the batch of its samples, or raise the first one's error where it is asked for."""
        try:
            if self.errors:
                raise self.errors[min(self.errors)]
            self.future.set_result(assemble(self.samples, self.slot))
        except Exception as error:
            self.future.set_exception(error)
