import gc
import tracemalloc

import numpy as np
import torch

from vlm3d_ext.data.batch_slots import BatchMemory


def _memory(**arrays):
    memory = BatchMemory()
    for name, array in arrays.items():
        memory.slot(1).sample(0).expect(name, array)
    return memory


def test_a_slot_has_what_the_samples_before_had():
    memory = BatchMemory()
    assert memory.slot(2).tensors == {} and memory.slot(2).sample(0).row("image") is None
    memory.slot(2).sample(1).expect("image", np.zeros((3, 5), np.uint8))
    memory.expect("mask", np.zeros(4, np.int16))
    slot = memory.slot(2)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in slot.tensors.items()} == {
        "image": ((2, 3, 5), torch.uint8),
        "mask": ((2, 4), torch.int16),
    }
    memory.expect("image", np.zeros((3, 6), np.uint8))
    assert memory.slot(2).tensors["image"].shape == (2, 3, 6)


def test_what_is_written_into_a_sample_is_in_the_batch():
    slot = _memory(image=np.zeros((3, 5), np.uint8)).slot(2)
    for row in range(2):
        slot.sample(row).row("image")[...] = row + 1
    assert (slot.tensors["image"] == torch.tensor([1, 2])[:, None, None]).all()


def test_only_what_lies_in_its_own_row_is_held():
    slot = _memory(image=np.zeros((3, 5), np.uint8)).slot(2)
    row = torch.from_numpy(slot.sample(1).row("image"))
    assert slot.holds("image", 1, row) and not slot.holds("image", 0, row)
    assert not slot.holds("image", 1, row.clone()) and not slot.holds("image", 1, None)
    assert not slot.holds("image", 1, row[:2]) and not slot.holds("image", 1, row.view(torch.int8))


def test_memory_is_used_again_when_nobody_holds_it_and_not_before():
    memory = _memory(image=np.zeros((3, 5), np.uint8))
    slot = memory.slot(2)
    first = slot.tensors["image"]
    first.fill_(7)
    place, held = first.data_ptr(), first[1, :, 2].numpy()
    del slot, first
    gc.collect()
    other = memory.slot(2).tensors["image"]  # a column of the first is still in use
    assert other.data_ptr() != place
    other.fill_(9)
    assert held.tolist() == [7, 7, 7]
    del held
    gc.collect()
    assert memory.slot(2).tensors["image"].data_ptr() == place


def test_nothing_is_kept_of_sizes_that_do_not_come_again():
    """Scans that all differ, as users have them."""
    memory, mebibyte = BatchMemory(), 2**20
    tracemalloc.start()
    try:
        for depth in range(1, 20):
            memory.expect("image", np.empty((depth, mebibyte), np.uint8))
            memory.slot(2)
            memory.slot(1)  # a last batch that is not full
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 3 * 19 * mebibyte <= held < 3 * 20 * mebibyte  # the last size may come again
