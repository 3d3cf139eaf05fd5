"""A real MONAI trainer on a linear network and four fixed batches."""

from __future__ import annotations

import torch
from monai.engines import SupervisedTrainer
from torch import nn


def make_trainer(
    *handlers, network=None, epochs=2, num_batches=4, learning_rate=0.1, seed=0, **options
) -> SupervisedTrainer:
    """Return a trainer with SGD and the mean squared error; batch size 2, three inputs, one output."""
    torch.manual_seed(seed)
    network = nn.Linear(3, 1) if network is None else network
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"image": torch.randn(2, 3, generator=generator), "label": torch.randn(2, 1, generator=generator)}
        for _ in range(num_batches)
    ]
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=batches,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=learning_rate),
        loss_function=nn.MSELoss(),
        train_handlers=list(handlers),
        **options,
    )
