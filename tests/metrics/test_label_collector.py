import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from sklearn.metrics import roc_auc_score
from torch.utils.data import DistributedSampler

from vlm3d_ext.metrics import MultiLabelScores

NAN = float("nan")


def data_set(num=11):
    generator = np.random.default_rng(0)
    labels = (generator.random((num, 3)) < 0.5).astype(np.float32)
    labels[2, 1] = NAN
    return generator.standard_normal((num, 3)).astype(np.float32), labels


def run_epoch(metric, rows):
    logits, labels = (torch.from_numpy(part[rows]) for part in data_set())

    def batches():
        return [{"pred": p, "label": t} for p, t in zip(logits.split(2), labels.split(2), strict=True)]

    engine = Engine(lambda _, batch: batch)
    metric.attach(engine, "auroc")
    return engine.run(batches()).metrics["auroc"]


def pair(output):
    return output["pred"], output["label"]


def test_scores_of_one_process():
    logits, labels = data_set()
    metric = MultiLabelScores(output_transform=pair)
    auroc = run_epoch(metric, slice(None))
    known = ~np.isnan(labels)
    expected = np.mean([roc_auc_score(labels[known[:, c], c], logits[known[:, c], c]) for c in range(3)])
    assert auroc == pytest.approx(expected)
    np.testing.assert_array_equal(metric.logits, logits)
    np.testing.assert_array_equal(metric.labels, labels)
    metric.reset()
    assert np.isnan(metric.compute()) and metric.logits.shape == (0, 0)


def test_lists_of_single_cases_are_taken_too_and_wrong_shapes_refused():
    metric = MultiLabelScores(output_transform=lambda output: output)
    metric.update(([torch.zeros(3), torch.ones(3)], [torch.ones(3), torch.full((3,), NAN)]))
    assert np.isnan(metric.compute()) and metric.logits.shape == (2, 3)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        metric.update((torch.zeros(2, 3), torch.zeros(2, 4)))


def test_cases_looked_at_in_several_ways_become_rows_side_by_side():
    logits, labels = (torch.from_numpy(part) for part in data_set(6))
    second = torch.where(torch.arange(6)[:, None] % 2 == 0, labels, NAN)  # every other case has no second way
    metric = MultiLabelScores(num_cases=6, output_transform=lambda output: output)
    for part in (slice(0, 4), slice(4, 6)):
        metric.update((torch.stack([logits, logits + 1], 1)[part], torch.stack([labels, second], 1)[part]))
    auroc = metric.compute()
    assert metric.logits.shape == metric.labels.shape == (12, 3)
    np.testing.assert_array_equal(metric.logits[0::2], logits)
    np.testing.assert_array_equal(metric.logits[1::2], logits + 1)
    np.testing.assert_array_equal(metric.labels[1::2], second)
    flat = MultiLabelScores(output_transform=lambda output: output)
    flat.update((torch.cat([logits, logits[::2] + 1]), torch.cat([labels, labels[::2]])))
    assert auroc == pytest.approx(flat.compute())
    metric.reset()
    metric.update((logits, labels))  # in one way again
    metric.compute()
    np.testing.assert_array_equal(metric.logits, logits)
    with pytest.raises(ValueError, match=r"got \(2, 2, 3\) and \(2, 3\)"):
        metric.update((torch.zeros(2, 2, 3), torch.zeros(2, 3)))


def test_a_wrong_length_is_refused():
    metric = MultiLabelScores(output_transform=lambda output: output, num_cases=5)
    metric.update((torch.zeros(4, 3), torch.zeros(4, 3)))
    with pytest.raises(ValueError, match=r"saw 4 cases, expected 5"):
        metric.compute()


def _rank(local_rank, rendezvous):
    """What each of two processes checks; an error here ends the parent's spawn with an error."""
    logits, labels = data_set()
    sampler = DistributedSampler(range(len(logits)), num_replicas=2, rank=idist.get_rank(), shuffle=False)
    rows = list(sampler)
    assert len(rows) == 6  # 11 cases and one repeated
    metric = MultiLabelScores(output_transform=pair, num_cases=11)
    auroc = run_epoch(metric, rows)
    np.testing.assert_array_equal(metric.logits, logits)
    np.testing.assert_array_equal(metric.labels, labels)
    # without the length, the repeated case stays, and ranks follow each other
    repeating = MultiLabelScores(output_transform=pair)
    run_epoch(repeating, rows)
    np.testing.assert_array_equal(repeating.logits, logits[[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 0]])
    # ranks with unequal numbers of cases, one with none
    uneven = MultiLabelScores(output_transform=pair)
    if idist.get_rank() == 1:
        uneven.update((torch.from_numpy(logits[:3]), torch.from_numpy(labels[:3])))
    uneven.compute()
    np.testing.assert_array_equal(uneven.logits, logits[:3])
    # each case in two ways, which stay together
    both_ways, both_labels = np.stack([logits, -logits], axis=1), np.stack([labels, labels], axis=1)
    ways = MultiLabelScores(output_transform=lambda output: output, num_cases=11)
    ways.update((torch.from_numpy(both_ways[rows]), torch.from_numpy(both_labels[rows])))
    ways.compute()
    np.testing.assert_array_equal(ways.logits, both_ways.reshape(22, 3))
    np.testing.assert_array_equal(ways.labels, both_labels.reshape(22, 3))
    uneven_ways = MultiLabelScores(output_transform=lambda output: output)
    if idist.get_rank() == 1:
        uneven_ways.update((torch.from_numpy(both_ways[:3]), torch.from_numpy(both_labels[:3])))
    uneven_ways.compute()
    np.testing.assert_array_equal(uneven_ways.logits, both_ways[:3].reshape(6, 3))
    known = ~np.isnan(labels)
    expected = np.mean([roc_auc_score(labels[known[:, c], c], logits[known[:, c], c]) for c in range(3)])
    assert abs(auroc - expected) < 1e-12
    rendezvous.put(idist.get_rank())


def test_two_processes_see_the_whole_data_set_once(tmp_path):
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    idist.spawn("gloo", _rank, args=(queue,), nproc_per_node=2, init_method=f"file://{tmp_path}/rendezvous")
    assert sorted([queue.get(), queue.get()]) == [0, 1]
