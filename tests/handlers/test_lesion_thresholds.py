import logging

import torch
from ignite.engine import Engine, Events
from torch import nn

from vlm3d_ext.handlers import LesionThresholds
from vlm3d_ext.metrics import DiceByThreshold


def evaluator_of(network, scores):
    engine = Engine(lambda _, batch: batch)
    engine.logger.setLevel(logging.INFO)
    scores.attach(engine, "mean_dice")
    LesionThresholds(network, scores).attach(engine)
    return engine


def network_of(num_diseases):
    network = nn.Module()
    network.register_buffer("thresholds", torch.full((num_diseases,), 0.9))
    network.register_buffer("presence_thresholds", torch.full((num_diseases,), 0.9))
    return network


def batch_of(*high):
    """One scan of four voxels per disease, lesions at `high` and 0.2; 0.2 is best cut off or kept by the target."""
    probabilities = torch.tensor([[value, 0.2, 0.0, 0.0] for value in high]).view(1, len(high), 4, 1, 1)
    target = torch.zeros(probabilities.shape, dtype=torch.uint8)
    target[:, :, 0] = 1
    return probabilities, target


def test_the_networks_buffers_take_the_epochs_best_thresholds(caplog):
    """Candidates 0.1, 0.4, 0.7: at 0.5 the second cuts best, at 0.15 only the first draws it; none has the third."""
    network = network_of(3)
    buffer = network.thresholds
    scores = DiceByThreshold((0.1, 0.4, 0.7), (0.1, 0.4, 0.7), output_transform=lambda output: output)
    engine = evaluator_of(network, scores)
    probabilities, target = batch_of(0.5, 0.15, 0.8)
    target[:, 2] = 0
    with caplog.at_level(logging.INFO):
        engine.run([(probabilities, target)])
    torch.testing.assert_close(network.thresholds, torch.tensor([0.4, 0.1, 0.5]))
    torch.testing.assert_close(network.presence_thresholds, torch.tensor([0.4, 0.1, 0.5]))
    assert network.thresholds is buffer and network.state_dict()["thresholds"][1] == torch.tensor(0.1)
    assert "1.000 (0.40, 0.40), 0.667 (0.10, 0.10), nan (0.50, 0.50)" in caplog.text

    engine.run([batch_of(0.75, 0.75, 0.75)])  # the next validation stands alone
    torch.testing.assert_close(network.thresholds, torch.full((3,), 0.4))


def test_a_handler_that_saves_after_it_finds_them():
    """`ResumableCheckpoint` stands behind it in the list of handlers."""
    network = network_of(1)
    engine = evaluator_of(network, DiceByThreshold((0.1, 0.4), (0.1, 0.4), output_transform=lambda output: output))
    saved = []
    engine.add_event_handler(Events.COMPLETED, lambda: saved.append(network.state_dict()["thresholds"].clone()))
    engine.run([batch_of(0.5)])
    torch.testing.assert_close(saved, [torch.tensor([0.4])])
