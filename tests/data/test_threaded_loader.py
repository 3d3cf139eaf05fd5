import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Compose, Randomizable, Transform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.prepared_case import PreparedCaseError
from vlm3d_ext.data.seeded_dataset import SeededDataLoader, SeededDataset, SeededSampler
from vlm3d_ext.data.threaded_loader import ThreadedDataLoader
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.transforms import LoadPreparedCased, classification_transforms, prepared_case_transforms


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return CaseManifest(make_prepared_release(tmp_path_factory.mktemp("prepared"), (11, 1, 1))).cases("training")


@pytest.fixture(scope="module")
def ragged_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ragged")
    sizes = {2: (6, 16, 20), 5: (9, 14, 16), 6: (9, 14, 16)}
    return CaseManifest(make_prepared_release(folder, (8, 1, 1), sizes=sizes)).cases("training")


def _loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def _assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, torch.Tensor):
                assert batch[name].dtype == value.dtype
                assert torch.equal(batch[name].nan_to_num(-1), value.nan_to_num(-1)), name
            else:
                assert batch[name] == value


def _torch_batches(dataset, batch_size, epoch, **options):
    sampler = SeededSampler(dataset, seed=3)
    sampler.set_epoch(epoch)
    return list(DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, **options))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_are_those_of_torchs_loader(cases, num_workers):
    dataset = SeededDataset(cases, classification_transforms(0.5, 0.2), seed=2)
    loader = SeededDataLoader(dataset, 2, num_workers, seed=3)
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        _assert_same(list(loader), _torch_batches(dataset, 2, epoch))
    assert len(loader) == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scans_of_several_sizes_are_put_together_by_the_collate_function(ragged_cases, num_workers):
    dataset = SeededDataset(ragged_cases, prepared_case_transforms())
    loader = ThreadedDataLoader(dataset, 2, num_workers, collate_fn=collate_padded)
    expected = list(DataLoader(dataset, 2, collate_fn=collate_padded))
    _assert_same(list(loader), expected)
    assert ["valid_size" in batch for batch in expected] == [True, False, False, False]


def test_samples_can_be_collated_to_anything(cases):
    dataset = SeededDataset(cases, LoadPreparedCased())
    samples = [sample for batch in ThreadedDataLoader(dataset, 2, 2, collate_fn=list) for sample in batch]
    assert [sample["volume_id"] for sample in samples] == [case["volume_id"] for case in cases]
    assert all(torch.equal(sample["image"], dataset[index]["image"]) for index, sample in enumerate(samples))


def test_volumes_are_read_into_the_memory_of_batches_that_are_gone(cases):
    loader = ThreadedDataLoader(SeededDataset(cases, prepared_case_transforms()), 1, num_workers=2)
    places = []
    for batch in loader:
        places.append(batch["image"].data_ptr())
        del batch
    # one in use, `prefetch` ahead, and for each thread one that it is about to let go; the first were not in slots
    assert len(set(places[3:])) <= 5 < len(places[3:])


def test_a_batch_that_is_held_is_never_overwritten(cases):
    dataset = SeededDataset(cases, prepared_case_transforms())
    held = list(ThreadedDataLoader(dataset, 2, num_workers=2))  # all of them
    _assert_same(held, list(DataLoader(dataset, 2)))


class _Slow(Randomizable, Transform):
    """Finishes later samples sooner, and notes how many are loaded at once."""

    def __init__(self):
        self.running, self.most, self.started = [], [0], []

    def __call__(self, index):
        self.started.append(index)
        self.running.append(index)
        self.most[0] = max(self.most[0], len(self.running))
        time.sleep(0.02 * (4 - index % 4))
        self.running.pop()
        return {"index": index, "drawn": int(self.R.randint(1 << 30))}


def test_order_and_draws_do_not_depend_on_which_thread_is_first():
    slow = _Slow()
    dataset = SeededDataset(list(range(16)), Compose([slow]))
    batches = list(ThreadedDataLoader(dataset, 2, num_workers=4))
    assert [batch["index"].tolist() for batch in batches] == [[2 * n, 2 * n + 1] for n in range(8)]
    assert [n for batch in batches for n in batch["drawn"].tolist()] == [dataset[n]["drawn"] for n in range(16)]
    assert slow.most[0] == 4


def test_no_more_is_loaded_ahead_than_asked_for():
    slow = _Slow()
    loader = ThreadedDataLoader(SeededDataset(list(range(40)), Compose([slow])), 1, num_workers=4, prefetch=3)
    batches = iter(loader)
    next(batches)
    time.sleep(0.4)
    assert sorted(slow.started) == [0, 1, 2, 3]
    next(batches)
    time.sleep(0.4)
    assert sorted(slow.started) == [0, 1, 2, 3, 4]


def test_threads_end_with_the_last_batch_and_when_the_loop_is_left():
    loader = ThreadedDataLoader(SeededDataset(list(range(12)), _Slow()), 2, num_workers=3)
    for number, _ in enumerate(loader):
        assert bool(_loader_threads()) == (number < 5)  # before the last batch is used
    for _ in loader:
        break
    assert not _loader_threads()
    with pytest.raises(KeyboardInterrupt):
        for _ in loader:
            raise KeyboardInterrupt
    gc.collect()
    assert not _loader_threads()
    batches = iter(loader)
    next(batches)
    assert _loader_threads()
    del batches
    assert not _loader_threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_names_the_file_and_ends_the_threads(cases, tmp_path, num_workers):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(Path(cases[3]["image"]).read_bytes()[:200])
    broken = [*cases[:3], {**cases[3], "image": str(damaged)}, *cases[4:]]
    batches = iter(ThreadedDataLoader(SeededDataset(broken, LoadPreparedCased()), 2, num_workers, collate_fn=list))
    next(batches)
    with pytest.raises(PreparedCaseError, match=r"damaged\.npz: is damaged"):
        next(batches)
    assert not _loader_threads()


def _fail(item):
    raise KeyError("spacing")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_that_names_no_file_gets_a_note_that_does(num_workers):
    items = [{"volume_id": "a", "image": "a.npz"}, {"volume_id": "b", "image": "b.npz"}]
    with pytest.raises(KeyError) as raised:
        list(ThreadedDataLoader(SeededDataset(items, _fail), 2, num_workers))
    assert raised.value.__notes__ == ["while loading a (a.npz)"]  # the first of the two, whichever came first


class _Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, image):
        return self.weight * image.mean((1, 2, 3, 4))


def _curve(dataset, num_workers):
    torch.manual_seed(0)
    network, losses = _Brightness(), []
    trainer = SupervisedTrainer(
        device="cpu",
        max_epochs=3,
        train_data_loader=SeededDataLoader(dataset, 2, num_workers),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=lambda pred, _: pred.square().mean(),
        prepare_batch=PrepareKeywordBatch(keys=[]),
        decollate=False,
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"].item())
    )
    trainer.run()
    return losses


def test_monais_trainer_gives_the_same_curve_with_threads_and_without(cases):
    dataset = SeededDataset(cases, classification_transforms(0.5, 0.2))
    curves = [_curve(dataset, num_workers) for num_workers in (0, 3)]
    assert curves[0] == curves[1] and len(curves[0]) == 15
    assert len(set(curves[0])) == 15  # the sampler was told the epochs
    assert not _loader_threads()


def test_monais_evaluator_runs_over_it_and_stops_cleanly(cases):
    dataset = SeededDataset(cases, prepared_case_transforms())
    seen = []
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=ThreadedDataLoader(dataset, 2, 2, device="cpu"),
        network=_Brightness(),
        prepare_batch=PrepareKeywordBatch(keys=[]),
        decollate=False,
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.extend(engine.state.batch["volume_id"]))
    evaluator.run()
    assert seen == [case["volume_id"] for case in cases] and not _loader_threads()


def test_a_run_draws_the_same_numbers_whoever_loads(cases):
    dataset = SeededDataset(cases, prepared_case_transforms())
    drawn = []
    for loader in (DataLoader(dataset, 4), ThreadedDataLoader(dataset, 4, 2), ThreadedDataLoader(dataset, 4)):
        torch.manual_seed(5)
        list(loader)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] == drawn[2]
    generator = torch.Generator()
    torch.manual_seed(5)
    list(ThreadedDataLoader(dataset, 4, generator=generator))
    untouched = torch.rand(3).tolist()
    torch.manual_seed(5)
    assert torch.rand(3).tolist() == untouched


def test_bad_settings_are_refused():
    dataset = SeededDataset([1], lambda item: item)
    with pytest.raises(TypeError, match="must be a SeededDataset, got TensorDataset"):
        ThreadedDataLoader(TensorDataset(torch.ones(2)))
    with pytest.raises(ValueError, match="got -1 and 2"):
        ThreadedDataLoader(dataset, num_workers=-1)
    with pytest.raises(ValueError, match="got 2 and 0"):
        ThreadedDataLoader(dataset, num_workers=2, prefetch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_volumes_are_on_the_gpu_when_they_are_handed_out(cases, ragged_cases):
    for data, batch_size, collate_fn in ((cases, 2, None), (ragged_cases, 2, collate_padded)):
        dataset = SeededDataset(data, prepared_case_transforms())
        loader = ThreadedDataLoader(dataset, batch_size, 2, collate_fn=collate_fn, device="cuda")
        sums = []
        for batch in loader:
            assert batch["image"].is_cuda and batch["anatomical_mask"].is_cuda and not batch["labels"].is_cuda
            torch.cuda._sleep(20_000_000)  # batches to come must not overwrite what is still waited for
            sums.append(batch["image"].float().sum((1, 2, 3, 4)))
        expected = [float(np.sum(dataset[index]["image"].numpy(), dtype=np.float64)) for index in range(len(data))]
        assert torch.cat(sums).tolist() == expected
