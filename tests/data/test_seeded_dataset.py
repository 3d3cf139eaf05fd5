import pytest
from monai.transforms import Compose, Randomizable, Transform
from torch.utils.data import DataLoader

from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataLoader, SeededDataset, SeededSampler


class _Draw(Randomizable, Transform):
    def __call__(self, data):
        return {"drawn": (*data["drawn"], int(self.R.randint(1 << 30)))}


def _dataset(size=10, seed=0):
    return SeededDataset([{"drawn": ()}] * size, Compose([_Draw(), _Draw()]), seed)


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    alone = _dataset()[EpochIndex(3, 7)]
    dataset = _dataset()
    for index in (4, 7, 0):
        dataset[EpochIndex(2, index)]
    assert dataset[EpochIndex(3, 7)] == alone == dataset[EpochIndex(3, 7)]
    assert alone["drawn"][0] != alone["drawn"][1]  # two transforms of a chain draw differently


def test_draws_differ_between_epochs_samples_and_seeds():
    dataset = _dataset()
    draws = {dataset[EpochIndex(epoch, index)]["drawn"] for epoch in range(5) for index in range(10)}
    assert len(draws) == 50
    assert _dataset(seed=1)[EpochIndex(0, 0)]["drawn"] not in draws


def test_a_plain_index_is_of_epoch_zero():
    assert _dataset()[4] == _dataset()[EpochIndex(0, 4)]


def test_workers_draw_what_the_main_process_draws():
    dataset = _dataset()
    loaders = [
        DataLoader(dataset, 2, sampler=SeededSampler(dataset), num_workers=workers, collate_fn=list)
        for workers in (0, 2)
    ]
    assert list(loaders[0]) == list(loaders[1])


def test_a_transform_without_randomness_is_left_alone():
    assert SeededDataset([1, 2], lambda value: 10 * value)[EpochIndex(5, 1)] == 20


def _ranks(monkeypatch, world_size, dataset, epoch=0, **options):
    orders = []
    for rank in range(world_size):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", str(rank))
        sampler = SeededSampler(dataset, **options)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(sampler) == len(orders[-1])
    return orders


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_of_all_ranks_together_are_the_batches_of_one(monkeypatch, world_size):
    dataset, per_rank = _dataset(16), 2
    (alone,) = _ranks(monkeypatch, 1, dataset, epoch=3)
    ranks = _ranks(monkeypatch, world_size, dataset, epoch=3)
    assert sorted(alone) == [EpochIndex(3, index) for index in range(16)]
    for batch in range(16 // (per_rank * world_size)):
        together = {key for rank in ranks for key in rank[batch * per_rank : (batch + 1) * per_rank]}
        size = per_rank * world_size
        assert together == set(alone[batch * size : (batch + 1) * size])


def test_ranks_get_equal_numbers_also_where_they_cannot_share_evenly(monkeypatch):
    ranks = _ranks(monkeypatch, 3, _dataset(10))
    assert [len(rank) for rank in ranks] == [4, 4, 4]
    assert {key.index for rank in ranks for key in rank} == set(range(10))
    few = _ranks(monkeypatch, 4, _dataset(1))
    assert few == [[EpochIndex(0, 0)]] * 4


def test_no_case_is_validated_twice(monkeypatch):
    ranks = _ranks(monkeypatch, 3, _dataset(10), shuffle=False)
    assert [[key.index for key in rank] for rank in ranks] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    few = _ranks(monkeypatch, 4, _dataset(3), shuffle=False)  # a rank without any case could not run
    assert [len(rank) for rank in few] == [1, 1, 1, 1]


def test_even_ranks_leave_out_the_last_cases_that_they_cannot_share(monkeypatch):
    ranks = _ranks(monkeypatch, 3, _dataset(11), shuffle=False, even=True)
    assert [[key.index for key in rank] for rank in ranks] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert _ranks(monkeypatch, 3, _dataset(9), shuffle=False, even=True) == _ranks(
        monkeypatch, 3, _dataset(9), shuffle=False
    )
    few = _ranks(monkeypatch, 4, _dataset(3), shuffle=False, even=True)
    assert [len(rank) for rank in few] == [1, 1, 1, 1]
    (alone,) = _ranks(monkeypatch, 1, _dataset(11), shuffle=False, even=True)
    assert len(alone) == 11


def test_even_ranks_have_equal_numbers_of_batches(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches = {}
    for even in (False, True):
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            loader = SeededDataLoader(_numbered(9), 2, shuffle=False, even=even)
            batches[even, rank] = [batch["index"].tolist() for batch in loader]
    assert [len(batches[False, rank]) for rank in "01"] == [3, 2]
    assert [batches[True, rank] for rank in "01"] == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_the_epoch_changes_the_order_and_the_seed_too():
    dataset = _dataset(20)
    sampler = SeededSampler(dataset)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([key.index for key in sampler])
        assert {key.epoch for key in sampler} == {epoch}
    assert orders[0] == orders[2] != orders[1]
    other = SeededSampler(dataset, seed=5)
    assert [key.index for key in other] != orders[0]


def test_without_shuffling_order_and_draws_are_the_same_in_every_epoch():
    sampler = SeededSampler(_dataset(5), shuffle=False)
    for epoch in (0, 7):
        sampler.set_epoch(epoch)
        assert list(sampler) == [EpochIndex(0, index) for index in range(5)]


def _epochs(loader, number=2):
    """Return the order of the samples in each epoch, as MONAI's engines go through them."""
    orders = []
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)
        orders.append([index for batch in loader for index in batch["index"].tolist()])
    return orders


def _numbered(size=10):
    return SeededDataset([{"index": index} for index in range(size)], Compose([]))


def test_a_training_loader_shuffles_by_seed_and_epoch():
    first, second = _epochs(SeededDataLoader(_numbered(), 5, seed=3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert _epochs(SeededDataLoader(_numbered(), 2, seed=3, num_workers=1)) == [first, second]
    assert _epochs(SeededDataLoader(_numbered(), 5, seed=4))[0] != first


def test_a_training_loader_leaves_out_a_batch_that_is_not_full():
    loader = SeededDataLoader(_numbered(), 4)
    assert len(loader) == 2 and [len(order) for order in _epochs(loader)] == [8, 8]


def test_a_validation_loader_keeps_the_order_and_every_case():
    loader = SeededDataLoader(_numbered(), 4, shuffle=False)
    assert len(loader) == 3 and _epochs(loader) == [list(range(10))] * 2


def test_a_validation_loader_draws_the_same_in_every_epoch():
    loader = SeededDataLoader(SeededDataset([{"drawn": ()}] * 3, Compose([_Draw()])), 3, shuffle=False)
    draws = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        draws.append([batch["drawn"][0].tolist() for batch in loader])
    assert draws[0] == draws[1]
